"""DPO and related losses: the policy learns directly from preferences, without a reward model.

h = [log π(y_w|x) - log π_ref(y_w|x)] - [log π(y_l|x) - log π_ref(y_l|x)]        r(x, y) = β log π/π_ref (y|x)
L = -1/N Σ log σ(β h)                                                            arXiv 2305.18290 eq. 7
The other losses, with the same h or without a reference, are in lowalign.methods.losses.

Both completions of a prompt (or all K of a ranking) share one forward, in which the prompt is computed once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowalign.data.pack import Example
from lowalign.methods.fixed_data import ReferenceMethod, by_source, completions_of
from lowalign.methods.losses import PAIR_LOSSES, PairLoss
from lowalign.methods.pairs import Pairs, all_pairs, count, rankings_by_source


class DPO(ReferenceMethod):
    """The method of `lowalign dpo`.

    Log-probs of the reference that an Example does not bring (Example.reference) are computed in each step, in the
    policy's packs.
    """

    @property
    def pair_loss(self) -> PairLoss:
        """The entry for --dpo.loss."""
        return PAIR_LOSSES[self.config.loss]

    @property
    def needs_reference(self) -> bool:
        """Whether the loss uses log-probs of the reference."""
        return not self.pair_loss.reference_free

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Rankings and pairs of the step, and rankings of each source in it where there are several."""
        return count(examples) | rankings_by_source(examples)

    def loss(self, examples: Sequence[Example], normalizers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch, as its share of the step's."""
        ref = self.reference_logps(examples) if self.needs_reference else None
        logp = self.policy_logps(examples)
        length = torch.tensor([max(1, sum(e.mask(i))) for e in examples for i in range(len(e.completions))])
        length = length.to(logp.device)
        pairs = all_pairs(examples, logp.device)
        w, l = pairs.better, pairs.worse  # noqa: E741  y_w and y_l of the papers
        per_token = length if self.pair_loss.per_token else 1
        score = (logp if ref is None else logp - ref) / per_token
        reward = self.config.beta * (score if ref is None else logp - ref)
        nll = best_weights(examples, logp.device) * -logp / length
        loss = self._sum(score, pairs, nll) / normalizers["rankings"]
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
        if self.sft:
            metrics["nll"] = nll.detach().sum() / normalizers["rankings"]
        for name, places in by_source(examples).items():
            own = completions_of(examples, places)
            of_source = self._sum(
                score[own].detach(), all_pairs([examples[i] for i in places], logp.device), nll[own].detach()
            )
            metrics[f"loss/{name}"] = of_source / normalizers[f"rankings/{name}"]
        return loss, metrics

    @property
    def sft(self) -> float:
        """Weight of the best completions' own loss."""
        return self.config.sft or self.pair_loss.sft

    def _sum(self, score: Tensor, pairs: Pairs, nll: Tensor) -> Tensor:
        """The losses of these rankings, added up. score, nll (C,): of each completion; nll is 0 but for the best."""
        summed = (pairs.weight * self.pair_loss.loss(score[pairs.better], score[pairs.worse], self.config)).sum()
        return summed + self.sft * nll.sum() if self.sft else summed


def best_weights(examples: Sequence[Example], device: torch.device) -> Tensor:
    """(C,): each Example's weight on its best completion (divided equally among several), 0 on the others.

    0 on all where all tie: none is chosen, and such an Example is not among the rankings that the loss is divided by.
    """
    weights = []
    for e in examples:
        best = [rank == min(e.rank) for rank in e.rank]
        weight = 0.0 if all(best) else e.weight
        weights += [weight * b / sum(best) for b in best]
    return torch.tensor(weights, device=device)
