"""Sampling n completions per prompt, as many at a time as fit."""

import math
from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from lowalign.config.sections import Sampling
from lowalign.data.micro_batches import free_memory, out_of_memory
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.attention.rope import last_position, rope_scaling
from lowalign.model.sampling.batcher import Completion, PromptTask, SampleBatcher, SampledModel


@torch.no_grad()
def sample_batched(
    sampled: SampledModel,
    prompts: Sequence[Sequence[int]],
    n: int,
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
) -> list[list[Completion]]:
    """n completions of each prompt (token ids), by a model whose attention is interface.ATTN_IMPLEMENTATION.

    seeds: one per prompt; default: its index. Sample j of a prompt depends on (sampling.seed, its seed, j) alone. A
    completion ends at the model's last position at the latest.

    When memory runs out, unfinished samples start again, half as many at a time. Raises UserError when a single one does
    not fit, for an empty prompt, for one that fills the model's positions, and for logits that are not finite.
    """
    tasks = prompt_tasks(sampled, prompts, n, sampling, seeds)
    results: list[list[Completion]] = [[] for _ in prompts]
    for group, max_rows in _groups(sampled.model.config.get_text_config(), tasks, sampling.max_rows):
        done = _sample_group(sampled, sampling, [(task, j) for task in group for j in range(n)], max_rows)
        for task in group:
            results[task.index] = [done[task.index, j] for j in range(n)]
    return results


def prompt_tasks(
    sampled: SampledModel, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seeds: Sequence[int] | None
) -> list[PromptTask]:
    """The prompts with their seeds and limits. Raises ValueError and UserError for arguments that `sample_batched` refuses."""
    seeds = range(len(prompts)) if seeds is None else seeds
    if n < 1 or len(seeds) != len(prompts):
        raise ValueError(
            f"n must be at least 1 and seeds one per prompt: n = {n}, {len(seeds)} seeds, {len(prompts)} prompts"
        )
    config = sampled.model.config.get_text_config()
    positions = last_position(config) or math.inf
    tasks = []
    for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
        length = sampled.soft.length + len(ids)
        if not ids and not sampled.soft.virtual_tokens:
            raise UserError(f"prompt {i} is empty; give it at least one token (the bos token, say)")
        if length >= positions:
            raise UserError(f"prompt {i} takes {length} of the model's {positions} positions; shorten it")
        tasks.append(PromptTask(i, list(ids), length, seed, min(sampling.max_new_tokens, positions - length)))
    return tasks


def _sample_group(
    sampled: SampledModel, sampling: Sampling, waiting: list[tuple[PromptTask, int]], max_rows: int
) -> dict[tuple[int, int], Completion]:
    """The samples by (prompt, number); when memory runs out, unfinished ones start again, half as many at a time."""
    done: dict[tuple[int, int], Completion] = {}
    while True:
        batcher = SampleBatcher(sampled, sampling, waiting, max_rows)
        reason = out_of_memory(batcher.finish)
        done |= batcher.done
        if reason is None:
            return done
        waiting = [(prompt, j) for prompt, j in waiting if (prompt.index, j) not in done]
        max_rows = batcher.last_forward_rows // 2
        del batcher  # its keys and values
        free = free_memory()
        if not max_rows:
            length = waiting[0][0].length + waiting[0][0].limit
            raise UserError(
                f"out of memory with a single completion, which may take {length:,} tokens with its prompt{free}. Set "
                "--sampling.max-new-tokens lower, leave out long prompts, or close other programs that use the card. "
                f"The device said: {reason}"
            )
        log(f"out of memory while sampling: unfinished samples start again, at most {max_rows} at a time (--sampling.max-rows)")  # fmt: skip


def _groups(config: PretrainedConfig, prompts: list[PromptTask], max_rows: int) -> list[tuple[list[PromptTask], int]]:
    """Which prompts may share forwards, and how many rows at a time.

    All of them, unless the model's RoPE changes with the longest position of a forward (longrope, dynamic): then samples
    that may pass the original length are drawn one row at a time.
    """
    kind, original = rope_scaling(config)
    if kind is None:
        return [(prompts, max_rows)] if prompts else []
    short = [p for p in prompts if p.length + p.limit <= original]
    alone = [([p], 1) for p in prompts if p.length + p.limit > original]
    return [(short, max_rows), *alone] if short else alone
