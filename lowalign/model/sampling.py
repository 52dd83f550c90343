"""Sampling n completions per prompt: the prompt is computed once, finished rows leave, waiting ones take their place."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lowalign.config import Sampling
from lowalign.errors import UserError
from lowalign.model import attention
from lowalign.model.pick import pick, uniforms
from lowalign.model.rollout import KeysValues, Rollout
from lowalign.model.rollout_layout import Prompts, Tokens
from lowalign.model.rope import stretching

PREFILL_TOKENS = 4096  # prompt tokens in one forward, or one prompt


@dataclass
class Completion:
    """One completion. ids: its tokens, with the eos that ended it. stopped: whether one did, or else the length limit.

    logprobs (len(ids),) fp32 on the CPU: of each token under the whole distribution at the sampling temperature (at 1 when
    greedy), whatever top-k, top-p and min_new_tokens left of it.
    """

    ids: list[int]
    logprobs: Tensor
    stopped: bool


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    n: int,
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    virtual: Tensor | None = None,
    prefix: list[KeysValues] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[list[Completion]]:
    """n completions of each prompt (token ids), by a causal language model whose attention is attention.NAME.

    virtual (v, hidden): embeddings before each prompt. prefix: for each layer keys and values (1, kv_heads, v, head_dim)
    before each prompt. seeds: one per prompt, its place when left out; sample j of a prompt depends on (sampling.seed, its
    seed, j) alone. A completion ends at the model's last position at the latest.

    Raises UserError for a prompt without a token, one that fills the model's positions, and logits that are not finite.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    if n < 1 or len(seeds) != len(prompts):
        raise ValueError(
            f"n must be at least 1 and seeds one per prompt: n = {n}, {len(seeds)} seeds, {len(prompts)} prompts"
        )
    ahead = (0 if virtual is None else len(virtual)) + (0 if prefix is None else prefix[0][0].shape[2])
    config = model.config.get_text_config()
    # Dynamic RoPE goes on past the positions the config names.
    last = None if stretching(config)[0] == "dynamic" else getattr(config, "max_position_embeddings", None)
    positions = last or math.inf
    tasks = []
    for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
        length = ahead + len(ids)
        if not ids and virtual is None:
            raise UserError(f"prompt {i} is empty; give it at least one token (the bos token, say)")
        if length >= positions:
            raise UserError(f"prompt {i} takes {length} of the model's {positions} positions; shorten it")
        tasks.append(_Prompt(i, list(ids), length, seed, min(sampling.max_new_tokens, positions - length)))
    results: list[list[Completion]] = [[] for _ in prompts]
    for group, max_rows in _groups(config, tasks, sampling.max_rows):
        done = _Run(model, group, n, sampling, set(eos_ids), virtual, prefix, max_rows).finish()
        for task in group:
            results[task.index] = [done[task.index, j] for j in range(n)]
    return results


@dataclass
class _Prompt:
    """length: keys that stand before its completions. limit: most tokens of one."""

    index: int
    ids: list[int]
    length: int
    seed: int
    limit: int


