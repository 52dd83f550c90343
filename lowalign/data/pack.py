"""Example: a prompt and its completions. Pack: many Examples laid end to end in one row, without a padding token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor


@dataclass
class Example:
    """One prompt with one or more completions, as token ids.

    masks: for each completion, which of its tokens are supervised; None means all of them. The first token of a
    completion without a prompt has nothing to be predicted from and is never supervised.
    rank: for each completion its place among them, the best lowest; equal numbers are ties. margin: by how much the
    better of a pair is to lead (reward model). label: thumbs up or down, for a completion that stands alone. weight:
    what the Example counts. reference: for each completion the reference's log-probability of its supervised tokens.
    """

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[bool]] | None = None
    rank: list[float] | None = None
    margin: float = 0.0
    label: bool | None = None
    weight: float = 1.0
    reference: list[float] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if not self.completions or not all(self.completions):
            raise ValueError(f"an Example needs at least one completion, and none of them empty {self.source}".rstrip())
        if self.masks is not None and list(map(len, self.masks)) != list(map(len, self.completions)):
            raise ValueError(f"masks and completions of an Example differ in length {self.source}".rstrip())
        if self.rank is not None and len(self.rank) != len(self.completions):
            raise ValueError(f"rank and completions of an Example differ in length {self.source}".rstrip())

    @property
    def length(self) -> int:
        """Tokens it takes in a Pack (the prompt once, however many completions hang on it)."""
        return len(self.prompt) + sum(map(len, self.completions))

    def mask(self, i: int) -> list[bool]:
        """Which tokens of completion i are supervised, as a list of its length."""
        mask = [True] * len(self.completions[i]) if self.masks is None else list(self.masks[i])
        if not self.prompt:
            mask[0] = False
        return mask

    @property
    def supervised(self) -> int:
        """Number of supervised tokens in all completions."""
        return sum(sum(self.mask(i)) for i in range(len(self.completions)))


@dataclass(frozen=True)
class Segment:
    """A stretch of the row that attends causally to itself and, when it has a parent, to all of that segment."""

    length: int
    parent: int | None = None


@dataclass
class Pack:
    """Examples laid end to end. T tokens in the row, N completion tokens that have something to be predicted from.

    ids (T,): token ids; -1 where a virtual token stands. positions (T,): restart with each Example.
    virtual (T,): index of the virtual token, -1 elsewhere. source (N,): the place in the row whose hidden state predicts
    the token, labels (N,): that token, supervised (N,) bool, place (N,): where it stands among all completion tokens.
    lengths: tokens of each completion of each Example. ends (C,): the place in the row of each completion's last token.
    """

    ids: Tensor
    positions: Tensor
    virtual: Tensor
    segments: tuple[Segment, ...]
    source: Tensor
    labels: Tensor
    supervised: Tensor
    place: Tensor
    ends: Tensor
    lengths: list[list[int]] = field(default_factory=list)

    def to(self, device: torch.device | str) -> "Pack":
        """The same Pack with its tensors on `device`."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Pack(**moved)


def pack(examples: Sequence[Example], virtual_tokens: int = 0, first_position: int = 0) -> Pack:
    """Lay the Examples end to end.

    virtual_tokens: learned embeddings that stand before every prompt, as part of its segment (prompt tuning).
    first_position: where positions begin, the number of keys and values that stand before every prompt (prefix tuning).
    An Example with one completion is a single causal segment; with several, each completion hangs on the prompt's.
    """
    ids, positions, virtual, segments = [], [], [], []
    source, labels, supervised, place, ends = [], [], [], [], []
    counted, lengths = 0, []
    for example in examples:
        head = [-1] * virtual_tokens + example.prompt
        single = len(example.completions) == 1
        start, parent = len(ids), None
        ids += head
        virtual += list(range(virtual_tokens)) + [-1] * len(example.prompt)
        positions += range(first_position, first_position + len(head))
        if head and not single:
            parent = len(segments)
            segments.append(Segment(len(head)))
        for i, completion in enumerate(example.completions):
            at = len(ids)
            before = at - 1 if single else start + len(head) - 1  # the row's place that predicts the first token
            skip = 0 if example.prompt else 1
            source += [before, *range(at, at + len(completion) - 1)][skip:]
            labels += completion[skip:]
            supervised += example.mask(i)[skip:]
            place += range(counted + skip, counted + len(completion))
            counted += len(completion)
            ids += completion
            ends.append(len(ids) - 1)
            virtual += [-1] * len(completion)
            after = first_position + len(head)
            positions += range(after, after + len(completion))
            segments.append(Segment(len(completion) + (len(head) if single else 0), parent))
        lengths.append([len(c) for c in example.completions])
    as_long = lambda values: torch.tensor(values, dtype=torch.long)  # noqa: E731
    return Pack(
        as_long(ids),
        as_long(positions),
        as_long(virtual),
        tuple(segments),
        as_long(source),
        as_long(labels),
        torch.tensor(supervised, dtype=torch.bool),
        as_long(place),
        as_long(ends),
        lengths,
    )


def step_order(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Row numbers of optimizer step `step` (from 0): a pure function of its arguments, so a resumed run needs no more.

    Each pass over the data is a fresh permutation; a step may span two passes.
    """
    chosen = []
    for k in range(step * batch_size, (step + 1) * batch_size):
        epoch, at = divmod(k, rows)
        chosen.append(_permutation(rows, seed, epoch)[at])
    return chosen


@lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(rows, generator=generator).tolist())


def total_supervised(examples: Iterable[Example]) -> int:
    """Supervised tokens of all the Examples: what a mean over tokens is divided by."""
    return sum(example.supervised for example in examples)
