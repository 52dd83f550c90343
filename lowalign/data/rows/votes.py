"""Ranks from scores, a decision from several annotators' verdicts, and the annotators' agreement."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any, Literal


def ranks_of(scores: Sequence[float], gap: float) -> list[int]:
    """The rank of each score, 0 for the highest.

    Scores within `gap` of a rank's best share its rank, from the highest score down. So a larger gap never makes more
    ranks. Computed exactly on the decimal numbers: with a gap of 0.1, 0.4 and 0.3 tie.
    """
    exact = [Fraction(str(score)) for score in scores]
    ranks, rank, best = [0] * len(scores), 0, max(exact)
    for i in sorted(range(len(scores)), key=lambda i: -exact[i]):
        if best - exact[i] > Fraction(str(gap)):
            rank, best = rank + 1, exact[i]
        ranks[i] = rank
    return ranks


def decide(verdicts: Sequence[str], rule: Literal["majority", "weight"]) -> tuple[str, float]:
    """-> ("a", "b" or "tie", weight of the comparison).

    majority: the verdict given more often than any other, with weight 1. weight: the answer with more votes than the
    other, weighted by its lead / all votes. If there is none, a tie with weight 1.
    """
    votes = Counter(verdicts)
    a, b, total = votes["a"], votes["b"], len(verdicts)
    if rule == "weight":
        return ("a" if a > b else "b", abs(a - b) / total) if a != b else ("tie", 1.0)
    winners = [verdict for verdict, count in votes.items() if count == max(votes.values())]
    return (winners[0] if len(winners) == 1 else "tie"), 1.0


def agreement(pairs: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The annotators' agreement. pairs: for each pair of answers {annotator: verdict}.

    "agreement": the share of equal verdicts among all two verdicts on one pair. "alpha": Krippendorff's. Either is None
    if there is no pair with two verdicts; alpha also if all verdicts are the same.
    """
    equal = [x == y for verdicts in pairs for x, y in combinations(verdicts.values(), 2)]
    return {
        "pairs": len(pairs),
        "verdicts": sum(map(len, pairs)),
        "annotators": len({annotator for verdicts in pairs for annotator in verdicts}),
        "agreement": sum(equal) / len(equal) if equal else None,
        "alpha": alpha([list(verdicts.values()) for verdicts in pairs]),
    }


def alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha for nominal values with missing ones: 1 - D_observed / D_expected.

    units: for each judged item, its values. None if no unit has two values or all values are the same.
    Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), part C.
    """
    paired = [Counter(values) for values in units if len(values) > 1]
    totals = sum(paired, Counter())
    n = totals.total()
    unequal = lambda counts: counts.total() ** 2 - sum(k * k for k in counts.values())  # noqa: E731
    if not unequal(totals):
        return None
    observed = sum(unequal(counts) / (counts.total() - 1) for counts in paired)
    return 1 - (n - 1) * observed / unequal(totals)
