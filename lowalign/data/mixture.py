"""Which rows a step takes when several sources are mixed: shares by weights, by capped sizes, or by passes over each source.

The order is a pure function of (seed, step). Positions repeat a pattern of PATTERN places in which each source is spread
evenly, so that any stretch of steps has its share; within a source each pass is a new permutation.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch

from lowalign.config.sections import DataConfig
from lowalign.data.example import Example
from lowalign.data.examples import Examples, as_examples, source_names
from lowalign.data.pack import step_order
from lowalign.errors import UserError

PATTERN = 10_000


class Mixture:
    """Sources with their shares.

    names, sizes: of the sources; each size is a number of Examples. shares: of the Examples of a run, their sum is 1. length: the
    Examples of an epoch. seed: of the order.
    """

    def __init__(
        self, names: Sequence[str], sizes: Sequence[int], shares: Sequence[float], length: int, seed: int
    ) -> None:
        self.names, self.sizes, self.shares, self.length, self.seed = names, sizes, shares, length, seed
        self._counts = _apportioned(shares, PATTERN)
        starts = [random.Random(f"{seed}/{i}").random() for i in range(len(names))]
        spread = [(np.arange(c) + start) / max(c, 1) for c, start in zip(self._counts, starts, strict=True)]
        sources = np.repeat(np.arange(len(names)), self._counts)
        self._pattern = sources[np.argsort(np.concatenate(spread), kind="stable")]
        self._place = np.empty(PATTERN, dtype=np.int64)  # how many places of the same source come before
        for source in range(len(names)):
            own = self._pattern == source
            self._place[own] = np.arange(own.sum())
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}

    def rows(self, batch_size: int, step: int) -> list[tuple[int, int]]:
        """(source, number of its Example) of each Example of optimizer step `step`, counted from 0."""
        return [self._row(k) for k in range(step * batch_size, (step + 1) * batch_size)]

    def realised(self, examples: int) -> dict[str, float]:
        """The share of each source in the first `examples` Examples of the run."""
        blocks, rest = divmod(examples, PATTERN)
        counts = blocks * self._counts + np.bincount(self._pattern[:rest], minlength=len(self.names))
        return {name: int(count) / max(examples, 1) for name, count in zip(self.names, counts, strict=True)}

    def lines(self) -> list[str]:
        """What is mixed, as lines of text."""
        passes = [
            share * self.length / size if size else 0 for share, size in zip(self.shares, self.sizes, strict=True)
        ]
        return [
            f"  {name}: {share:.1%} of the examples, {size:,} rows, {many:.2f} passes an epoch"
            for name, share, size, many in zip(self.names, self.shares, self.sizes, passes, strict=True)
        ]

    def _row(self, k: int) -> tuple[int, int]:
        block, place = divmod(k, PATTERN)
        source = int(self._pattern[place])
        epoch, i = divmod(block * int(self._counts[source]) + int(self._place[place]), self.sizes[source])
        if self._permutations.get(source, (None,))[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 1_009 + source)
            self._permutations[source] = epoch, torch.randperm(self.sizes[source], generator=generator).numpy()
        return source, int(self._permutations[source][1][i])


class MixedExamples(Examples):
    """Examples of several sources, and how they are mixed."""

    def __init__(self, examples: Sequence[Example], config: DataConfig, seed: int) -> None:
        """Raises UserError for options that do not fit the sources."""
        own = as_examples(examples)
        super().__init__(own.parts, own.names, own._places, own.change)
        names = source_names(config.files)
        if own.names:
            numbers = own.part_numbers()
        elif len(names) == 1:
            numbers = np.zeros(len(own), np.int32)
        else:
            numbers = np.array([names.index(example.dataset) for example in examples], np.int32)
        self._rows = [np.flatnonzero(numbers == k) for k in range(len(names))]
        self.mixture = _mixture(names, list(map(len, self._rows)), config, seed)

    def order(self, batch_size: int, step: int) -> list[int]:
        """The numbers of the Examples of a step."""
        return [int(self._rows[source][i]) for source, i in self.mixture.rows(batch_size, step)]


def mixed(examples: Sequence[Example], config: DataConfig, seed: int) -> Sequence[Example]:
    """The Examples with the order that the options ask for: as they are where none of them is given."""
    return MixedExamples(examples, config, seed) if config.weights or config.cap or config.source_epochs else examples


def order_of(examples: Sequence[Example], batch_size: int, seed: int, step: int) -> list[int]:
    """The numbers of the Examples of optimizer step `step`, counted from 0."""
    if isinstance(examples, MixedExamples):
        return examples.order(batch_size, step)
    return step_order(len(examples), batch_size, seed, step)


def epoch_length(examples: Sequence[Example]) -> int:
    """How many Examples make an epoch."""
    return examples.mixture.length if isinstance(examples, MixedExamples) else len(examples)


def _mixture(names: list[str], sizes: list[int], config: DataConfig, seed: int) -> Mixture:
    given = {"--data.weights": config.weights, "--data.cap": config.cap, "--data.source-epochs": config.source_epochs}
    flags = [flag for flag, value in given.items() if value]
    if len(flags) > 1:
        raise UserError(f"{' and '.join(flags)} each say how the sources are mixed: give one of them")
    for flag in ("--data.weights", "--data.source-epochs"):
        if given[flag] and len(given[flag]) != len(names):
            raise UserError(f"{flag} has {len(given[flag])} numbers for {len(names)} sources ({', '.join(names)})")
    parts = (
        list(config.weights)
        or [size * passes for size, passes in zip(sizes, config.source_epochs, strict=False)]
        or [min(size, config.cap) for size in sizes]
    )
    for name, size, part in zip(names, sizes, parts, strict=True):
        if part and not size:
            raise UserError(f"{name} has no row to train on; leave it out, or give it the weight 0")
    if not sum(parts):
        raise UserError(f"{flags[0]} leaves no source to train on")
    length = sum(sizes) if config.weights else max(1, round(sum(parts)))
    return Mixture(names, sizes, [part / sum(parts) for part in parts], length, seed)


def _apportioned(shares: Sequence[float], places: int) -> np.ndarray:
    """Whole numbers with this sum, by largest remainder; a share above 0 has at least one place."""
    exact = np.array(shares) * places
    counts = np.maximum(np.floor(exact), np.array(shares) > 0).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    for i in range(int(places - counts.sum())):
        counts[by_remainder[i % len(counts)]] += 1
    while counts.sum() > places:
        counts[counts.argmax()] -= 1
    return counts
