"""KTO: learn from single completions with a thumbs-up or thumbs-down label (arXiv 2402.01306).

r = log π(y|x) - log π_ref(y|x)        z0 = max(0, mean over the step of log π(y'|x) - log π_ref(y'|x)), y' another prompt's
L = mean of  λ_D (1 - σ(β (r - z0)))  for thumbs up,  λ_U (1 - σ(β (z0 - r)))  for thumbs down                (eq. 8)

z0 is one constant for the whole step, without gradient; it is passed with the step's normalizers.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lowalign import processes
from lowalign.data.examples import as_examples
from lowalign.data.micro_batches import in_micro_batches, own_share
from lowalign.data.pack import Example
from lowalign.methods import losses
from lowalign.methods.fixed_data import ReferenceMethod, by_source, completions_of


class KTO(ReferenceMethod):
    """The method of `lowalign dpo --dpo.loss kto`. The best completions of a ranking are thumbs up, the others down."""

    needs_reference = True

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row: the base has the positions and the memory for it, maybe not for more."""
        return int(as_examples(self.examples).fact("longest").max())

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Completions of the step, those with thumbs up and down, their total weight, that of each source in it where there
        are several, and z0."""
        up = labels(examples)
        weight = lambda own: sum(e.weight * len(e.completions) for e in own)  # noqa: E731
        sources = by_source(examples).items()
        of_sources = {f"weight/{name}": weight([examples[i] for i in places]) for name, places in sources}
        counts = {"completions": len(up), "up": sum(up) or 1, "down": len(up) - sum(up) or 1}
        return counts | {"weight": weight(examples), **of_sources, "z0": self.z0(examples)}

    @torch.no_grad()
    def z0(self, examples: Sequence[Example]) -> float:
        """Estimate of KL(π ‖ π_ref), at least 0: the mean log-ratio of completions paired with other prompts."""
        log_ratios: list[float] = []

        def compute(micro_batch: list[Example]) -> None:
            log_ratios.append((self.policy_logps(micro_batch) - self.reference_logps(micro_batch)).sum().item())

        unrelated = mismatched(examples, max(self.longest, longest_row(examples)))
        in_micro_batches(own_share(unrelated), self.token_budget, compute)
        total = sum(processes.gather(sum(log_ratios)))
        return max(0.0, total / sum(len(e.completions) for e in examples))

    def loss(self, examples: Sequence[Example], normalizers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch, as its share of the step's."""
        c = self.config
        ref = self.reference_logps(examples)
        ratio = self.policy_logps(examples) - ref
        up = torch.tensor(labels(examples), device=ratio.device)
        weight = torch.tensor([e.weight for e in examples for _ in e.completions], device=ratio.device)
        weight = weight * torch.where(up, c.desirable, c.undesirable)
        each = weight * losses.kto(ratio, up, normalizers["z0"], c.beta)
        loss = each.sum() / normalizers["weight"]
        reward = c.beta * ratio.detach()
        chosen, rejected = reward[up].sum() / normalizers["up"], reward[~up].sum() / normalizers["down"]
        metrics = {
            "loss": loss.detach(),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "kl": normalizers["z0"] * len(ratio) / normalizers["completions"],
        }
        for name, places in by_source(examples).items():
            own = each.detach()[completions_of(examples, places)]
            metrics[f"loss/{name}"] = own.sum() / normalizers[f"weight/{name}"]
        return loss, metrics


def labels(examples: Sequence[Example]) -> list[bool]:
    """Thumbs up (True) or down of every completion. In a ranking the best are up, the others down."""
    return [
        rank == min(e.rank) if e.label is None else e.label
        for e in examples
        for rank in (e.rank or [0] * len(e.completions))
    ]


def longest_row(examples: Sequence[Example]) -> int:
    """Tokens of the longest prompt with one of its completions."""
    return max(len(e.prompt) + max(map(len, e.completions)) for e in examples)


def mismatched(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Each prompt with all completions of the next Example, which are unrelated to it.

    All of them: the chosen completions alone would make z0 too large. A prompt that exceeds `max_length` with them is cut
    from the left, except its first token, which may be bos. max_length: at least longest_row(examples).
    """
    others = [*examples[1:], examples[0]]
    return [
        Example(_shortened(e.prompt, max_length - max(map(len, o.completions))), o.completions, o.masks)
        for e, o in zip(examples, others, strict=True)
    ]


def _shortened(prompt: list[int], count: int) -> list[int]:
    """At most `count` tokens of the prompt: the first and the last ones."""
    return prompt if len(prompt) <= count else [*prompt[: min(1, count)], *prompt[len(prompt) - max(0, count - 1) :]]
