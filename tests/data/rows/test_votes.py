"""Ranks of scores, decisions of several annotators, and their agreement."""

import random
from fractions import Fraction

import pytest

from lowalign.data.rows.votes import agreement, alpha, decide, ranks_of


@pytest.mark.parametrize(
    "scores, gap, ranks",
    [
        ([1, 3, 2], 0.0, [2, 0, 1]),
        ([1, 1, 2], 0.0, [1, 1, 0]),
        ([10, 9, 8, 7, 5], 1.0, [0, 0, 1, 1, 2]),  # 9 is within 1 of 10; 8 is not, though within 1 of 9
        ([0.4, 0.3], 0.1, [0, 0]),  # 0.4 - 0.3 > 0.1 in binary
        ([0.3, 0.2], 0.1, [0, 0]),
        ([-1e300, 1e300], 5.0, [1, 0]),
    ],
)
def test_ranks_of_scores(scores: list[float], gap: float, ranks: list[int]) -> None:
    assert ranks_of(scores, gap) == ranks


def test_ranks_respect_the_gap_whatever_the_scores() -> None:
    """No two of a rank are further apart than the gap, a higher score never ranks lower, ranks are 0, 1, 2, …"""
    rng = random.Random(0)
    for _ in range(200):
        scores, gap = [rng.randrange(30) / 10 for _ in range(rng.randrange(1, 9))], rng.randrange(8) / 10
        ranks = ranks_of(scores, gap)
        assert sorted(set(ranks)) == list(range(max(ranks) + 1))
        for a, rank_a in zip(scores, ranks, strict=True):
            for b, rank_b in zip(scores, ranks, strict=True):
                assert not (a > b and rank_a > rank_b)
                assert rank_a != rank_b or Fraction(str(a)) - Fraction(str(b)) <= Fraction(str(gap))


@pytest.mark.parametrize(
    "verdicts, majority, weight",
    [
        ("a", ("a", 1.0), ("a", 1.0)),
        ("aab", ("a", 1.0), ("a", 1 / 3)),
        ("abb", ("b", 1.0), ("b", 1 / 3)),
        ("ab", ("tie", 1.0), ("tie", 1.0)),
        ("attt", ("tie", 1.0), ("a", 1 / 4)),
        ("aat", ("a", 1.0), ("a", 2 / 3)),
        ("at", ("tie", 1.0), ("a", 1 / 2)),
        ("t", ("tie", 1.0), ("tie", 1.0)),
    ],
)
def test_decisions(verdicts: str, majority: tuple, weight: tuple) -> None:
    words = ["tie" if v == "t" else v for v in verdicts]
    assert decide(words, "majority") == majority
    assert decide(words, "weight") == weight


# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), parts A, B and C: each observer's values, "." where
# there is none, and the nominal alpha printed there.
PUBLISHED = [
    (["0100000010", "1110010000"], 0.095),
    (["aabbdcccedda", "babbbccceddd"], 0.692),
    (["123321412...", "1233224125.3", ".3332342251.", "12332441251."], 0.743),
]


@pytest.mark.parametrize("observers, published", PUBLISHED)
def test_alpha_of_the_published_examples(observers: list[str], published: float) -> None:
    units = [[value for value in unit if value != "."] for unit in zip(*observers, strict=True)]
    assert round(alpha(units), 3) == published


def test_alpha_where_there_is_nothing_to_compute() -> None:
    assert alpha([]) is None and alpha([["a"], ["b"]]) is None and alpha([["a", "a"]]) is None
    assert alpha([["a", "a"], ["b", "b"]]) == 1.0


def test_agreement_counts_every_two_verdicts_of_a_pair() -> None:
    figures = agreement([{"ann": "a", "bob": "a", "cec": "b"}, {"ann": "tie", "dan": "tie"}, {"bob": "a"}])
    assert (figures["pairs"], figures["verdicts"], figures["annotators"]) == (3, 6, 4)
    assert figures["agreement"] == (1 + 1) / (3 + 1)
    assert agreement([{"ann": "a"}]) == {"pairs": 1, "verdicts": 1, "annotators": 1, "agreement": None, "alpha": None}
