"""The samples that are drawn together: a prompt is computed once, finished rows leave, waiting ones take their place."""

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowalign.config.sections import Sampling
from lowalign.errors import UserError
from lowalign.model.attention import packed as attention
from lowalign.model.attention.sampler_cache import SamplerCache
from lowalign.model.attention.sampler_layout import Prompts, Tokens
from lowalign.model.attention.soft_prompt import SoftPrompt
from lowalign.model.sampling.draw import pick, uniforms

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


@dataclass
class PromptTask:
    """length: keys that stand before its completions. limit: most tokens of one."""

    index: int
    ids: list[int]
    length: int
    seed: int
    limit: int


@dataclass
class Row:
    """One completion on its way."""

    prompt: PromptTask
    number: int
    uniforms: list[float]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class SampleBatcher:
    """Samples that may share forwards: what waits, what is live (row r in slot r of the rollout), what is done.

    waiting: prompts, each with the number of a sample; those of a prompt stand together. The other arguments are those of
    lowalign.model.sampling.sample.
    """

    def __init__(
        self,
        model: nn.Module,
        waiting: Sequence[tuple[PromptTask, int]],
        max_rows: int,
        sampling: Sampling,
        eos_ids: set[int],
        soft: SoftPrompt,
        check: Callable[[], None],
    ) -> None:
        self.model, self.sampling, self.eos_ids, self.soft, self.check = model, sampling, eos_ids, soft, check
        self.device = model.get_input_embeddings().weight.device
        self.waiting = deque(waiting)
        self.max_rows = min(max_rows, len(self.waiting))
        self.rollout = SamplerCache(self.max_rows, max(p.limit for p, _ in waiting), soft)
        self.rows: list[Row] = []
        self.live = 0  # how many the last forward was for, those that only began with it among them
        self.first: dict[int, Tensor] = {}  # (V,) logits of a prompt's first token, until all its samples have begun
        self.to_begin = Counter(prompt.index for prompt, _ in waiting)
        self.present: dict[int, PromptTask] = {}  # prompts whose keys are kept
        self.done: dict[tuple[int, int], Completion] = {}

    def finish(self) -> None:
        """Sample everything that waits into `done`, by (prompt, number)."""
        while self.waiting or self.rows:
            self._begin(self._admit())
            self._retire()
            if self.rows:
                self._draw(self.rows, self._next_logits())
                self._retire()

    def _admit(self) -> list[Row]:
        """Takes from what waits as many samples as fit beside the live ones, one at least."""
        new: list[Row] = []
        held = sum(p.length for p in self.present.values()) + sum(row.prompt.limit for row in self.rows)
        while self.waiting and len(self.rows) + len(new) < self.max_rows:
            prompt, number = self.waiting[0]
            held += prompt.limit + (0 if prompt.index in self.present else prompt.length)
            if held > self.sampling.batch_tokens and (self.rows or new):
                break
            self.waiting.popleft()
            self.present[prompt.index] = prompt
            new.append(Row(prompt, number, uniforms(self.sampling.seed, prompt.seed, number, prompt.limit)))
        self.live = len(self.rows) + len(new)
        return new

    def _begin(self, new: list[Row]) -> None:
        """Their first tokens; a prompt is computed when its first sample begins."""
        batch: list[PromptTask] = []
        for prompt in {row.prompt.index: row.prompt for row in new}.values():
            if prompt.index in self.first:
                continue
            if batch and sum(p.length for p in batch) + prompt.length > PREFILL_TOKENS:
                self._compute(batch)
                batch = []
            batch.append(prompt)
        if batch:
            self._compute(batch)
        if new:
            self._draw(new, torch.stack([self.first[row.prompt.index] for row in new]))
        for row in new:
            self.to_begin[row.prompt.index] -= 1
            if not self.to_begin[row.prompt.index]:
                del self.first[row.prompt.index]
        self.rows += new

    def _compute(self, prompts: list[PromptTask]) -> None:
        """One forward of whole prompts, end to end: their keys and values, and the logits of their first tokens."""
        embed = self.model.get_input_embeddings()
        words = [self.soft.prepend(embed(torch.tensor(p.ids, dtype=torch.long, device=self.device))) for p in prompts]
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
        self.check()
        with attention.no_mask():
            output = self.model(
                **inputs, position_ids=positions[None].to(self.device), use_cache=False, rollout=self.rollout
            )
        return output.logits[0]

    def _draw(self, rows: list[Row], logits: Tensor) -> None:
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
