"""Sampling n completions per prompt, as many at a time as there is room for."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from transformers import PretrainedConfig

from lowalign.config.sections import Sampling
from lowalign.data.micro_batches import free_memory, out_of_memory
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.attention.rope import rope_scaling
from lowalign.model.attention.soft_prompt import NO_SOFT_PROMPT, SoftPrompt
from lowalign.model.sampling.batcher import Completion, PromptTask, SampleBatcher


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    n: int,
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    soft: SoftPrompt = NO_SOFT_PROMPT,
    seeds: Sequence[int] | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[list[Completion]]:
    """n completions of each prompt (token ids), by a causal language model whose attention is attention.NAME.

    soft: stands before each prompt. seeds: one per prompt, its place when left out; sample j of a prompt depends on
    (sampling.seed, its seed, j) alone. A completion ends at the model's last position at the latest. check: called before
    each forward.

    Where memory runs out, what is not done begins anew, half as many samples at a time. Raises UserError when one does
    not fit, for a prompt without a token, one that fills the model's positions, and logits that are not finite.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    if n < 1 or len(seeds) != len(prompts):
        raise ValueError(
            f"n must be at least 1 and seeds one per prompt: n = {n}, {len(seeds)} seeds, {len(prompts)} prompts"
        )
    config = model.config.get_text_config()
    # Dynamic RoPE goes on past the positions the config names.
    last = None if rope_scaling(config)[0] == "dynamic" else getattr(config, "max_position_embeddings", None)
    positions = last or math.inf
    tasks = []
    for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
        length = soft.length + len(ids)
        if not ids and not soft.virtual_tokens:
            raise UserError(f"prompt {i} is empty; give it at least one token (the bos token, say)")
        if length >= positions:
            raise UserError(f"prompt {i} takes {length} of the model's {positions} positions; shorten it")
        tasks.append(PromptTask(i, list(ids), length, seed, min(sampling.max_new_tokens, positions - length)))
    results: list[list[Completion]] = [[] for _ in prompts]
    options = {"sampling": sampling, "eos_ids": set(eos_ids), "soft": soft, "check": check}
    begin = partial(SampleBatcher, model, **options)
    for group, max_rows in _groups(config, tasks, sampling.max_rows):
        done = _all_done(begin, [(task, j) for task in group for j in range(n)], max_rows)
        for task in group:
            results[task.index] = [done[task.index, j] for j in range(n)]
    return results


def _all_done(
    begin: Callable[[list[tuple[PromptTask, int]], int], SampleBatcher],
    todo: list[tuple[PromptTask, int]],
    max_rows: int,
) -> dict[tuple[int, int], Completion]:
    """These samples, by (prompt, number); where memory runs out, what is not done begins anew, half as many at a time."""
    done: dict[tuple[int, int], Completion] = {}
    while True:
        rows = begin(todo, max_rows)
        reason = out_of_memory(rows.finish)
        done |= rows.done
        if reason is None:
            return done
        todo = [(prompt, j) for prompt, j in todo if (prompt.index, j) not in done]
        max_rows = rows.live // 2
        del rows
        room = free_memory()
        if not max_rows:
            length = todo[0][0].length + todo[0][0].limit
            raise UserError(
                f"out of memory with a single completion, which may take {length:,} tokens with its prompt{room}. Set "
                "--sampling.max-new-tokens lower, leave out long prompts, or close other programs that use the card. "
                f"The device said: {reason}"
            )
        log(f"out of memory while sampling: what is not done begins anew, at most {max_rows} at a time (--sampling.max-rows)")  # fmt: skip


def _groups(config: PretrainedConfig, prompts: list[PromptTask], max_rows: int) -> list[tuple[list[PromptTask], int]]:
    """Which prompts may share forwards, and how many rows at a time.

    All of them, unless the model's RoPE changes with the longest position of a forward (longrope, dynamic): then what
    passes the original length goes one row at a time.
    """
    kind, original = rope_scaling(config)
    if kind is None:
        return [(prompts, max_rows)] if prompts else []
    short = [p for p in prompts if p.length + p.limit <= original]
    alone = [([p], 1) for p in prompts if p.length + p.limit > original]
    return [(short, max_rows), *alone] if short else alone
