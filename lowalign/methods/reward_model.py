"""Reward model: an adapter with a scalar head learns to score completions as people rank them.

L = -1/N Σ_rankings 1/C(K,2) Σ_(y_w > y_l) log σ(r(x, y_w) - r(x, y_l) - m)            arXiv 2203.02155 eq. 1
  + c (r(x, y_w) + r(x, y_l))²                                                          arXiv 2312.09244 eq. 2

All K completions of a prompt share one forward, in which the prompt is computed once.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowalign.config.sections import TrainConfig
from lowalign.config.training import RewardLossConfig
from lowalign.data.pack import Example
from lowalign.methods import losses
from lowalign.methods.fixed_data import FixedDataMethod, by_source
from lowalign.methods.pairs import Pairs, all_pairs, compare, count, rankings_by_source
from lowalign.model.host import Host
from lowalign.model.policy import Stack


class RewardModel(FixedDataMethod):
    """The method of `lowalign reward`. The last adapter of the stack has the scalar head, which is trained with it.

    ties: a pair without a winner counts as half a win for each.
    """

    def __init__(
        self,
        host: Host,
        examples: Sequence[Example],
        stack: Stack,
        config: RewardLossConfig,
        train: TrainConfig,
        ties: bool = False,
    ) -> None:
        super().__init__(host, examples, stack, train)
        self.config, self.ties = config, ties

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Rankings, pairs and completions of the step, and rankings of each source in it where there are several."""
        completions = {"completions": sum(len(e.completions) for e in examples)}
        return count(examples, self.ties) | completions | rankings_by_source(examples, self.ties)

    def loss(self, examples: Sequence[Example], normalizers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch, as its share of the step's."""
        with self.host.use(*self.stack):
            r = self.host.scores(examples, self.stack[-1])
        flat = torch.cat(r)
        pairs = all_pairs(examples, flat.device, self.ties)
        loss = self._sum(examples, r, pairs) / normalizers["rankings"]
        d = (flat[pairs.better] - flat[pairs.worse]).detach()
        metrics = {
            "loss": loss.detach(),
            "rewards/accuracies": (d > 0).sum() / normalizers["pairs"],
            "rewards/margins": d.sum() / normalizers["pairs"],
            "rewards/mean": flat.detach().sum() / normalizers["completions"],
        }
        for name, places in by_source(examples).items():
            own = [examples[i] for i in places]
            of_source = self._sum(own, [r[i].detach() for i in places], all_pairs(own, flat.device, self.ties))
            metrics[f"loss/{name}"] = of_source / normalizers[f"rankings/{name}"]
        return loss, metrics

    def _sum(self, examples: Sequence[Example], r: Sequence[Tensor], pairs: Pairs) -> Tensor:
        """The losses of these rankings, added up. r: the scores of each, (K,)."""
        flat = torch.cat(list(r))
        r_w, r_l = flat[pairs.better], flat[pairs.worse]
        if self.config.loss == "plackett-luce":
            rank = lambda e: torch.tensor(e.rank, device=flat.device)  # noqa: E731
            each = zip(examples, r, strict=True)
            per_ranking = [e.weight * losses.plackett_luce(s, rank(e), e.margin) for e, s in each]
            summed = torch.stack(per_ranking).sum()
        else:
            summed = (pairs.weight * losses.bradley_terry(r_w, r_l, pairs.margin)).sum()
            tie = losses.bradley_terry_tie(flat[pairs.tied_a], flat[pairs.tied_b])
            summed = summed + (pairs.tied_weight * tie).sum()
        if self.config.centring:
            summed = summed + self.config.centring * (pairs.weight * losses.centring(r_w, r_l)).sum()
        return summed


def scored(example: Example) -> Example:
    """The Example with each completion cut after its last supervised token, where its score is read."""
    completions = []
    for i, completion in enumerate(example.completions):
        last = max((t for t, supervised in enumerate(example.mask(i)) if supervised), default=len(completion) - 1)
        completions.append(completion[: last + 1])
    return replace(example, completions=completions, masks=None, token_weights=None)


def reward_metrics(scores: Sequence[Tensor], examples: Sequence[Example]) -> dict[str, float]:
    """Metrics of scores on rankings: mean and std of all scores; accuracy and calibration error of the pairs, if any.

    scores: (K,) for each Example. calibration_error: difference between the model's confidence σ(|r_w - r_l|) and the
    share of correct pairs, averaged over the pairs in ten bins of equal width (arXiv 1706.04599 eq. 3).
    """
    flat = torch.cat(list(scores)).double().cpu()
    leads = [float(s[i] - s[j]) for s, e in zip(scores, examples, strict=True) if e.rank for i, j in compare(e.rank)[0]]
    metrics = {"mean": flat.mean().item(), "std": flat.std(correction=0).item(), "completions": len(flat)}
    if not leads:
        return metrics
    d = torch.tensor(leads, dtype=torch.float64)
    right, confidence = (d > 0).double(), d.abs().sigmoid()
    bins = (confidence * 10).long().clamp(max=9)
    error = sum(abs((confidence[bins == b] - right[bins == b]).sum().item()) for b in bins.unique().tolist())
    return metrics | {"pairs": len(leads), "accuracy": right.mean().item(), "calibration_error": error / len(leads)}
