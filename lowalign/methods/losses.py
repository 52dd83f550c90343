"""Losses as pure functions of tensors, each with its equation and source.

Losses of pairs take and return (N,) tensors, one value per pair; the caller weights and sums them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from lowalign.config.training import DPOLossConfig


def negative_log_likelihood(logps: list[Tensor], weight: float) -> Tensor:
    """-1/weight Σ w_t log π(y_t | x, y_<t). logps: w_t log π, each (length,). weight: Σ w_t of the whole step, the number of
    supervised tokens where each weighs 1.

    Divided by the step's weight, not this micro-batch's, so that the sum over micro-batches is the step's mean.
    """
    return -sum(logp.sum() for logp in logps) / weight


# -- reward model ----------------------------------------------------------------------------------------------------


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log σ(r_w - r_l - m) of scores: (N,), (N,) -> (N,). arXiv 2203.02155 eq. 1; the margin: 2307.09288 eq. 2."""
    return -logsigmoid(chosen - rejected - margin)


def bradley_terry_tie(a: Tensor, b: Tensor) -> Tensor:
    """-½ log σ(r_a - r_b) - ½ log σ(r_b - r_a): a tie: each of the two wins half the time."""
    return -0.5 * (logsigmoid(a - b) + logsigmoid(b - a))


def plackett_luce(scores: Tensor, rank: Tensor, margin: float = 0.0) -> Tensor:
    """-Σ_i log( exp r_i / Σ_(j: rank_j ≥ rank_i) exp(r_j + m [rank_j > rank_i]) ) / log₂ K!: scores (K,), rank (K,) with
    the best lowest -> ().

    The likelihood of choosing the best, the second best, … in turn (Plackett 1975, doi 10.2307/2346567). Ties choose from
    the same set (Breslow). It is divided by the bits that the order tells, log₂ K! without ties: with equal scores every
    ranking has the loss of a pair, log 2. Otherwise a ranking of 8 would weigh as much as 15 pairs. With K = 2 it is the
    Bradley-Terry loss, with a tie too.
    """
    remaining, worse = rank[None, :] >= rank[:, None], rank[None, :] > rank[:, None]
    rivals = (scores[None, :] + margin * worse.to(scores.dtype)).masked_fill(~remaining, float("-inf")).logsumexp(-1)
    bits = remaining.sum(-1).to(scores.dtype).log2().sum().clamp(min=1)  # below 1 only for a single completion
    return (rivals - scores).sum() / bits


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_w + r_l)²: keeps the mean score of a pair near zero. arXiv 2312.09244 eq. 2."""
    return (chosen + rejected) ** 2


# -- DPO and related losses: h is the difference of two log-ratios, log π/π_ref (y_w) - log π/π_ref (y_l) ---------------------


def dpo(h: Tensor, beta: float, smoothing: float = 0.0, robust: bool = False) -> Tensor:
    """-log σ(β h) (arXiv 2305.18290 eq. 7).

    smoothing ε: -(1-ε) log σ(βh) - ε log σ(-βh) (cDPO); robust: [-(1-ε) log σ(βh) + ε log σ(-βh)] / (1-2ε), which is
    unbiased when a share ε < ½ of the preferences is the wrong way round (arXiv 2403.00409 eq. 12).
    """
    kept, flipped = -logsigmoid(beta * h), -logsigmoid(-beta * h)
    if robust:
        return ((1 - smoothing) * kept - smoothing * flipped) / (1 - 2 * smoothing)
    return (1 - smoothing) * kept + smoothing * flipped


def hinge(h: Tensor, beta: float) -> Tensor:
    """max(0, 1 - β h). SLiC-HF's rank calibration (arXiv 2305.10425) with DPO's reward."""
    return relu(1 - beta * h)


def ipo(h: Tensor, tau: float) -> Tensor:
    """(h - 1/(2τ))² (arXiv 2310.12036 eq. 17), with h of log-ratios averaged over a completion's tokens.

    The paper does not mention the average; its authors have confirmed it, because a sum grows with the length.
    """
    return (h - 1 / (2 * tau)) ** 2


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """-log σ(β (p_w - p_l) - γ), p a completion's log-prob averaged over its tokens. arXiv 2405.14734 eq. 6."""
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log σ(log odds_w - log odds_l), odds = P/(1-P), log P averaged over a completion's tokens. arXiv 2403.07691 eq. 7."""
    return -logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    # A probability of 1 has infinite odds, and NaN as its gradient: 1 - P is at least the rounding of 1.
    return logp - (-logp.expm1()).clamp(min=torch.finfo(logp.dtype).eps).log()


