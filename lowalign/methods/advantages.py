"""Advantages: from a value function (gae), or from the other samples of a prompt (group, rloo)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation: rewards (T,), values V(s_t) (T,) -> advantages (T,), returns A + V (T,).

    δ_t = r_t + γ V(s_t+1) - V(s_t), A_t = δ_t + γ λ A_t+1; after the last token V is 0. arXiv 1506.02438 eq. 16.
    """
    following = torch.cat([values[1:], values.new_zeros(1)])
    delta = (rewards + gamma * following - values).tolist()
    advantages = [0.0] * len(delta)
    after = 0.0
    for t in range(len(delta) - 1, -1, -1):
        advantages[t] = after = delta[t] + gamma * gae_lambda * after
    result = values.new_tensor(advantages)
    return result, result + values


def group(rewards: Tensor, std: bool = True) -> Tensor:
    """(r - mean) / std over the samples of one prompt: (n,) -> (n,). arXiv 2402.03300, 4.1.2; without std: 2503.20783."""
    centred = rewards - rewards.mean()
    return centred / (rewards.std() + 1e-4) if std and len(rewards) > 1 else centred


def rloo(rewards: Tensor) -> Tensor:
    """r_i minus the mean of the other samples of its prompt: (n,) -> (n,). arXiv 2402.14740 eq. 8."""
    n = len(rewards)
    return (rewards - rewards.mean()) * n / (n - 1)


def whiten(values: Sequence[Tensor]) -> list[Tensor]:
    """Normalise all tokens of all completions together to mean 0 and variance 1 (arXiv 2403.17031, detail 13)."""
    flat = torch.cat(list(values))
    if len(flat) < 2:
        return list(values)
    mean, std = flat.mean(), flat.std()
    return [(v - mean) / (std + 1e-8) for v in values]


class AdaptiveKL:
    """The coefficient of the KL penalty: fixed, or adapted so that the KL approaches a target.

    e = clip(KL/target - 1, -0.2, 0.2), β ← β (1 + e · samples/horizon). arXiv 1909.08593 section 2.2.
    """

    def __init__(self, beta: float, target: float | None, horizon: int) -> None:
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl: float, samples: int) -> None:
        """kl: mean KL of a round's completions, in nats. samples: number of completions."""
        if self.target is not None:
            self.beta *= 1 + min(0.2, max(-0.2, kl / self.target - 1)) * samples / self.horizon


class RunningMoments:
    """Mean and variance of all values so far, updated by batches (Chan et al. 1979)."""

    def __init__(self, count: float = 0.0, mean: float = 0.0, m2: float = 0.0) -> None:
        self.count, self.mean, self.m2 = count, mean, m2

    def update(self, values: Sequence[float]) -> None:
        """Add a batch."""
        n, mean = len(values), sum(values) / len(values)
        delta, total = mean - self.mean, self.count + n
        self.m2 += sum((v - mean) ** 2 for v in values) + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation of all values so far; 1 without values and while all are equal up to rounding."""
        spread = (self.m2 / self.count) ** 0.5 if self.count else 0.0
        return spread if spread > 1e-8 * abs(self.mean) else 1.0
