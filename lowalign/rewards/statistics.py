"""How sure a comparison of policies is: win rate, sign test, length-controlled win rate and ratings. All in fp64.

M pairs of answers; the outcome x_m of a pair is 1 where the first answer is better, 0 where the second is, ½ for a tie. The
pairs of one prompt are not independent, so intervals resample prompts: a resample gives the pairs of prompt i the weight w_i
= how often i was drawn.

    win rate                   Σ w x / Σ w
    sign test                  2 P(X <= min(wins, losses)), X ~ Binomial(wins + losses, ½)
    length-controlled          σ(θ) of P(first is better) = σ(θ + φ tanh(Δ / s)), Δ = difference in length, s = its spread
    Bradley-Terry              P(i beats j) = σ(β_i - β_j)

The length-controlled win rate is that of AlpacaEval 2 (arXiv 2404.04475, eq. 2) without its term for the difficulty of the
instruction, which it estimates from the answers of many other models. Bradley-Terry is the same regression with one column
for each policy.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 1000
CONFIDENCE = 0.95
PRECISION = 0.01  # of the prior: a coefficient of 10 (a win rate of 99.995 %) is one standard deviation
STEPS, LONGEST_STEP, TOLERANCE = 100, 2.0, 1e-10  # of Newton's method
AT_A_TIME = 2**20  # numbers in one table of resamples x pairs
ELO = 400 / math.log(10)  # points for a unit of log-odds


@dataclass(frozen=True)
class Outcomes:
    """The judged pairs. outcome (M,): 1, ½ or 0. length (M,): that of the first answer minus that of the second. first,
    second (M,): index of their policies. prompt (M,): index of their prompt, of `prompts`."""

    outcome: Tensor
    length: Tensor
    first: Tensor
    second: Tensor
    prompt: Tensor
    prompts: int

    def between(self, i: int, j: int) -> "Outcomes":
        """Only the pairs of policies i and j."""
        return self._only((self.first == i) & (self.second == j))

    def _only(self, keep: Tensor) -> "Outcomes":
        columns = (self.outcome, self.length, self.first, self.second, self.prompt)
        return Outcomes(*(column[keep] for column in columns), self.prompts)

    @property
    def unit_weights(self) -> Tensor:
        """(1, M): every pair once."""
        return torch.ones(1, len(self.outcome), dtype=torch.float64)


@dataclass(frozen=True)
class Estimate:
    """A value and its bootstrap interval of CONFIDENCE (percentiles, arXiv 2403.04132 uses the same for ratings)."""

    value: float
    low: float
    high: float


def win_rate(pairs: Outcomes, weight: Tensor) -> Tensor:
    """weight (B, M) -> (B, 1)."""
    return (weight @ pairs.outcome / weight.sum(-1))[:, None]


def length_controlled(pairs: Outcomes, weight: Tensor) -> Tensor:
    """weight (B, M) -> (B, 1): the win rate at equal length."""
    spread = pairs.length.std(correction=0)
    relative = torch.tanh(pairs.length / spread) if spread > 0 else torch.zeros_like(pairs.length)
    columns = torch.stack([torch.ones_like(relative), relative], dim=1)
    return logistic(columns, pairs.outcome, weight)[:, :1].sigmoid()


def ratings(pairs: Outcomes, weight: Tensor, policies: int, precision: float = PRECISION) -> Tensor:
    """weight (B, M) -> (B, policies): Bradley-Terry in Elo points (400: odds of 10 to 1), 1000 on average."""
    matches, match = (pairs.first * policies + pairs.second).unique(return_inverse=True)
    none = torch.zeros(len(weight), len(matches), dtype=torch.float64)
    # Only the sums matter: how often i beat j, and j beat i; a tie is half of each.
    wins = none.index_add(1, match, weight * pairs.outcome)
    losses = none.index_add(1, match, weight * (1 - pairs.outcome))
    one_hot = torch.eye(policies, dtype=torch.float64)
    columns = one_hot[matches // policies] - one_hot[matches % policies]
    won = torch.ones(len(matches), dtype=torch.float64)
    y = torch.cat([won, 0 * won])
    strength = logistic(torch.cat([columns, columns]), y, torch.cat([wins, losses], dim=1), precision)
    return 1000 + ELO * (strength - strength.mean(-1, keepdim=True))


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p-value of so uneven a split, if both were as likely. Ties are left out; 1 where all tie."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def won_prompts(pairs: Outcomes) -> tuple[int, int]:
    """-> the prompts on which the first policy won more pairs than it lost, and those on which it lost more."""
    lead = torch.zeros(pairs.prompts, dtype=torch.float64).index_add(0, pairs.prompt, pairs.outcome - 0.5)
    return int((lead > 0).sum()), int((lead < 0).sum())


def logistic(x: Tensor, y: Tensor, weight: Tensor, precision: float = PRECISION) -> Tensor:
    """x (M, K), y (M,) in [0, 1], weight (B, M) -> (B, K): the maximum of Σ w [y log σ(xβ) + (1 - y) log σ(-xβ)] - precision
    |β|²/2 for each row of weights, by Newton's method.

    The prior keeps β finite where the pairs can be separated, as they are by a policy that wins all of them.
    """
    beta = torch.zeros(len(weight), x.shape[1], dtype=torch.float64)
    prior = precision * torch.eye(x.shape[1], dtype=torch.float64)
    for _ in range(STEPS):
        p = (beta @ x.T).sigmoid()
        gradient = (weight * (y - p)) @ x - precision * beta
        curvature = torch.einsum("bm,mk,ml->bkl", weight * p * (1 - p), x, x) + prior
        step = torch.linalg.solve(curvature, gradient)
        # A full step can overshoot far from the maximum, where the curvature is small.
        step = step * (LONGEST_STEP / step.abs().amax(-1, keepdim=True).clamp(min=LONGEST_STEP))
        beta = beta + step
        if step.abs().max() < TOLERANCE:
            break
    return beta


def estimates(pairs: Outcomes, statistic: Callable[[Outcomes, Tensor], Tensor], seed: int) -> list[Estimate]:
    """Of each number that `statistic` (pairs, weight (B, M)) -> (B, N) computes, its value and interval."""
    used, own = pairs.prompt.unique(return_inverse=True)
    counts = resamples(len(used), seed)
    at_a_time = max(1, AT_A_TIME // len(own))  # a column for each pair, of many resamples, would not fit in memory
    samples = torch.cat([statistic(pairs, part[:, own]) for part in counts.split(at_a_time)])
    tail = (1 - CONFIDENCE) / 2
    low, high = samples.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    value = statistic(pairs, pairs.unit_weights)[0]
    return [Estimate(*numbers) for numbers in zip(value.tolist(), low.tolist(), high.tolist(), strict=True)]


def resamples(prompts: int, seed: int) -> Tensor:
    """(RESAMPLES, prompts): how often each prompt is drawn, when as many are drawn with replacement."""
    draws = torch.randint(prompts, (RESAMPLES, prompts), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(RESAMPLES, prompts, dtype=torch.float64)
    return counts.scatter_add_(1, draws, torch.ones_like(counts))


def outcomes(rows: Sequence[tuple[float, float, int, int, int]], prompts: int) -> Outcomes:
    """From rows of (outcome, length, first, second, prompt)."""
    columns = [*zip(*rows, strict=True)]
    real = [torch.tensor(column, dtype=torch.float64) for column in columns[:2]]
    return Outcomes(*real, *map(torch.tensor, columns[2:]), prompts)