@dataclass
class _Row:
    """One completion on its way."""

    prompt: _Prompt
    number: int
    uniforms: list[float]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class _Run:
    """Prompts that may share forwards: what waits, what is live (row r in slot r of the rollout), what is done."""

    def __init__(
        self,
        model: nn.Module,
        prompts: list[_Prompt],
        n: int,
        sampling: Sampling,
        eos_ids: set[int],
        virtual: Tensor | None,
        prefix: list[KeysValues] | None,
        max_rows: int,
    ) -> None:
        self.model, self.n, self.sampling, self.eos_ids, self.virtual = model, n, sampling, eos_ids, virtual
        self.device = model.get_input_embeddings().weight.device
        self.waiting = deque((prompt, j) for prompt in prompts for j in range(n))
        self.max_rows = min(max_rows, len(self.waiting))
        self.rollout = Rollout(self.max_rows, max(p.limit for p in prompts), prefix)
        self.rows: list[_Row] = []
        self.first: dict[int, Tensor] = {}  # (V,) logits of a prompt's first token, until all its samples have begun
        self.present: dict[int, _Prompt] = {}  # prompts whose keys are kept
        self.done: dict[tuple[int, int], Completion] = {}

    def finish(self) -> dict[tuple[int, int], Completion]:
        """Sample everything; by (prompt, number)."""
        while self.waiting or self.rows:
            self._begin(self._admit())
            self._retire()
            if self.rows:
                self._draw(self.rows, self._next_logits())
                self._retire()
        return self.done

    def _admit(self) -> list[_Row]:
        """Takes from what waits as many samples as fit beside the live ones, one at least."""
        new: list[_Row] = []
        held = sum(p.length for p in self.present.values()) + sum(row.prompt.limit for row in self.rows)
        while self.waiting and len(self.rows) + len(new) < self.max_rows:
            prompt, number = self.waiting[0]
            held += prompt.limit + (0 if prompt.index in self.present else prompt.length)
            if held > self.sampling.batch_tokens and (self.rows or new):
                break
            self.waiting.popleft()
            self.present[prompt.index] = prompt
            new.append(_Row(prompt, number, uniforms(self.sampling.seed, prompt.seed, number, prompt.limit)))
        return new

    def _begin(self, new: list[_Row]) -> None:
        """Their first tokens; a prompt is computed when its first sample begins."""
        batch: list[_Prompt] = []
        for prompt in [row.prompt for row in new if row.number == 0]:
            if batch and sum(p.length for p in batch) + prompt.length > PREFILL_TOKENS:
                self._compute(batch)
                batch = []
            batch.append(prompt)
        if batch:
            self._compute(batch)
        if new:
            self._draw(new, torch.stack([self.first[row.prompt.index] for row in new]))
        for row in new:
            if row.number == self.n - 1:
                del self.first[row.prompt.index]
        self.rows += new

    def _compute(self, prompts: list[_Prompt]) -> None:
        """One forward of whole prompts, end to end: their keys and values, and the logits of their first tokens."""
        embed = self.model.get_input_embeddings()
        words = [embed(torch.tensor(p.ids, dtype=torch.long, device=self.device)) for p in prompts]
        if self.virtual is not None:
            words = [torch.cat([self.virtual.to(w), w]) for w in words]
        lengths, spans = [len(w) for w in words], [p.length for p in prompts]
        self.rollout.now = Prompts([p.index for p in prompts], lengths, spans, self.device)
        positions = [torch.arange(span - length, span) for length, span in zip(lengths, spans, strict=True)]
        ends = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        logits = self._forward(torch.cat(positions), inputs_embeds=torch.cat(words)[None], logits_to_keep=ends)
        if not self.rollout.holds(prompts[0].index):
            raise RuntimeError(f'sampling needs the attention "{attention.NAME}": model.set_attn_implementation(...)')
        self.first |= {p.index: row for p, row in zip(prompts, logits, strict=True)}

    def _next_logits(self) -> Tensor:
        """One forward of the last token of every live row: (rows, V)."""
        lengths, ages = [row.prompt.length for row in self.rows], [len(row.ids) - 1 for row in self.rows]
        self.rollout.now = Tokens([row.prompt.index for row in self.rows], lengths, ages, self.device)
        positions = torch.tensor(lengths) + torch.tensor(ages)
        last = torch.tensor([[row.ids[-1] for row in self.rows]], device=self.device)
        return self._forward(positions, input_ids=last)

    def _forward(self, positions: Tensor, **inputs: Tensor) -> Tensor:
        with attention.no_mask():
            output = self.model(
                **inputs, position_ids=positions[None].to(self.device), use_cache=False, rollout=self.rollout
            )
        return output.logits[0]

    def _draw(self, rows: list[_Row], logits: Tensor) -> None:
        """Append one token to each row. logits (rows, V)."""
        how = self.sampling
        uniform = torch.tensor([row.uniforms[len(row.ids)] for row in rows], device=self.device)
        barred = None
        early = [len(row.ids) < how.min_new_tokens for row in rows]
        if any(early) and self.eos_ids:
            barred = torch.zeros(logits.shape, dtype=torch.bool, device=self.device)
            barred[:, list(self.eos_ids)] = torch.tensor(early, device=self.device)[:, None]
        tokens, logprobs = pick(logits, uniform, how.temperature, how.top_k, how.top_p, barred)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if not math.isfinite(logprob):
                raise UserError(
                    f"the model's logits for prompt {row.prompt.index} are not finite; the base or an adapter is broken, "
                    "or float16 overflowed (bfloat16 does not)"
                )
            row.ids.append(token)
            row.logprobs.append(logprob)

    def _retire(self) -> None:
        """Finished rows leave, the last live ones move into their slots, prompts without a sample to come are given up."""
        over = [row.ids[-1] in self.eos_ids or len(row.ids) == row.prompt.limit for row in self.rows]
        for row, ended in zip(self.rows, over, strict=True):
            if ended:
                completion = Completion(row.ids, torch.tensor(row.logprobs), row.ids[-1] in self.eos_ids)
                self.done[row.prompt.index, row.number] = completion
        live = over.count(False)
        holes = [r for r in range(live) if over[r]]
        movers = [r for r in range(live, len(over)) if not over[r]]
        if movers:
            self.rollout.move(movers, holes, max(len(self.rows[r].ids) for r in movers) - 1)
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[live:]
        kept = {row.prompt.index for row in self.rows} | self.first.keys()
        self.present = {i: prompt for i, prompt in self.present.items() if i in kept}
        self.rollout.keep(kept)


def _groups(config: PretrainedConfig, prompts: list[_Prompt], max_rows: int) -> list[tuple[list[_Prompt], int]]:
    """Which prompts may share forwards, and how many rows at a time.

    All of them, unless the model's RoPE changes with the longest position of a forward (longrope, dynamic): then what
    passes the original length goes one row at a time.
    """
    kind, original = stretching(config)
    if kind is None:
        return [(prompts, max_rows)] if prompts else []
    short = [p for p in prompts if p.length + p.limit <= original]
    alone = [([p], 1) for p in prompts if p.length + p.limit > original]
    return [(short, max_rows), *alone] if short else alone
