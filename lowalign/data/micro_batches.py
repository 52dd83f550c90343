"""Micro-batches by token budget, and the retry with smaller ones when memory runs out."""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.log import log

E = TypeVar("E", bound=Example)


def micro_batches(examples: Sequence[Example], token_budget: int) -> list[list[Example]]:
    """Group Examples so that no group has more than `token_budget` tokens; a longer Example is a group by itself.

    First-fit decreasing: few groups, the same ones for the same Examples. Examples of different classes stay apart, so
    that the packs of PPO's rollouts do not depend on the pretraining rows.
    """
    groups: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: -e.length):
        same = (type(group[0]) is type(example) for group in groups)
        fits = next(
            (g for g, (free, s) in enumerate(zip(room, same, strict=True)) if s and example.length <= free), None
        )
        if fits is None:
            fits = len(groups)
            groups.append([])
            room.append(token_budget)
        groups[fits].append(example)
        room[fits] -= example.length
    return groups


def in_micro_batches(
    examples: Sequence[E],
    token_budget: int,
    compute: Callable[[list[E]], None],
    divide: Callable[[E], list[E]] = lambda example: [example],
    restart: Callable[[int], None] | None = None,
) -> None:
    """Call `compute` on all Examples, in groups of at most `token_budget` tokens; where memory runs out, in smaller ones.

    A group that failed is computed again in smaller groups; an Example that does not fit by itself is split by `divide`.
    restart: for sums over all Examples. It gets the smaller budget, and then all Examples are computed again. Raises
    UserError when an Example that cannot be divided does not fit.
    """
    groups, done = micro_batches(examples, token_budget), 0
    while done < len(groups):
        reason = out_of_memory(compute, groups[done])
        if reason is None:
            done += 1
            continue
        failed = groups[done] if len(groups[done]) > 1 else divide(groups[done][0])
        token_budget = halve_budget(token_budget, groups, failed, reason)
        remaining = [*failed, *(example for group in groups[done + 1 :] for example in group)]
        if restart is not None:
            restart(token_budget)
            remaining = examples
        groups, done = micro_batches(remaining, token_budget), 0


def out_of_memory(compute: Callable[..., None], *arguments: object) -> str | None:
    """Call `compute`. -> None, or the device's message when memory ran out."""
    try:
        compute(*arguments)
        return None
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
    # Only outside the `except` block does the traceback no longer hold the tensors of `compute`.
    return reason


def halve_budget(token_budget: int, groups: Sequence[Sequence[Example]], failed: Sequence[Example], reason: str) -> int:
    """The token budget to try next after one of `groups` did not fit; logs it and frees unused memory.

    It is at most half of the largest group, so that the groups really become smaller. Raises UserError when `failed` is a
    single Example.
    """
    room = free_memory()
    size = sum(e.length for e in failed)
    if len(failed) == 1:
        several = ", take fewer completions of a prompt" if len(failed[0].completions) > 1 else ""
        raise UserError(
            f"out of memory with a single example of {size:,} tokens, {failed[0].source or 'its source unknown'}{room}. "
            f"Set --data.max-length below {size}{several}, --train.checkpointing on or offload, or a smaller --adapter.r, "
            f"or close other programs that use the card. The device said: {reason}"
        )
    token_budget = max(1, min(token_budget, max(sum(e.length for e in group) for group in groups)) // 2)
    log(f"out of memory with {size:,} tokens: the token budget is now {token_budget:,}, and this is done again")
    return token_budget


def free_memory() -> str:
    """Free unused memory -> the room there is now, as a part of a message; empty without a GPU."""
    gc.collect()
    if not torch.cuda.is_available():
        return ""
    torch.cuda.empty_cache()
    room, total = torch.cuda.mem_get_info()
    return f" ({room / 2**30:.1f} of {total / 2**30:.1f} GiB were free for it)"
