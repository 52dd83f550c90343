"""The host: adapters on one base, and what is computed under them.

A forward remembers the adapters it ran under, so a backward taken while others are active recomputes what it should.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lowalign.config.sections import Sampling
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.model.adapters.adapters import Adapters
from lowalign.model.attention.soft_prompt import NO_SOFT_PROMPT, SoftPrompt
from lowalign.model.base.base import Base
from lowalign.model.forward import unpacked
from lowalign.model.forward.packed import TokenOutputs, TokenRequest, packed_scores, packed_tokens
from lowalign.model.sampling.sample import Completion, sample


class Host(Adapters):
    """A Base with adapters. Add, load, save and delete adapters by name; use them in any mix; compute under them."""

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self._offload = False
        self.check: Callable[[], None] = lambda: None
        """Called between the forwards of what takes long without a gradient; it raises to leave it."""

    def training(self, checkpointing: str | None) -> None:
        """Train mode with activations recomputed ("on"), kept ("off") or recomputed from CPU memory ("offload").

        None: evaluation mode.
        """
        model = self.base.model
        self._offload = checkpointing == "offload"
        model.train(checkpointing is not None)
        if checkpointing in ("on", "offload"):
            restore = lambda: (contextlib.nullcontext(), self.use(*self.active))  # noqa: E731
            _checkpoint(model, {"use_reentrant": False, "context_fn": restore})
        else:
            _checkpoint(model, None)

    # -- computing ----------------------------------------------------------------------------------------------------

    def logprobs(
        self, examples: Sequence[Example], supervised_only: bool = False, temperature: float = 1.0
    ) -> list[list[Tensor]]:
        """Log-probabilities under the active adapters: for each example, for each completion, (its length,) in fp32.

        0.0 for a first token without a prompt; with supervised_only, 0.0 for unsupervised tokens too, whose logits are
        then never computed.
        """
        return self.tokens(examples, TokenRequest(supervised_only=supervised_only, temperature=temperature)).logps

    def tokens(self, examples: Sequence[Example], wanted: TokenRequest) -> TokenOutputs:
        """Log-probabilities, entropies and values of the completion tokens under the active adapters, in one forward."""
        soft_prompt = self.soft_prompt()
        compute = packed_tokens if self.base.packed else unpacked.row_tokens
        with self._activations():
            return compute(self.base.model, examples, soft_prompt, wanted)

    def scores(self, examples: Sequence[Example], name: str) -> list[Tensor]:
        """Scores under the active adapters: for each example (its completions,) in fp32.

        The scalar head of adapter `name` on the hidden state of each completion's last token. Raises UserError when the
        adapter has no head.
        """
        head = self.head(name)
        soft_prompt = self.soft_prompt()
        compute = packed_scores if self.base.packed else unpacked.row_scores
        with self._activations():
            return compute(self.base.model, examples, soft_prompt, head)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int = 1,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """n completions of each prompt (token ids) under the active adapters; a prompt is computed once for its n.

        seeds: one per prompt; a sample depends on (sampling.seed, its prompt's seed, its number) and on nothing else in
        the batch. Where memory runs out, what is not done begins anew, half as many at a time.
        """
        soft_prompt = self.soft_prompt()
        run = sample if self.base.packed else unpacked.row_sample
        was_training = self.base.model.training
        self.base.model.eval()
        try:
            return run(
                self.base.model, prompts, n, sampling or Sampling(),
                eos_ids=self.base.eos_ids, soft=soft_prompt, seeds=seeds, check=self.check,
            )  # fmt: skip
        finally:
            self.base.model.train(was_training)

    def soft_prompt(self) -> SoftPrompt:
        """The active soft prompt, or NO_SOFT_PROMPT."""
        return next(
            (self.adapters[name].soft_prompt() for name in self.active if self.adapters[name].soft), NO_SOFT_PROMPT
        )

    def _activations(self) -> contextlib.AbstractContextManager:
        """Where a forward keeps what its backward needs."""
        if not self._offload:
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.base.device.type == "cuda")


def _checkpoint(model: nn.Module, options: dict | None) -> None:
    """Switch the recomputation of activations on, or off; transformers renamed it on its way through version 5."""
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if options is None:
        getattr(model, f"{prefix}_checkpointing_disable")()
    elif not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} cannot recompute activations; use --train.checkpointing off")
    else:
        getattr(model, f"{prefix}_checkpointing_enable")(**{f"{prefix}_checkpointing_kwargs": options})


def completion_logps(host: Host, examples: Sequence[Example]) -> Tensor:
    """Σ_(t supervised) log π(y_t | x, y_<t) under the active adapters, of all completions of all Examples on end: (C,)."""
    return torch.stack([logp.sum() for row in host.logprobs(examples, supervised_only=True) for logp in row])
