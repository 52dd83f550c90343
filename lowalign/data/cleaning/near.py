"""Rows that are nearly the same, by MinHash of their token ids.

A row is its set of shingles: three consecutive tokens. Shingles of more than a tenth of the rows, such as those of a
common system text, are left out. The similarity of two rows is |A ∩ B| / |A ∪ B| of their sets (Jaccard). Of each row PERMUTATIONS minima of random
hashes are kept (Broder, On the resemblance and containment of documents, 1997); two of them are equal with the probability
of the similarity. Rows that agree in a whole band of minima are compared exactly, so no pair below THRESHOLD is reported. A
pair of similarity s is missed with a probability of (1 - s^ROWS)^BANDS in the bands: 1.2 % at 0.7, 2e-4 at 0.8.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SHINGLE = 3  # tokens
THRESHOLD = 0.7
BANDS, ROWS = 24, 5  # of a signature: PERMUTATIONS minima
PERMUTATIONS = BANDS * ROWS
SLACK = 0.15  # the share of equal minima is within 3.5 standard errors of the similarity
COMMON, COMMON_ROWS, SAMPLE = 0.1, 20, 2000  # left out: shingles of more than this share and number of sampled rows
AT_A_TIME = 2**18  # shingles
NONE = np.uint32(2**32 - 1)  # the minimum of an empty set

Near = dict[int, tuple[int, float]]  # row -> (the row it is like, similarity)


@dataclass(frozen=True)
class Shingled:
    """Rows as sets of shingles, of which only the signatures (R, PERMUTATIONS) are kept. common: shingles that are left out."""

    rows: Sequence[np.ndarray]
    common: np.ndarray
    signatures: np.ndarray

    def similarity(self, i: int, j: int) -> float:
        """|A ∩ B| / |A ∪ B|, exact."""
        a, b = (set(_rare(_hashes([self.rows[k]]), self.common).tolist()) for k in (i, j))
        return len(a & b) / max(len(a | b), 1)


def near_duplicates(rows: Sequence[np.ndarray], train: int) -> tuple[Near, Near]:
    """rows: token ids of each, read when they are needed; the first `train` of them are trained on, the rest is held out.

    -> for rows to train on that are like an earlier one: which, and the similarity; and the same for those that are like a
    held-out row.
    """
    shingled = shingle(rows)
    filled = (shingled.signatures != NONE).any(1)
    own, held = np.flatnonzero(filled[:train]), train + np.flatnonzero(filled[train:])
    bands = [_band(shingled.signatures, k) for k in range(BANDS)]
    within = [pairs for keys in bands for pairs in _same(keys, own)]
    across = [_same_in(keys, own, held) for keys in bands]
    return _best(shingled, within), _best(shingled, across)


def shingle(rows: Sequence[np.ndarray]) -> Shingled:
    """rows: token ids of each."""
    common = _common(rows)
    signatures = np.full((len(rows), PERMUTATIONS), NONE)
    start = 0
    for block in _blocks(rows):
        hashes = _hashes(block)
        kept = ~np.isin(hashes, common)
        offsets = np.cumsum([0, *map(len, block)])
        offsets = np.concatenate([[0], np.cumsum(kept)])[offsets]
        _fill_signatures(signatures[start : start + len(block)], hashes[kept], offsets)
        start += len(block)
    return Shingled(rows, common, signatures)


def _blocks(rows: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Rows of about AT_A_TIME shingles together."""
    block, size = [], 0
    for i in range(len(rows)):
        block.append(rows[i])
        size += len(block[-1])
        if size >= AT_A_TIME:
            yield block
            block, size = [], 0
    if block:
        yield block


def _hashes(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The hash of the shingle that begins at each token; past the end of a row follow tokens that no row has."""
    padding = np.full(SHINGLE - 1, 2**32, dtype=np.uint64)
    ids = np.concatenate([part for row in rows for part in (row.astype(np.uint64), padding)])
    starts = np.concatenate([np.full(len(row) + SHINGLE - 1, len(row)) for row in rows])
    place = np.concatenate([np.arange(len(row) + SHINGLE - 1) for row in rows])
    mixed = _mixed(ids)
    total = np.zeros_like(mixed)
    for k in range(SHINGLE):
        shifted = np.roll(mixed, -k)
        total = _mixed(total ^ shifted)
    return total[place < starts]


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _rare(hashes: np.ndarray, common: np.ndarray) -> np.ndarray:
    return hashes[~np.isin(hashes, common)]


def _common(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The shingles that too many rows have, by a sample of the rows."""
    count = len(rows)
    sample = np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).astype(np.int64)).tolist() if count else []
    parts = [np.unique(_hashes([rows[i]])) for i in sample]
    if not parts:
        return np.zeros(0, np.uint64)
    values, counts = np.unique(np.concatenate(parts), return_counts=True)
    return values[counts > max(COMMON_ROWS, COMMON * len(parts))]


def _fill_signatures(signatures: np.ndarray, hashes: np.ndarray, offsets: np.ndarray) -> None:
    """The minima of these rows; those of rows without shingles stay."""
    filled = np.flatnonzero(np.diff(offsets))
    if not len(filled):
        return
    starts = offsets[filled]
    factors = np.random.default_rng(0).integers(0, 2**64, PERMUTATIONS, dtype=np.uint64) | np.uint64(1)
    for k, factor in enumerate(factors):
        signatures[filled, k] = np.minimum.reduceat(((hashes * factor) >> np.uint64(32)).astype(np.uint32), starts)


def _band(signatures: np.ndarray, k: int) -> np.ndarray:
    """(R,) one number for the minima of band k."""
    key = np.zeros(len(signatures), np.uint64)
    for column in signatures[:, k * ROWS : (k + 1) * ROWS].T:
        key = _mixed(key ^ column.astype(np.uint64) + np.uint64(k + 1))
    return key


def _same(keys: np.ndarray, own: np.ndarray) -> list[np.ndarray]:
    """(P, 2) each: the rows of `own` with the first row of the same key, and with the one before."""
    order = own[np.argsort(keys[own], kind="stable")]
    again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
    starts = np.arange(len(order))
    starts[again] = 0
    first = order[np.maximum.accumulate(starts)]
    return [np.stack([order[again], first[again]], 1), np.stack([order[again], order[again - 1]], 1)]


def _same_in(keys: np.ndarray, own: np.ndarray, held: np.ndarray) -> np.ndarray:
    """(P, 2) the rows of `own` with the first row of `held` of the same key."""
    known, first = np.unique(keys[held], return_index=True)
    if not len(known):
        return np.zeros((0, 2), np.int64)
    place = np.minimum(np.searchsorted(known, keys[own]), len(known) - 1)
    match = known[place] == keys[own]
    return np.stack([own[match], held[first[place[match]]]], 1)


def _best(shingled: Shingled, candidates: Sequence[np.ndarray]) -> Near:
    """Of each row the most similar of its candidates, if that is similar enough."""
    found: Near = {}
    pairs = np.unique(np.concatenate(candidates), axis=0) if candidates else np.zeros((0, 2), np.int64)
    for start in range(0, len(pairs), AT_A_TIME // PERMUTATIONS):
        part = pairs[start : start + AT_A_TIME // PERMUTATIONS]
        equal = (shingled.signatures[part[:, 0]] == shingled.signatures[part[:, 1]]).mean(1)
        for i, j in part[equal >= THRESHOLD - SLACK].tolist():
            similarity = shingled.similarity(i, j)
            if similarity >= THRESHOLD and similarity > found.get(i, (0, 0.0))[1]:
                found[i] = (j, similarity)
    return found
