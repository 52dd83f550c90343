"""The pairs of rankings, as flat tensors for a whole batch. A > B > C > D has six pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowalign.data.pack import Example
from lowalign.methods.fixed_data import by_source


@dataclass(frozen=True)
class Pairs:
    """All pairs of a batch. Indices count the completions of all Examples in order.

    better, worse (P,): indices of the preferred and the other completion. weight (P,): the Example's weight divided by its
    number of pairs, the 1/C(K,2) of InstructGPT (arXiv 2203.02155 eq. 1). margin (P,). tied_a, tied_b, tied_weight (Q,):
    the same for ties.
    """

    better: Tensor
    worse: Tensor
    weight: Tensor
    margin: Tensor
    tied_a: Tensor
    tied_b: Tensor
    tied_weight: Tensor


def all_pairs(examples: Sequence[Example], device: torch.device, ties: bool = False) -> Pairs:
    """The pairs of a batch of rankings. ties: include the pairs without a winner."""
    ordered: list[tuple[int, int, float, float]] = []
    tied: list[tuple[int, int, float]] = []
    start = 0
    for e in examples:
        wins, draws = compare(e.rank)
        draws = draws if ties else []
        share = e.weight / max(1, len(wins) + len(draws))
        ordered += [(start + i, start + j, share, e.margin) for i, j in wins]
        tied += [(start + i, start + j, share) for i, j in draws]
        start += len(e.completions)
    columns = [*zip(*ordered, strict=True)] or [()] * 4
    drawn = [*zip(*tied, strict=True)] or [()] * 3
    index = lambda values: torch.tensor(values, dtype=torch.long, device=device)  # noqa: E731
    real = lambda values: torch.tensor(values, dtype=torch.float32, device=device)  # noqa: E731
    return Pairs(
        *map(index, columns[:2]), *map(real, columns[2:]), *map(index, drawn[:2]), real(drawn[2])
    )  # fmt: skip


def compare(rank: Sequence[float]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """-> (better, worse) of each pair with a winner, and the tied pairs. The best completion has the lowest rank."""
    order = range(len(rank))
    wins = [(i, j) for i in order for j in order if rank[i] < rank[j]]
    draws = [(i, j) for i in order for j in order if i < j and rank[i] == rank[j]]
    return wins, draws


def rankings_by_source(examples: Sequence[Example], ties: bool = False) -> dict[str, float]:
    """Normalizers "rankings/NAME" of the sources, as `count` has them for all; empty where there is only one source."""
    sources = by_source(examples).items()
    return {f"rankings/{name}": count([examples[i] for i in places], ties)["rankings"] for name, places in sources}


def count(examples: Sequence[Example], ties: bool = False) -> dict[str, float]:
    """Normalizers: "rankings", the total weight of those with a pair, and "pairs", the number of pairs with a winner."""
    rankings, pairs = 0.0, 0
    for e in examples:
        wins, draws = compare(e.rank)
        rankings += e.weight if wins or (ties and draws) else 0.0
        pairs += len(wins)
    return {"rankings": rankings or 1.0, "pairs": pairs or 1}
