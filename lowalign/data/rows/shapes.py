"""The shapes that rows come in, told apart by their columns.

Columns a shape does not know are left alone: published data is full of ids, sources and scores. A column that is
missing is an error, with the one it may have been meant to be.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lowalign.data.rows.turns import RowError, closest, expected


@dataclass(frozen=True)
class RowFormat:
    """Columns that a row must have, those it may have besides, and the function that says what it means with them.
    Several may have one name."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict[str, Any]], Any]

    def ignored(self, data: dict[str, Any]) -> set[str]:
        """Columns of the row that it makes no use of."""
        return data.keys() - {*self.required, *self.optional}


class RowFormats:
    """All shapes of one kind of data. A row that has the columns of several is taken for the first of them."""

    def __init__(self, shapes: Sequence[RowFormat], foreign: Callable[[dict[str, Any]], Sequence[str]], elsewhere: str):
        """foreign: the columns that show of a row that it belongs elsewhere, if any. elsewhere: where, in words."""
        self._shapes, self._foreign, self._elsewhere = list(shapes), foreign, elsewhere

    def named(self, name: str) -> "RowFormats":
        """Those of that name; all for "auto"."""
        those = [shape for shape in self._shapes if name in ("auto", shape.name)]
        return RowFormats(those, self._foreign, self._elsewhere)

    def of(self, data: dict[str, Any]) -> RowFormat | None:
        """The shape whose columns the row has, those that are null not counted where there is another; or None."""
        filled = {name for name, value in data.items() if value is not None}
        fitting = (shape for names in (filled, data.keys()) for shape in self._shapes if names >= set(shape.required))
        return next(fitting, None)

    def common(self, rows: Iterable[dict[str, Any]]) -> RowFormat | None:
        """The shape of most rows: what the others in the file are measured against."""
        found = Counter(filter(None, map(self.of, rows)))
        return found.most_common(1)[0][0] if found else None

    def nearest(self, data: dict[str, Any]) -> tuple[RowFormat, float]:
        """The shape that the largest share of the row's columns belongs to, allowing for misspelling, and that share."""
        return max(self._likeness(data), key=lambda found: found[1])

    def _likeness(self, data: dict[str, Any]) -> Iterator[tuple[RowFormat, float]]:
        for shape in self._shapes:
            there = [1.0 if name in data else 0.9 if closest(name, data) else 0.0 for name in shape.required]
            yield shape, sum(there) / len(there)

    def read(self, data: dict[str, Any], shape: RowFormat | None) -> Any:
        """What a row of that shape says (None: nothing in its file has a known shape). Raises RowError."""
        foreign = self._foreign(data)
        found = " and ".join(f'"{name}"' for name in foreign) + f": {self._elsewhere}"
        if shape is None:
            shape, likeness = self.nearest(data)
            if not likeness and len(self._shapes) > 1:
                known = ", ".join(" + ".join(shape.required) for shape in self._shapes)
                found = found if foreign else ", ".join(f'"{name}"' for name in data) or "none"
                raise RowError(f"expected the columns of one shape ({known}), found {found}")
        for name in shape.required:
            if name not in data:
                others = [key for key in data if key not in shape.required]
                if foreign and closest(name, others) in (None, *foreign):
                    raise RowError(f'expected "{name}", found {found}')
                raise RowError(expected(name, others))
            if data[name] is None:
                raise RowError(f'"{name}" is null')
        return shape.read(data)
