"""Best-of-n: of n samples of a prompt, take the one with the highest reward. No gradient, only arithmetic.

The mean reward of best-of-k, estimated without bias from n >= k samples with rewards r_(1) <= … <= r_(n): the mean of the
maximum over all subsets of k,

    E max = Σ_(i=k…n) C(i-1, k-1) / C(n, k) · r_(i)                     arXiv 2112.09332, appendix I

The divergence of best-of-k from the policy it samples from is at most

    KL = ln k - (k-1)/k                                                 arXiv 2009.01325, appendix G.3; 2401.01879
"""

import math
from collections.abc import Hashable, Iterable, Sequence


def best(scores: Sequence[float], among: Iterable[int] | None = None) -> int | None:
    """Index of the highest score, the first of equals; None where there is none. among: the indices to choose from."""
    return max(range(len(scores)) if among is None else among, key=lambda i: (scores[i], -i), default=None)


def worst(scores: Sequence[float], among: Iterable[int] | None = None) -> int | None:
    """Index of the lowest score, the first of equals; None where there is none. among: the indices to choose from."""
    return min(range(len(scores)) if among is None else among, key=lambda i: (scores[i], i), default=None)


def ranks(scores: Sequence[float]) -> list[int]:
    """For each score its rank: 1 for the highest, equals share one, the next lower score has the next number."""
    place = {score: i for i, score in enumerate(sorted(set(scores), reverse=True), 1)}
    return [place[score] for score in scores]


def distinct(items: Sequence[Hashable], among: Iterable[int]) -> list[int]:
    """Those of the indices that are the first with their item."""
    first: dict[Hashable, int] = {}
    for i in among:
        first.setdefault(items[i], i)
    return list(first.values())


def expected_best(scores: Sequence[float], k: int) -> float:
    """The unbiased estimate of the mean reward of best-of-k from these n >= k samples."""
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"best-of-{k} cannot be estimated from {n} samples")
    ordered = sorted(scores)
    return sum(math.comb(i, k - 1) * r for i, r in enumerate(ordered)) / math.comb(n, k)


def divergence(k: int) -> float:
    """The most that best-of-k diverges from the policy it samples from, in nats a completion."""
    return math.log(k) - (k - 1) / k


def sizes(n: int) -> list[int]:
    """1, 2, 4, … and n."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]