@dataclass(frozen=True)
class PairLoss:
    """One value of --dpo.loss.

    loss: (scores of the better completions (P,), of the worse (P,), options) -> (P,). The score of a completion is
    log π - log π_ref, or log π when reference_free; with per_token it is divided by the completion's supervised tokens.
    sft: weight of the best completions' own loss when --dpo.sft is 0.
    """

    loss: Callable[[Tensor, Tensor, DPOLossConfig], Tensor]
    reference_free: bool = False
    per_token: bool = False
    sft: float = 0.0


PAIR_LOSSES = {
    "sigmoid": PairLoss(lambda better, worse, c: dpo(better - worse, c.beta, c.label_smoothing, c.robust)),
    "hinge": PairLoss(lambda better, worse, c: hinge(better - worse, c.beta)),
    "ipo": PairLoss(lambda better, worse, c: ipo(better - worse, c.beta), per_token=True),
    "simpo": PairLoss(
        lambda better, worse, c: simpo(better, worse, c.beta, c.gamma), reference_free=True, per_token=True
    ),
    "orpo": PairLoss(
        lambda better, worse, c: c.beta * odds_ratio(better, worse), reference_free=True, per_token=True, sft=1.0
    ),
}
"""A new loss is a function above, an entry here, and its name in DPOLossConfig.loss."""


def kto(ratio: Tensor, label: Tensor, z0: Tensor | float, beta: float) -> Tensor:
    """1 - σ(β (r - z0)) of completions with thumbs up, 1 - σ(β (z0 - r)) of others; r = log π/π_ref. arXiv 2402.01306 eq. 8.

    ratio, label (bool): (N,) -> (N,). z0: estimate of KL(π ‖ π_ref), a constant of the step.
    """
    margin = beta * (ratio - z0)
    return 1 - margin.where(label, -margin).sigmoid()


# -- PPO: everything per token, (N,) -> (N,) --------------------------------------------------------------------------


def clipped_surrogate(
    logp: Tensor,
    old: Tensor,
    advantage: Tensor,
    clip: float,
    dual_clip: float = 0.0,
    clip_high: float | None = None,
) -> Tensor:
    """-min(ρ A, clip(ρ, 1-ε, 1+ε) A) with ρ = π/π_old. arXiv 1707.06347 eq. 7.

    clip_high: the ε of the upper bound, where it has its own (arXiv 2503.14476 section 3.1).
    dual_clip c > 1: where A < 0 the objective is at least c A, so that a huge ratio cannot dominate (arXiv 1912.09729
    eq. 5); 0 turns it off.
    """
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    if dual_clip:
        objective = torch.where(advantage < 0, torch.maximum(objective, dual_clip * advantage), objective)
    return -objective


def sequence_log_ratio(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    """Of each token the mean log-ratio of its completion, log s = 1/|y| Σ_t log π/π_old, with the gradient of its own:
    log sg[s] + log π - sg[log π] (GSPO-token, arXiv 2507.18071 section 4.3). Where all tokens of a completion have one advantage,
    the mean over them has the gradient of GSPO (section 4.1). lengths (C,): of the completions, in tokens."""
    own = log_ratio.detach()
    means = torch.stack([part.mean() for part in own.split(lengths.tolist())]) if len(lengths) else own
    return means.repeat_interleave(lengths) + (log_ratio - own)


def sequence_mean(values: Tensor, lengths: Tensor, completions: float) -> Tensor:
    """1/completions Σ_i 1/|y_i| Σ_t values. arXiv 2402.03300 eq. 3 (GRPO). lengths (C,): of these completions, in tokens.
    completions: their number in the whole step."""
    return (values / lengths.repeat_interleave(lengths)).sum() / completions


def clipped_value(value: Tensor, old: Tensor, target: Tensor, clip: float) -> Tensor:
    """½ max((V - R)², (clip(V, V_old ± ε) - R)²). arXiv 2005.12729 section 3, 2403.17031; clip 0: ½ (V - R)²."""
    error = (value - target) ** 2
    if clip:
        clipped = old + (value - old).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - target) ** 2)
    return 0.5 * error


def k3(logp: Tensor, reference: Tensor) -> Tensor:
    """π_ref/π - 1 - log π_ref/π: an estimate of KL(π ‖ π_ref) that is never negative; its gradient pulls π towards π_ref.

    joschu.net/blog/kl-approx; as a loss in arXiv 2402.03300 eq. 4.
    """
    log_ratio = reference - logp
    return log_ratio.exp() - 1 - log_ratio
