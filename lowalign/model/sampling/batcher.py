"""Sampling in one batch: a prompt is computed once, finished samples leave, waiting ones take their place."""

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowalign.config.sections import Sampling
from lowalign.errors import UserError
from lowalign.log import BAR_DELAY, progress
from lowalign.model.attention.device import compute_device
from lowalign.model.attention.interface import ATTN_IMPLEMENTATION, no_mask
from lowalign.model.attention.sampler_cache import SamplerCache
from lowalign.model.attention.sampler_layout import PromptBatch, TokenBatch
from lowalign.model.attention.soft_prompt import NO_SOFT_PROMPT, SoftPrompt
from lowalign.model.sampling.draw import draw_tokens, uniforms

PREFILL_TOKENS = 4096  # most prompt tokens in one forward, unless a single prompt is longer


@dataclass(frozen=True)
class SampledModel:
    """A causal language model to sample from. soft: stands before each prompt. check: called before each forward.
    on_token: called with each token that is drawn, to print an answer as it comes. stop: whether a completion ends after
    the tokens so far, as it does at an eos."""

    model: nn.Module
    eos_ids: Collection[int] = ()
    soft: SoftPrompt = NO_SOFT_PROMPT
    check: Callable[[], None] = lambda: None
    on_token: Callable[[int], None] = lambda _: None
    stop: Callable[[Sequence[int]], bool] = lambda _: False

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether a completion is finished with its last token."""
        return ids[-1] in self.eos_ids or self.stop(ids)

    @property
    def device(self) -> torch.device:
        """Of its embeddings."""
        return compute_device(self.model)


@dataclass
class Completion:
    """One completion. ids: its tokens, including a final eos. stopped: whether it ended by itself (SampledModel.ends), not at
    the length limit.

    logprobs (len(ids),) fp32 on the CPU: of each token under the whole distribution at the sampling temperature (at 1 when
    greedy), before top-k, top-p and min_new_tokens.
    """

    ids: list[int]
    logprobs: Tensor
    stopped: bool


@dataclass
class PromptTask:
    """A prompt to sample from. length: its keys, with the soft prompt. limit: most tokens of one of its completions."""

    index: int
    ids: list[int]
    length: int
    seed: int
    limit: int


@dataclass
class PartialCompletion:
    """A completion in progress. uniforms: a random number for each token it may get."""

    prompt: PromptTask
    number: int
    uniforms: list[float]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class SampleBatcher:
    """Samples that may share forwards: waiting, live (`rows`: row r in slot r of the cache) and done.

    waiting: pairs of a prompt and the number of a sample; the samples of a prompt are adjacent.
    """

    def __init__(
        self, sampled: SampledModel, sampling: Sampling, waiting: Sequence[tuple[PromptTask, int]], max_rows: int
    ) -> None:
        self.sampled, self.sampling, self.device = sampled, sampling, sampled.device
        self.waiting = deque(waiting)
        self.max_rows = min(max_rows, len(self.waiting))
        # A mask of four dimensions is handed down as it is. Without one transformers looks for packed rows in each forward, for
        # which the CPU waits for the card. The attention does not read it.
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        limits = [p.limit for p, _ in waiting]
        fitting = max(1, sampling.batch_tokens // min(limits))  # rows that `_admit` can let in at a time
        self.cache = SamplerCache(min(self.max_rows, fitting), max(limits), sampled.soft)
        self.rows: list[PartialCompletion] = []
        self.last_forward_rows = 0  # samples of the last forward, including those that only started with it
        self.first_logits: dict[int, Tensor] = {}  # prompt -> (V,) for its first token, until all its samples started
        self.not_started = Counter(prompt.index for prompt, _ in waiting)  # prompt -> samples
        self.cached_prompts: dict[int, PromptTask] = {}
        self.done: dict[tuple[int, int], Completion] = {}

    def finish(self) -> None:
        """Sample everything that waits into `done`, by (prompt, number)."""
        total = len(self.waiting)
        options = {"total": total, "unit": "completion", "desc": "sampling", "leave": False, "delay": BAR_DELAY}
        tokens = 0  # shown, because the completions of a batch are done late and nearly together
        with progress(total > 1, **options) as bar:  # a single completion is streamed by the caller
            while self.waiting or self.rows:
                new = self._admit()
                self._start(new)
                self._retire()
                tokens += len(new) + len(self.rows)
                if self.rows:
                    self._append(self.rows, self._next_logits())
                    self._retire()
                bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
                bar.update(len(self.done) - bar.n)

    def _admit(self) -> list[PartialCompletion]:
        """Take as many waiting samples as fit beside the live ones, at least one if none is live."""
        new: list[PartialCompletion] = []
        tokens = sum(p.length for p in self.cached_prompts.values()) + sum(row.prompt.limit for row in self.rows)
        while self.waiting and len(self.rows) + len(new) < self.max_rows:
            prompt, number = self.waiting[0]
            tokens += prompt.limit + (0 if prompt.index in self.cached_prompts else prompt.length)
            if tokens > self.sampling.batch_tokens and (self.rows or new):
                break
            self.waiting.popleft()
            self.cached_prompts[prompt.index] = prompt
            random = uniforms(self.sampling.seed, prompt.seed, number, prompt.limit)
            new.append(PartialCompletion(prompt, number, random))
        self.last_forward_rows = len(self.rows) + len(new)
        return new

    def _start(self, new: list[PartialCompletion]) -> None:
        """Draw the first tokens of new samples; a prompt is computed when its first sample starts."""
        batch: list[PromptTask] = []
        for prompt in {row.prompt.index: row.prompt for row in new}.values():
            if prompt.index in self.first_logits:
                continue
            if batch and sum(p.length for p in batch) + prompt.length > PREFILL_TOKENS:
                self._prefill(batch)
                batch = []
            batch.append(prompt)
        if batch:
            self._prefill(batch)
        if new:
            self._append(new, torch.stack([self.first_logits[row.prompt.index] for row in new]))
        for row in new:
            self.not_started[row.prompt.index] -= 1
            if not self.not_started[row.prompt.index]:
                del self.first_logits[row.prompt.index]
        self.rows += new

    def _prefill(self, prompts: list[PromptTask]) -> None:
        """One forward of whole prompts, end to end: stores keys and values, and the logits of the first tokens."""
        embed, prepend = self.sampled.model.get_input_embeddings(), self.sampled.soft.prepend
        words = [prepend(embed(torch.tensor(p.ids, dtype=torch.long, device=self.device))) for p in prompts]
        lengths, key_lengths = [len(w) for w in words], [p.length for p in prompts]
        self.cache.batch = PromptBatch([p.index for p in prompts], lengths, key_lengths, self.device)
        positions = [torch.arange(keys - length, keys) for length, keys in zip(lengths, key_lengths, strict=True)]
        ends = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        logits = self._forward(torch.cat(positions), inputs_embeds=torch.cat(words)[None], logits_to_keep=ends)
        if not self.cache.holds(prompts[0].index):
            raise RuntimeError(
                f'sampling needs the attention "{ATTN_IMPLEMENTATION}": model.set_attn_implementation(...)'
            )
        self.first_logits |= {p.index: row for p, row in zip(prompts, logits, strict=True)}

    def _next_logits(self) -> Tensor:
        """One forward of the last token of every live row: (rows, V)."""
        lengths, generated = [row.prompt.length for row in self.rows], [len(row.ids) - 1 for row in self.rows]
        self.cache.batch = TokenBatch([row.prompt.index for row in self.rows], lengths, generated, self.device)
        positions = torch.tensor(lengths) + torch.tensor(generated)
        last = torch.tensor([[row.ids[-1] for row in self.rows]], device=self.device)
        return self._forward(positions, input_ids=last)

    def _forward(self, positions: Tensor, **inputs: Tensor) -> Tensor:
        self.sampled.check()
        with no_mask():
            output = self.sampled.model(
                **inputs, position_ids=positions[None].to(self.device), attention_mask=self.mask, use_cache=False,
                sampler_cache=self.cache,
            )  # fmt: skip
        return output.logits[0]

    def _append(self, rows: list[PartialCompletion], logits: Tensor) -> None:
        """Draw one token for each row. logits (rows, V)."""
        sampling, eos_ids = self.sampling, list(self.sampled.eos_ids)
        random = torch.tensor([row.uniforms[len(row.ids)] for row in rows], device=self.device)
        banned = None
        too_short = [len(row.ids) < sampling.min_new_tokens for row in rows]
        if any(too_short) and eos_ids:
            banned = torch.zeros(logits.shape, dtype=torch.bool, device=self.device)
            banned[:, eos_ids] = torch.tensor(too_short, device=self.device)[:, None]
        tokens, logprobs = draw_tokens(logits, random, sampling.temperature, sampling.top_k, sampling.top_p, banned)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if not math.isfinite(logprob):
                raise UserError(
                    f"the model's logits for prompt {row.prompt.index} are not finite; the base or an adapter is broken, "
                    "or float16 overflowed (bfloat16 does not)"
                )
            row.ids.append(token)
            row.logprobs.append(logprob)
            self.sampled.on_token(token)

    def _retire(self) -> None:
        """Remove finished rows, close the gaps, free prompts that no sample needs."""
        stopped = [self.sampled.ends(row.ids) for row in self.rows]
        finished = [stop or len(row.ids) == row.prompt.limit for row, stop in zip(self.rows, stopped, strict=True)]
        for row, stop, end in zip(self.rows, stopped, finished, strict=True):
            if end:
                self.done[row.prompt.index, row.number] = Completion(row.ids, torch.tensor(row.logprobs), stop)
        sources, targets = moves([row.prompt.index for row in self.rows], finished)
        if sources:
            self.cache.move(sources, targets, max(len(self.rows[r].ids) for r in sources) - 1)
        rows = list(self.rows)
        for source, target in zip(sources, targets, strict=True):
            rows[target] = self.rows[source]
        self.rows = rows[: finished.count(False)]
        needed = {row.prompt.index for row in self.rows} | self.first_logits.keys()
        self.cached_prompts = {i: prompt for i, prompt in self.cached_prompts.items() if i in needed}
        self.cache.keep(needed)


def moves(prompts: Sequence[int], finished: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Rows to move, and the slots to move them to, so that the live ones fill the first slots and the rows of a prompt, which
    are side by side, stay so. A live row stays where it is if that slot belongs to its prompt afterwards."""
    rows: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        if not finished[row]:
            rows.setdefault(prompt, []).append(row)
    sources, targets, start = [], [], 0
    for own in rows.values():
        slots = range(start, start + len(own))
        sources += [row for row in own if row not in slots]
        targets += [slot for slot in slots if slot not in own]
        start = slots.stop
    return sources, targets
