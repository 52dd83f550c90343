"""The host: adapters on one base, and forwards and sampling under the active ones.

A checkpointed forward stores which adapters were active, and recomputes under these in the backward pass.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lowalign.config.sections import Sampling
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.adapters.adapters import Adapters
from lowalign.model.attention.soft_prompt import NO_SOFT_PROMPT, SoftPrompt
from lowalign.model.base.base import Base
from lowalign.model.base.tile_probe import tile_probe
from lowalign.model.dequantized import dequantized
from lowalign.model.forward import unpacked
from lowalign.model.forward.checkpointed import CheckpointedLayers, Checkpointing
from lowalign.model.forward.packed import TokenOutputs, TokenRequest, packed_scores, packed_states, packed_tokens
from lowalign.model.sampling.batcher import Completion, SampledModel
from lowalign.model.sampling.sample import sample_batched
from lowalign.model.vllm_backend import vllm_sample


class Host(Adapters):
    """A Base with adapters: add, load, save and delete them by name, choose the active ones, compute and sample."""

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.checkpointing = Checkpointing()
        self.layers = CheckpointedLayers(base.model, lambda: self.can_tile)
        self.check: Callable[[], None] = lambda: None
        """Interrupt hook between no-grad forwards; raise in it to abort."""

    def training(
        self, checkpointing: str | None, tile: int | None = None, keep_layers: int = 0, every: int = 1
    ) -> None:
        """Switch to train mode; None: to evaluation mode.

        checkpointing: "on" recomputes activations in the backward pass, "off" keeps them, "offload" recomputes them from
        layer inputs in CPU memory. tile: rows of more tokens are computed in tiles of this many, in both modes; 0: never;
        None: as before. keep_layers: the last layers, which keep their activations. every: the input of each N-th layer is
        kept.
        """
        model, before = self.base.model, self.checkpointing
        tile = before.tile if tile is None else tile
        self.checkpointing = Checkpointing(checkpointing or "off", tile, keep_layers, every)
        model.train(checkpointing is not None)
        if checkpointing in ("on", "offload"):
            _checkpoint(
                model, {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), self._restored()())}
            )
            self.layers.keep_last(keep_layers)
        else:
            _checkpoint(model, None)

    @functools.cached_property
    def can_tile(self) -> bool:
        """Whether rows can be computed in tiles, and layer inputs kept apart from other activations; if not, the log says why."""
        why_not = tile_probe(self.base.model.config) if self.base.packed else "it needs packed attention"
        if why_not:
            log(f"layers are not computed in tiles ({why_not}): ordinary checkpointing, which takes more memory")
        return not why_not

    # -- computing ----------------------------------------------------------------------------------------------------

    def logprobs(
        self, examples: Sequence[Example], supervised_only: bool = False, temperature: float = 1.0
    ) -> list[list[Tensor]]:
        """Log-probabilities under the active adapters: for each example, for each completion, (its length,) in fp32.

        The first token of a completion without a prompt has 0.0. supervised_only: compute no logits of unsupervised
        tokens; they have 0.0 too.
        """
        return self.tokens(examples, TokenRequest(supervised_only=supervised_only, temperature=temperature)).logps

    def tokens(self, examples: Sequence[Example], request: TokenRequest) -> TokenOutputs:
        """What is requested of the completion tokens under the active adapters, in one forward."""
        self._check_ids((e.source, e.prompt, *e.completions) for e in examples)
        compute = packed_tokens if self.base.packed else unpacked.row_tokens
        soft = self.soft_prompt()
        with self._activations():
            return compute(self.base.model, examples, soft, request)

    def scores(self, examples: Sequence[Example], name: str) -> list[Tensor]:
        """Scores under the active adapters: for each example (its completions,) in fp32.

        The scalar head of adapter `name` on the hidden state of each completion's last token. Raises UserError when the
        adapter has no head.
        """
        head = self.scalar_head(name)
        self._check_ids((e.source, e.prompt, *e.completions) for e in examples)
        compute = packed_scores if self.base.packed else unpacked.row_scores
        soft = self.soft_prompt()
        with self._activations():
            return compute(self.base.model, examples, soft, head)

    def states(self, examples: Sequence[Example]) -> list[Tensor]:
        """For each example (its supervised tokens, hidden): the last hidden states that predict them, under the active
        adapters."""
        self._check_ids((e.source, e.prompt, *e.completions) for e in examples)
        compute = packed_states if self.base.packed else unpacked.row_states
        soft = self.soft_prompt()
        with self._activations():
            return compute(self.base.model, examples, soft)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int = 1,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        on_token: Callable[[int], None] | None = None,
        stop: Callable[[Sequence[int]], bool] | None = None,
    ) -> list[list[Completion]]:
        """n completions of each prompt (token ids) under the active adapters; a prompt is computed once for its n.

        seeds: one per prompt. A sample depends only on sampling.seed, its prompt's seed and its number, not on the rest
        of the batch. on_token: called with each token as it is drawn. stop: whether a completion ends after the tokens so
        far, besides at an eos. When memory runs out, unfinished samples start again with half as many at a time.
        """
        self._check_ids(("", ids) for ids in prompts)
        hooks = {"on_token": on_token, "stop": stop}
        given = {name: hook for name, hook in hooks.items() if hook}
        sampled = SampledModel(self.base.model, self.base.eos_ids, self.soft_prompt(), self.check, **given)
        sampling = sampling or Sampling()
        if sampling.backend == "vllm":
            if given:
                raise UserError("vLLM tells of no single tokens, and takes no `stop`; use --sampling.backend lowalign")
            adapters = [self.adapters[name] for name in self.active]
            return vllm_sample(self.base, adapters, sampled, prompts, n, sampling, seeds)
        run = sample_batched if self.base.packed else unpacked.row_sample
        was_training = self.base.model.training
        self.base.model.eval()
        try:
            with dequantized(self.base.model, sampling.dequantize):
                return run(sampled, prompts, n, sampling, seeds)
        finally:
            self.base.model.train(was_training)

    def _check_ids(self, rows: Iterable[tuple]) -> None:
        """rows: (source, ids, ids, …). Raises UserError for an id without an embedding, which would end the process on a card."""
        known = self.base.model.get_input_embeddings().weight.shape[0]
        for source, *parts in rows:
            highest = max(max(ids, default=0) for ids in parts)
            if highest >= known:
                token = self.base.tokenizer.convert_ids_to_tokens(int(highest))
                raise UserError(
                    f"{source or 'a prompt'}: the token {token} ({highest}) has no embedding: the base has {known:,}. The tokenizer is "
                    "that of another model, or tokens were added to it alone: take the base's own, or resize the embeddings "
                    "(resize_token_embeddings) and save both"
                )

    def soft_prompt(self) -> SoftPrompt:
        """The active soft prompt, or NO_SOFT_PROMPT."""
        active = (self.adapters[name] for name in self.active)
        return next((adapter.soft_prompt() for adapter in active if adapter.soft), NO_SOFT_PROMPT)

    @contextlib.contextmanager
    def _activations(self) -> Iterator[None]:
        """The context in which a forward stores activations as `training` says."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.layers.computing(self.checkpointing, self._restored()))
            if self.checkpointing.mode == "offload" and not self.can_tile:
                pinned = self.base.device.type == "cuda"
                stack.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=pinned))
            yield

    def _restored(self) -> Callable[[], contextlib.AbstractContextManager]:
        """Makes contexts in which the adapters are active that are so now."""
        return functools.partial(self.use, *self.active)


def _checkpoint(model: nn.Module, options: dict | None) -> None:
    """Turn the recomputation of activations on or off. Its methods have two names in the versions of transformers 5."""
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if options is None:
        getattr(model, f"{prefix}_checkpointing_disable")()
    elif not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} cannot recompute activations; use --train.checkpointing off")
    else:
        getattr(model, f"{prefix}_checkpointing_enable")(**{f"{prefix}_checkpointing_kwargs": options})
        # Each call of it puts a hook on the embeddings that makes them leaves with a gradient: for reentrant checkpointing only.
        model.disable_input_require_grads()


def completion_logps(host: Host, examples: Sequence[Example]) -> Tensor:
    """(C,) for the C completions of all Examples in order: Σ_(t supervised) log π(y_t | x, y_<t) under the active adapters."""
    return torch.stack([logp.sum() for row in host.logprobs(examples, supervised_only=True) for logp in row])
