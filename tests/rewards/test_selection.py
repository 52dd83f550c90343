"""The arithmetic of best-of-n against values worked by hand, all subsets, and the exact law of a small distribution."""

import itertools
import math
import random
from fractions import Fraction

import pytest

from lowalign.rewards.selection import best, distinct, expected_best, kl_bound, ranks, sizes, worst


def test_worked_by_hand():
    """Of 3, 1, 2: best of one is their mean; best of two is max of {1,2}, {1,3}, {2,3} = 2, 3, 3; best of three is 3."""
    assert expected_best([3, 1, 2], 1) == 2
    assert expected_best([3, 1, 2], 2) == pytest.approx(8 / 3, abs=1e-15)
    assert expected_best([3, 1, 2], 3) == 3


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_every_subset(n):
    rng = random.Random(n)
    scores = [rng.choice([-1.5, 0.0, 0.25, rng.gauss(0, 3)]) for _ in range(n)]
    for k in range(1, n + 1):
        maxima = [max(subset) for subset in itertools.combinations(scores, k)]
        assert expected_best(scores, k) == pytest.approx(sum(maxima) / len(maxima), abs=1e-12)


def test_unbiased():
    """The mean over all samples of 4 from {0, 1, 5} with probabilities 1/2, 1/3, 1/6 is the true mean of the best of k,
    Σ x (F(x)^k - F(x-)^k), which is computed in exact fractions."""
    law = {0: Fraction(1, 2), 1: Fraction(1, 3), 5: Fraction(1, 6)}
    for k in (1, 2, 3, 4):
        mean = sum(
            math.prod(law[x] for x in drawn) * Fraction(expected_best(drawn, k))
            for drawn in itertools.product(law, repeat=4)
        )
        below, true = Fraction(0), Fraction(0)
        for x, p in law.items():
            true += x * ((below + p) ** k - below**k)
            below += p
        assert float(mean) == pytest.approx(float(true), abs=1e-12)


def test_more_samples_than_there_are():
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"best-of-{k} cannot be estimated from 3 samples"):
            expected_best([1, 2, 3], k)


def test_kl_bound_equals_the_integral_over_the_law_of_the_best():
    """When all rewards differ, the best of k has the density k u^(k-1) over their quantiles u."""
    for k in (1, 2, 8, 64):
        steps = 200_000
        grid = ((i + 0.5) / steps for i in range(steps))
        integral = sum(k * u ** (k - 1) * (math.log(k) + (k - 1) * math.log(u)) for u in grid) / steps
        assert kl_bound(k) == pytest.approx(integral, abs=1e-4)


def test_best_worst_and_ranks():
    scores = [2.0, -1.0, 5.0, 5.0, -1.0]
    assert (best(scores), worst(scores), ranks(scores)) == (2, 1, [2, 3, 1, 1, 3])
    assert (best(scores, [0, 3]), worst(scores, [4, 3])) == (3, 4)
    assert (best(scores, []), worst(scores, [])) == (None, None)
    assert distinct(["a", "b", "a", "c", "b"], [1, 2, 3, 4]) == [1, 2, 3]
    assert [sizes(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]
