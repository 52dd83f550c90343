"""How well a policy or a reward run predicts held-out rows.

loss         -1/N Σ w_t log π(y_t | x, y_<t) over the supervised tokens, N = Σ w_t, their number unless turns have weights of
             their own; of preferences, of the best answers only
perplexity   exp(loss)
reward       of a policy: r(x, y) = β [log π(y|x) - log π_base(y|x)] (arXiv 2305.18290 eq. 5, without its constant), with the
             base without adapters as reference; of a reward run: its score
accuracy     share of the pairs of a better and a worse answer with r(better) > r(worse)
margin       mean of r(better) - r(worse)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowalign.data.micro_batches import in_micro_batches
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.log import progress
from lowalign.methods.pairs import compare
from lowalign.model.host import Host
from lowalign.model.policy import Stack

# For each example, for each completion, a number: a summed log-probability or a reward.
PerCompletion = Sequence[Sequence[float]]


@torch.no_grad()
def summed_logps(host: Host, stack: Stack, examples: Sequence[Example], token_budget: int) -> PerCompletion:
    """Σ w_t log π of the supervised tokens of each completion, under the adapters of the stack. Raises UserError when one is not
    finite."""
    sums: dict[int, list[float]] = {}
    with host.use(*stack), progress(total=len(examples), unit="row") as bar:

        def compute(batch: list[Example]) -> None:
            for example, logps in zip(batch, host.logprobs(batch, supervised_only=True), strict=True):
                sums[id(example)] = [_weighted_sum(example, i, logp) for i, logp in enumerate(logps)]
                if not all(map(math.isfinite, sums[id(example)])):
                    raise UserError(f"a log-probability of {example.source} is not finite; try --base.dtype float32")
            bar.update(len(batch))

        in_micro_batches(examples, token_budget, compute)
    return [sums[id(example)] for example in examples]


def _weighted_sum(example: Example, i: int, logp: Tensor) -> float:
    logp = logp.double()
    if example.token_weights is not None:
        logp = logp * torch.tensor(example.weights(i), dtype=logp.dtype, device=logp.device)
    return logp.sum().item()


def loss_figures(examples: Sequence[Example], logps: PerCompletion) -> dict[str, Any]:
    """loss, perplexity and the supervised tokens that they are about."""
    total, tokens, weight = 0.0, 0, 0.0
    for example, sums in zip(examples, logps, strict=True):
        for i, value in enumerate(sums):
            if example.rank is None or example.rank[i] == min(example.rank):
                total -= value
                tokens += sum(example.mask(i))
                weight += sum(example.weights(i))
    loss = total / (weight or 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": tokens}


def implicit_rewards(logps: PerCompletion, reference: PerCompletion, beta: float) -> PerCompletion:
    """The reward of each completion under a policy."""
    return [[beta * (p - r) for p, r in zip(*sums, strict=True)] for sums in zip(logps, reference, strict=True)]


def preference_figures(examples: Sequence[Example], rewards: PerCompletion) -> dict[str, Any]:
    """accuracy and margin over all pairs with a winner; nothing where there are none."""
    leads = [r[i] - r[j] for e, r in zip(examples, rewards, strict=True) if e.rank for i, j in compare(e.rank)[0]]
    if not leads:
        return {}
    count = len(leads)
    return {"accuracy": sum(lead > 0 for lead in leads) / count, "margin": sum(leads) / count, "pairs": count}
