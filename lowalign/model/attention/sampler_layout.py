"""What one forward of the sampler holds, and the indices, bounds and masks that its attention needs."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lowalign.model.attention.blockwise import cumulative, visible


@dataclass
class Prompts:
    """The forward of whole prompts, end to end. Per prompt: its number, its tokens here, its keys (the prefix too)."""

    numbers: list[int]
    lengths: list[int]
    spans: list[int]
    device: torch.device

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """For the kernel: where queries and keys of each begin, and the longest of both."""
        queries, keys = (cumulative(x, self.device) for x in (self.lengths, self.spans))
        return queries, keys, max(self.lengths), max(self.spans)


class Group(NamedTuple):
    """Rows start..stop, in the order by prompts, of one prompt with `length` keys."""

    prompt: int
    start: int
    stop: int
    length: int


@dataclass
class Tokens:
    """The forward of one token for each of R samples. Per row: its prompt's number, that one's keys, its own before this."""

    numbers: list[int]
    lengths: list[int]
    ages: list[int]
    device: torch.device
    masks: dict[tuple, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.oldest = max(self.ages)
        self.farthest = max(length + age for length, age in zip(self.lengths, self.ages, strict=True))
        self.row = torch.arange(len(self.ages), device=self.device)
        self.age = torch.tensor(self.ages, device=self.device)
        order = sorted(range(len(self.ages)), key=self.numbers.__getitem__)
        self.order = torch.tensor(order, device=self.device)
        self.inverse = self.order.argsort()
        numbers = [self.numbers[r] for r in order]
        starts = [i for i in range(len(order)) if not i or numbers[i] != numbers[i - 1]]
        stops = [*starts[1:], len(order)]
        self.groups = [Group(numbers[a], a, b, self.lengths[order[a]]) for a, b in zip(starts, stops, strict=True)]

    @cached_property
    def own_bounds(self) -> Tensor:
        """(R + 1,) int32: each row is a sequence of one query."""
        return cumulative([1] * len(self.ages), self.device)

    @cached_property
    def group_bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """For the kernel: where queries and keys of each group begin, and the longest of both."""
        counts, lengths = [g.stop - g.start for g in self.groups], [g.length for g in self.groups]
        return cumulative(counts, self.device), cumulative(lengths, self.device), max(counts), max(lengths)

    def own_mask(self, window: int | None) -> Tensor | None:
        """(R, 1, 1, oldest + 1): which of its own keys each row sees; None when all see all."""
        if min(self.ages) == self.oldest and not (window and window <= self.oldest):
            return None
        key = (None, window)
        if key not in self.masks:
            seen = visible(self.age, torch.arange(self.oldest + 1, device=self.device), window)
            self.masks[key] = seen[:, None, None]
        return self.masks[key]

    def sees_prompts(self, window: int | None) -> bool:
        """Whether the whole of its prompt is in the window of every row."""
        return not window or self.farthest < window

    def prompt_mask(self, group: Group, window: int | None) -> Tensor | None:
        """(rows, length): which keys of their prompt the rows of a group see; None when all see all."""
        if self.sees_prompts(window):
            return None
        key = (group.prompt, window)
        if key not in self.masks:
            at = group.length + self.age[self.order[group.start : group.stop]]
            self.masks[key] = visible(at, torch.arange(group.length, device=self.device), window)
        return self.masks[key]
