"""The pairs in rankings: A > B > C > D is six of them, laid out flat for a whole batch at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowalign.data.pack import Example


@dataclass(frozen=True)
class Pairs:
    """All pairs of a batch; indices count the completions of all its Examples on end.

    better, worse (P,): who is preferred to whom. weight (P,): every ranking counts its Example's weight, shared out among
    its pairs: the 1/C(K,2) of InstructGPT (arXiv 2203.02155 eq. 1). margin (P,). tied_a, tied_b, tied_weight (Q,): the
    pairs without a winner.
    """

    better: Tensor
    worse: Tensor
    weight: Tensor
    margin: Tensor
    tied_a: Tensor
    tied_b: Tensor
    tied_weight: Tensor


def all_pairs(examples: Sequence[Example], device: torch.device, ties: bool = False) -> Pairs:
    """The pairs of a batch of rankings. ties: those without a winner count too."""
    ordered: list[tuple[int, int, float, float]] = []
    tied: list[tuple[int, int, float]] = []
    at = 0
    for e in examples:
        wins, draws = compare(e.rank)
        draws = draws if ties else []
        share = e.weight / max(1, len(wins) + len(draws))
        ordered += [(at + i, at + j, share, e.margin) for i, j in wins]
        tied += [(at + i, at + j, share) for i, j in draws]
        at += len(e.completions)
    columns = [*zip(*ordered, strict=True)] or [()] * 4
    drawn = [*zip(*tied, strict=True)] or [()] * 3
    index = lambda values: torch.tensor(values, dtype=torch.long, device=device)  # noqa: E731
    real = lambda values: torch.tensor(values, dtype=torch.float32, device=device)  # noqa: E731
    return Pairs(
        *map(index, columns[:2]), *map(real, columns[2:]), *map(index, drawn[:2]), real(drawn[2])
    )  # fmt: skip


def compare(rank: Sequence[float]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(better, worse) for each pair with a winner, and the pairs without one; the best has the lowest rank."""
    order = range(len(rank))
    wins = [(i, j) for i in order for j in order if rank[i] < rank[j]]
    draws = [(i, j) for i in order for j in order if i < j and rank[i] == rank[j]]
    return wins, draws


def count(examples: Sequence[Example], ties: bool = False) -> dict[str, float]:
    """What means are over: "rankings", the weight of those that have a pair, and "pairs", the number with a winner."""
    rankings, pairs = 0.0, 0
    for e in examples:
        wins, draws = compare(e.rank)
        rankings += e.weight if wins or (ties and draws) else 0.0
        pairs += len(wins)
    return {"rankings": rankings or 1.0, "pairs": pairs or 1}
