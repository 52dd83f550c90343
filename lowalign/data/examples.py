"""Examples of several sources as one sequence, and parts of it: 8 bytes a row, none of which is made before it is asked for."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lowalign.data.example import Example
from lowalign.data.record import facts_of


class Examples(Sequence[Example]):
    """The Examples of `parts`, one part after the other. Each is made anew whenever it is asked for, unless a part is a list.

    names: of the parts, for Example.dataset; empty where there is one. places: which of them, in this order; None: all.
    change: applied to each Example.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Example]],
        names: Sequence[str] = (),
        places: np.ndarray | None = None,
        change: Callable[[Example], Example] | None = None,
    ) -> None:
        self.parts, self.names, self.change = list(parts), list(names), change
        self._starts = np.cumsum([0, *map(len, self.parts)])
        self._places = places
        self._references: tuple[np.ndarray, np.ndarray] | None = None  # values, and where those of each Example end

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._places is None else len(self._places)

    def __getitem__(self, i: int | slice) -> "Example | Examples":
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        if not -len(self) <= i < len(self):
            raise IndexError(f"{i} of {len(self)} Examples")
        i %= len(self)
        place = i if self._places is None else int(self._places[i])
        part = int(np.searchsorted(self._starts, place, side="right")) - 1
        example = self.parts[part][place - int(self._starts[part])]
        if self.change is not None:
            example = self.change(example)
        if self.names:
            example = replace(example, dataset=self.names[part])
        if self._references is not None:
            values = self._values(i)
            example = replace(example, reference=None if np.isnan(values).any() else values.tolist())
        return example

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None

    def take(self, indices: np.ndarray) -> "Examples":
        """Those at these indices, in this order."""
        places = indices if self._places is None else self._places[indices]
        return Examples(self.parts, self.names, np.asarray(places, np.int64), self.change)

    def map(self, change: Callable[[Example], Example]) -> "Examples":
        """The same with a change to each. Their facts stay those of the Examples as they are stored."""
        return Examples(self.parts, self.names, self._places, change)

    def fact(self, name: str) -> np.ndarray:
        """One of FACTS (lowalign.data.record) of each Example, as it is stored."""
        columns = [(p.facts if hasattr(p, "facts") else facts_of(p))[name] for p in self.parts]
        column = np.concatenate(columns) if columns else np.empty(0, np.int64)
        return column if self._places is None else column[self._places]

    def part_numbers(self) -> np.ndarray:
        """Of each Example the number of its part."""
        numbers = np.repeat(np.arange(len(self.parts), dtype=np.int32), np.diff(self._starts))
        return numbers if self._places is None else numbers[self._places]

    def set_reference(self, i: int, reference: Sequence[float] | None) -> None:
        """Give Example i this `reference`; None: none."""
        if self._references is None:
            ends = np.cumsum(self.fact("completions"), dtype=np.int64)
            self._references = np.full(int(ends[-1]) if len(ends) else 0, np.nan), ends
        self._values(i)[:] = np.nan if reference is None else reference

    def _values(self, i: int) -> np.ndarray:
        values, ends = self._references
        return values[ends[i - 1] if i else 0 : ends[i]]


def as_examples(examples: Sequence[Example]) -> Examples:
    """The same sequence; a list as the only part."""
    return examples if isinstance(examples, Examples) else Examples([examples])


def taken(examples: Sequence[Example], indices: np.ndarray) -> Sequence[Example]:
    """Those at these indices: a list of a list, else Examples."""
    return examples.take(indices) if isinstance(examples, Examples) else [examples[i] for i in indices.tolist()]


def source_names(files: Sequence[str]) -> list[str]:
    """Short names of sources, for metrics: a file's without folder and suffix, where those differ."""
    short = [Path(file).name.partition(".")[0] or file for file in files]
    unique = [name if short.count(name) == 1 else file for name, file in zip(short, files, strict=True)]
    return [name if unique.index(name) == i else f"{name}#{i + 1}" for i, name in enumerate(unique)]
