"""When memory runs out: what can be freed is freed, and the work is done again with less of it at a time."""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.log import log

E = TypeVar("E", bound=Example)


def micro_batches(examples: Sequence[Example], token_budget: int) -> list[list[Example]]:
    """Group Examples so that no group has more than `token_budget` tokens; one longer than that stands alone.

    First-fit decreasing: few groups, the same ones for the same Examples. Examples of different classes stay apart, so
    that what is packed beside a rollout never changes.
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
) -> None:
    """Call `compute` on all Examples, at most token_budget tokens at a time; where memory runs out, on half as many.

    A group that failed comes again, in smaller ones; an Example that does not fit by itself is divided. Raises UserError
    when one that cannot be divided does not fit.
    """
    left = list(examples)
    while left:
        groups = micro_batches(left, token_budget)
        done = 0
        try:
            for group in groups:
                compute(group)
                done += 1
            return
        except torch.OutOfMemoryError as error:
            reason = str(error)
        # Only behind the except has the traceback let go of what was computed.
        failed = groups[done] if len(groups[done]) > 1 else divide(groups[done][0])
        token_budget = halve_budget(token_budget, groups, failed, reason)
        left = [*failed, *(example for group in groups[done + 1 :] for example in group)]


def halve_budget(token_budget: int, groups: Sequence[Sequence[Example]], failed: Sequence[Example], reason: str) -> int:
    """The token budget to try next when one of these groups did not fit; says so, and frees what can be freed.

    Half of the largest group, or the same ones would be tried again. Raises UserError when `failed` is a single Example.
    """
    room = free_memory()
    size = sum(e.length for e in failed)
    if len(failed) == 1:
        several = ", take fewer completions of a prompt" if len(failed[0].completions) > 1 else ""
        raise UserError(
            f"out of memory with a single example of {size:,} tokens, {failed[0].source or 'its source unknown'}{room}. "
            f"Set --data.max-length below {size}{several}, --train.checkpointing on or offload, or a smaller --adapter.r, "
            f"or close other programs that use the card. The device said: {reason.splitlines()[0]}"
        )
    token_budget = max(1, min(token_budget, max(sum(e.length for e in group) for group in groups)) // 2)
    log(f"out of memory with {size:,} tokens: the token budget is now {token_budget:,}, and this is done again")
    return token_budget


def free_memory() -> str:
    """Give back what nothing needs. Returns how much room there is then, for a message; nothing where it is not known."""
    gc.collect()
    if not torch.cuda.is_available():
        return ""
    torch.cuda.empty_cache()
    room, total = torch.cuda.mem_get_info()
    return f" ({room / 2**30:.1f} of {total / 2**30:.1f} GiB were free for it)"
