"""BitDelta's scale distillation: the delta learns to predict what the fine-tuned model predicts. arXiv 2402.10193 section 3

α* = argmin_α E_x D(Z_fine(x), Z_bin(x; α))                    eq. 5; the paper's D is ‖·‖² of logits, here it is the KL

Only log α is trained: a step is relative to the scale, and α stays positive. The fine-tuned model is not in memory: its
last hidden states were computed before, and the delta's LM head, which is the fine-tuned model's own, makes its logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowalign.config.sections import TrainConfig
from lowalign.data.micro_batches import in_micro_batches
from lowalign.data.pack import Example, total_supervised
from lowalign.methods.fixed_data import FixedDataMethod
from lowalign.model.forward.divergence import HeadKL
from lowalign.model.forward.logprob import LMHead, token_logprobs
from lowalign.model.host import Host
from lowalign.model.policy import Stack

Teacher = Callable[[Example], Tensor]  # -> the fine-tuned model's states as `Host.states` gives them, (n, hidden)


class BitDeltaDistillation(FixedDataMethod):
    """The method of `lowalign bitdelta distil`. The last adapter of the stack is the delta."""

    def __init__(
        self, host: Host, examples: Sequence[Example], stack: Stack, train: TrainConfig, teacher: Teacher
    ) -> None:
        super().__init__(host, examples, stack, train)
        self.teacher = teacher

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """The supervised tokens of the step."""
        return {"tokens": total_supervised(examples)}

    def loss(self, examples: Sequence[Example], normalizers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """KL(fine ‖ delta) of one micro-batch in nats a token, as its share of the step's."""
        with self.host.use(*self.stack):
            states = torch.cat(self.host.states(examples))
            target = torch.cat([self.teacher(e) for e in examples]).to(states)
            kl = HeadKL.apply(states, target, LMHead.of(self.host.base.model)).sum() / normalizers["tokens"]
        return kl, {"loss": kl.detach()}


@dataclass(frozen=True)
class Fidelity:
    """Means over `tokens` supervised tokens, in nats. kl: KL(fine ‖ delta). base, finetuned, delta: their losses."""

    tokens: int
    kl: float
    base: float
    finetuned: float
    delta: float


@torch.no_grad()
def fidelity(host: Host, delta: Stack, examples: Sequence[Example], teacher: Teacher, token_budget: int) -> Fidelity:
    """How close the delta is to the fine-tuned model, and what each of them and the base lose on the examples."""
    sums, tokens = torch.zeros(4, dtype=torch.float64), total_supervised(examples)

    def add(batch: list[Example]) -> None:
        labels = [t for e in batch for i, c in enumerate(e.completions) for t, m in zip(c, e.mask(i), strict=True) if m]
        y = torch.tensor(labels, device=host.base.device)
        head = LMHead.of(host.base.model)
        with host.use():
            base = token_logprobs(torch.cat(host.states(batch)), head, y)[0]
        with host.use(*delta):
            states = torch.cat(host.states(batch))
            target = torch.cat([teacher(e) for e in batch]).to(states)
            losses = [base, *(token_logprobs(h, head, y)[0] for h in (target, states))]
            sums.add_(
                torch.stack([HeadKL.apply(states, target, head).sum(), *(-x.sum() for x in losses)]).double().cpu()
            )

    host.training(None)
    in_micro_batches(examples, token_budget, add)
    return Fidelity(tokens, *(sums / tokens).tolist())
