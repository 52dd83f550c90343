"""The policy's term of the PPO loss with its metrics, and the means of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowalign.config.training import PPOConfig
from lowalign.methods import losses
from lowalign.methods.rollout import Rollout


@dataclass(frozen=True)
class StepMeans:
    """Means over a whole step, of values of the supervised tokens of one micro-batch: its shares add up to the step's mean.

    lengths (C,): supervised tokens of the micro-batch's completions that have some. tokens, completions: of the step.
    """

    config: PPOConfig
    lengths: Tensor
    tokens: float
    completions: float

    def over_tokens(self, values: Tensor) -> Tensor:
        """The mean over tokens: of metrics."""
        return values.sum() / self.tokens

    def of_loss(self, values: Tensor) -> Tensor:
        """The E of the loss, as --ppo.loss-mean says."""
        kind = self.config.ppo.loss_mean
        if kind == "sequence":
            return losses.sequence_mean(values, self.lengths, self.completions)
        if kind == "constant":
            return values.sum() / (self.completions * self.config.sampling.max_new_tokens)
        return self.over_tokens(values)


def supervised_lengths(rollouts: Sequence[Rollout]) -> list[int]:
    """The supervised tokens of each completion that has some."""
    lengths = [sum(r.mask(i)) for r in rollouts for i in range(len(r.completions))]
    return [length for length in lengths if length]


def policy_loss(logp: Tensor, old: Tensor, advantage: Tensor, means: StepMeans) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of supervised tokens, each (N,) -> its share of the step's, and metrics of the ratio."""
    c = means.config.ppo
    new, before = logp, old
    if c.ratio == "sequence":
        new, before = losses.sequence_log_ratio(logp - old, means.lengths), torch.zeros_like(old)
    surrogate = means.of_loss(losses.clipped_surrogate(new, before, advantage, c.clip, c.dual_clip, c.clip_high))
    with torch.no_grad():
        ratio = (new - before).exp()
        high = c.clip if c.clip_high is None else c.clip_high
        clipped = means.over_tokens(((ratio - 1 > high) | (1 - ratio > c.clip)).float())
        highest = torch.cat([ratio, ratio.new_zeros(1)]).max()  # a micro-batch may have no supervised token
    return surrogate, {"policy_loss": surrogate.detach(), "clipfrac": clipped, "ratio_max": highest}
