"""DPO and its kin: the policy learns straight from preferences, without a reward model.

h = [log π(y_w|x) - log π_ref(y_w|x)] - [log π(y_l|x) - log π_ref(y_l|x)]        r(x, y) = β log π/π_ref (y|x)
L = -1/N Σ log σ(β h)                                                            arXiv 2305.18290 eq. 7
and, with the same h or without a reference, the losses that lowalign.methods.losses names.

Both completions of a prompt (or all K of a ranking) go through the model together, the prompt once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowalign.config.sections import TrainConfig
from lowalign.config.training import DPOLossConfig
from lowalign.data.pack import Example
from lowalign.methods import losses
from lowalign.methods.fixed_data import FixedDataMethod
from lowalign.methods.pairs import all_pairs, count
from lowalign.model.host import Host, completion_logps

REFERENCE_FREE = ("simpo", "orpo")


class DPO(FixedDataMethod):
    """The method of `lowalign dpo`.

    reference: the stack of the reference. Log-probs of the reference that an Example does not bring (Example.reference)
    are computed in each step, in the policy's packs.
    """

    def __init__(
        self,
        host: Host,
        examples: Sequence[Example],
        stack: tuple[str, ...],
        reference: tuple[str, ...],
        config: DPOLossConfig,
        train: TrainConfig,
    ) -> None:
        super().__init__(host, examples, stack, train)
        self.reference, self.config = reference, config

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """What the means are over."""
        return count(examples)

    def loss(self, examples: Sequence[Example], normalizers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the step's loss."""
        free = self.config.loss in REFERENCE_FREE
        ref = None if free else reference_logps(self.host, self.reference, examples)
        with self.host.use(*self.stack):
            logp = completion_logps(self.host, examples)
        length = torch.tensor([max(1, sum(e.mask(i))) for e in examples for i in range(len(e.completions))])
        length = length.to(logp.device)
        pairs = all_pairs(examples, logp.device)
        w, l = pairs.better, pairs.worse  # noqa: E741  y_w and y_l of the papers
        c, reward = self.config, self._rewards(logp, ref, length)
        match c.loss:
            case "sigmoid":
                each = losses.dpo((logp - ref)[w] - (logp - ref)[l], c.beta, c.label_smoothing, c.robust)
            case "hinge":
                each = losses.hinge((logp - ref)[w] - (logp - ref)[l], c.beta)
            case "ipo":
                ratio = (logp - ref) / length
                each = losses.ipo(ratio[w] - ratio[l], c.beta)
            case "simpo":
                each = losses.simpo((logp / length)[w], (logp / length)[l], c.beta, c.gamma)
            case "orpo":
                each = c.beta * losses.odds_ratio((logp / length)[w], (logp / length)[l])
        summed = (pairs.weight * each).sum()
        sft = c.sft or (1.0 if c.loss == "orpo" else 0.0)
        nll = (best_weights(examples, logp.device) * -logp / length).sum()
        loss = (summed + sft * nll) / normalizers["rankings"] if sft else summed / normalizers["rankings"]
        mean = lambda values: values.detach().sum() / normalizers["pairs"]  # noqa: E731
        metrics = {
            "loss": loss.detach(),
            "logps/chosen": mean(logp[w]),
            "logps/rejected": mean(logp[l]),
            "rewards/chosen": mean(reward[w]),
            "rewards/rejected": mean(reward[l]),
            "rewards/margins": mean(reward[w] - reward[l]),
            "rewards/accuracies": mean((reward[w] > reward[l]).float()),
        }
        return loss, metrics | ({"nll": nll.detach() / normalizers["rankings"]} if sft else {})

    def _rewards(self, logp: Tensor, ref: Tensor | None, length: Tensor) -> Tensor:
        """The reward that the loss implies."""
        return self.config.beta * (logp / length if ref is None else logp - ref)


def reference_logps(host: Host, reference: tuple[str, ...], examples: Sequence[Example]) -> Tensor:
    """As completion_logps, under the reference and without gradient; known ones are taken from the Examples."""
    if all(e.reference is not None for e in examples):
        return torch.tensor([value for e in examples for value in e.reference], device=host.base.device)
    with torch.no_grad(), host.use(*reference):
        return completion_logps(host, examples)


def best_weights(examples: Sequence[Example], device: torch.device) -> Tensor:
    """(C,): the Example's weight on the best completion (shared out where several are), 0 on the others."""
    weights = []
    for e in examples:
        best = [rank == min(e.rank) for rank in e.rank]
        weights += [e.weight * b / sum(best) for b in best]
    return torch.tensor(weights, device=device)
