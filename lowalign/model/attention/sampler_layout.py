"""What one forward of the sampler holds, and the indices, bounds and masks that its attention needs."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lowalign.model.attention.blockwise import VarlenBounds, visible


@dataclass
class PromptBatch:
    """A forward of whole prompts, end to end. Per prompt: its number, its tokens in the row, its keys (with the prefix)."""

    prompts: list[int]
    lengths: list[int]
    key_lengths: list[int]
    device: torch.device

    @cached_property
    def bounds(self) -> VarlenBounds:
        """One sequence per prompt."""
        return VarlenBounds.of(self.lengths, self.key_lengths, self.device)


class Group(NamedTuple):
    """Rows start..stop, which share one prompt with `length` keys."""

    prompt: int
    start: int
    stop: int
    length: int


@dataclass
class TokenBatch:
    """A forward of one token for each of R samples, those of a prompt side by side.

    Per row: the number of its prompt, the keys of that prompt, how many tokens it generated before this one. What the layers
    have in common is computed once, when the first of them needs it.
    """

    prompts: list[int]
    prompt_lengths: list[int]
    generated: list[int]
    device: torch.device
    masks: dict[tuple, Tensor] = field(default_factory=dict)
    _own_bounds: dict[int, VarlenBounds] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.most_generated = max(self.generated)
        self.farthest = max(map(sum, zip(self.prompt_lengths, self.generated, strict=True)))
        self.rows = torch.arange(len(self.generated), device=self.device)
        self.places = torch.tensor(self.generated, device=self.device)  # of the token among its sample's own
        starts = [r for r, prompt in enumerate(self.prompts) if not r or prompt != self.prompts[r - 1]]
        stops = [*starts[1:], len(self.prompts)]
        self.groups = [Group(self.prompts[a], a, b, self.prompt_lengths[a]) for a, b in zip(starts, stops, strict=True)]
        if len({group.prompt for group in self.groups}) < len(self.groups):
            raise ValueError(f"the samples of a prompt must be side by side: {self.prompts}")

    def own_bounds(self, room: int) -> VarlenBounds:
        """Each row is a sequence of one query on `room` keys, of which it uses `own_keys`."""
        if room not in self._own_bounds:
            bounds = torch.arange(len(self.generated) + 1, dtype=torch.int32, device=self.device)
            self._own_bounds[room] = VarlenBounds(bounds, bounds * room, 1, self.most_generated + 1)
        return self._own_bounds[room]

    @cached_property
    def own_keys(self) -> Tensor:
        """(R,) int32: own keys of each row, with that of this token."""
        return (self.places + 1).int()

    @cached_property
    def group_bounds(self) -> VarlenBounds:
        """One sequence per group: its rows on the keys of their prompt."""
        return VarlenBounds.of([g.stop - g.start for g in self.groups], [g.length for g in self.groups], self.device)

    def own_mask(self, window: int | None) -> Tensor | None:
        """(R, 1, 1, most_generated + 1): which of its own keys each row sees; None when all rows see all."""
        if min(self.generated) == self.most_generated and not (window and window <= self.most_generated):
            return None
        key = (None, window)
        if key not in self.masks:
            mask = visible(self.places, torch.arange(self.most_generated + 1, device=self.device), window)
            self.masks[key] = mask[:, None, None]
        return self.masks[key]

    def sees_prompts(self, window: int | None) -> bool:
        """Whether the window of every row holds its whole prompt."""
        return not window or self.farthest < window

    def prompt_mask(self, group: Group, window: int | None) -> Tensor | None:
        """(rows, length): which keys of their prompt the rows of a group see; None when all rows see all."""
        if self.sees_prompts(window):
            return None
        key = (group.prompt, window)
        if key not in self.masks:
            positions = group.length + self.places[group.start : group.stop]
            self.masks[key] = visible(positions, torch.arange(group.length, device=self.device), window)
        return self.masks[key]
