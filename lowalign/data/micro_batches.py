"""Micro-batches by token budget, and the retry with smaller ones when memory runs out."""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lowalign import processes
from lowalign.config.cards import GIB
from lowalign.data.example import Example
from lowalign.errors import UserError
from lowalign.log import log

E = TypeVar("E", bound=Example)


def micro_batches(examples: Sequence[Example], token_budget: int) -> list[list[Example]]:
    """Micro-batches of at most `token_budget` tokens; a longer Example is one by itself.

    First-fit decreasing: few micro-batches, the same ones for the same Examples. Examples of different classes stay apart, so
    that the packs of PPO's rollouts do not depend on the pretraining rows.
    """
    batches: list[list[Example]] = []
    free: list[int] = []  # tokens, of each micro-batch
    for example in sorted(examples, key=lambda e: -e.length):
        fits = (i for i, b in enumerate(batches) if type(b[0]) is type(example) and example.length <= free[i])
        i = next(fits, len(batches))
        if i == len(batches):
            batches.append([])
            free.append(token_budget)
        batches[i].append(example)
        free[i] -= example.length
    return batches


def own_share(examples: Sequence[E]) -> list[E]:
    """Those of the Examples that this process computes, in their order; each is in the share of one process.

    Classes are divided one by one, so that the packs of PPO's rollouts do not depend on the pretraining rows.
    """
    own = []
    for kind in dict.fromkeys(map(type, examples)):
        places = [i for i, e in enumerate(examples) if type(e) is kind]
        own += [places[k] for k in processes.share([examples[i].length for i in places])]
    return [examples[i] for i in sorted(own)]


def in_micro_batches(
    examples: Sequence[E],
    token_budget: int,
    compute: Callable[[list[E]], None],
    divide: Callable[[E], list[E]] = lambda example: [example],
    restart: Callable[[int], None] | None = None,
) -> None:
    """Call `compute` on all Examples, in micro-batches; where memory runs out, in smaller ones.

    A micro-batch that failed is computed again in parts; an Example that does not fit by itself is split by `divide`.
    restart: for sums over all Examples. It gets the smaller budget, and then all Examples are computed again. Raises
    UserError when an Example that cannot be divided does not fit.
    """
    batches, done = micro_batches(examples, token_budget), 0
    while done < len(batches):
        reason = out_of_memory(compute, batches[done])
        if reason is None:
            done += 1
            continue
        failed = batches[done] if len(batches[done]) > 1 else divide(batches[done][0])
        token_budget = halve_budget(token_budget, batches, failed, reason)
        remaining = [*failed, *(example for batch in batches[done + 1 :] for example in batch)]
        if restart is not None:
            restart(token_budget)
            remaining = examples
        batches, done = micro_batches(remaining, token_budget), 0


def out_of_memory(compute: Callable[..., None], *arguments: object) -> str | None:
    """Call `compute`. -> None, or the device's message when memory ran out."""
    try:
        compute(*arguments)
        return None
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        reason = str(error).partition("\n")[0]
        if not is_out_of_memory(error):
            raise
    # Only outside the `except` block does the traceback no longer hold the tensors of `compute`.
    return reason


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that memory ran out. The driver's own (pinned memory, a kernel that is loaded late) is a
    torch.AcceleratorError, which other failures of the device are too."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def halve_budget(
    token_budget: int, batches: Sequence[Sequence[Example]], failed: Sequence[Example], reason: str
) -> int:
    """The token budget to try next after one of these micro-batches did not fit; logs it and frees unused memory.

    It is at most half of the largest micro-batch, so that they become smaller. Raises UserError when `failed` is a single
    Example.
    """
    free = free_memory()
    size = sum(e.length for e in failed)
    if len(failed) == 1:
        several = ", take fewer completions of a prompt" if len(failed[0].completions) > 1 else ""
        raise UserError(
            f"out of memory with a single example of {size:,} tokens, {failed[0].source or 'its source unknown'}{free}. "
            f"Set --data.max-length below {size}{several}, --train.checkpointing on or offload, or a smaller --adapter.r, "
            f"or close other programs that use the card. The device said: {reason}"
        )
    token_budget = max(1, min(token_budget, max(sum(e.length for e in batch) for batch in batches)) // 2)
    log(f"out of memory with {size:,} tokens: the token budget is now {token_budget:,}, and this is done again")
    return token_budget


def free_memory() -> str:
    """Release unused memory -> how much is free now, as a part of a message; empty without a GPU."""
    gc.collect()
    if not torch.cuda.is_available():
        return ""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return f" ({free / GIB:.1f} of {total / GIB:.1f} GiB were free for it)"
