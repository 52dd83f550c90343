"""Row formats (option `shape`), recognised by their columns.

Columns that a format does not use are ignored: published data is full of ids, sources and scores. Those that change what
a row means (rows/unused.py) are an error. So is a missing column; the message names the column that may be its
misspelling.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowalign.data.rows.turns import closest, expected
from lowalign.data.rows.unused import Meaning, refuse_unused
from lowalign.data.sources.row import RowError


@dataclass(frozen=True)
class RowFormat:
    """The columns that a row must have, those it may have, and the function that parses it. Names may repeat."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[dict[str, Any]], Any]

    def ignored(self, data: dict[str, Any]) -> set[str]:
        """Columns of the row that this format does not use."""
        return data.keys() - {*self.required, *self.optional}


class RowFormats:
    """All formats that a command reads. Of several that fit a row, the first is used."""

    def __init__(
        self,
        formats: Sequence[RowFormat],
        other_command_columns: Callable[[dict[str, Any]], Sequence[str]],
        other_command: str,
        meanings: Mapping[str, Meaning],
    ):
        """other_command_columns: those columns of a row that mark it as data for another command; often none.
        other_command: the words for the message that names that command. meanings: columns that no row may have unused."""
        self.formats = list(formats)
        self._other_command_columns, self._other_command = other_command_columns, other_command
        self._meanings = meanings

    def named(self, name: str) -> "RowFormats":
        """The formats of that name; all for "auto"."""
        formats = [row_format for row_format in self.formats if name in ("auto", row_format.name)]
        return RowFormats(formats, self._other_command_columns, self._other_command, self._meanings)

    def of(self, data: dict[str, Any]) -> RowFormat | None:
        """The first format whose columns the row has, null columns counted only if no format fits without them."""
        filled = {name for name, value in data.items() if value is not None}
        fitting = (f for names in (filled, data.keys()) for f in self.formats if names >= set(f.required))
        return next(fitting, None)

    def common(self, rows: Iterable[dict[str, Any]]) -> RowFormat | None:
        """The format of most rows."""
        counts = Counter(filter(None, map(self.of, rows)))
        return counts.most_common(1)[0][0] if counts else None

    def nearest(self, data: dict[str, Any]) -> tuple[RowFormat, float]:
        """The format of which the row has the largest share of columns, and that share; a misspelt column counts 0.9."""
        return max(self._shares(data), key=lambda format_and_share: format_and_share[1])

    def _shares(self, data: dict[str, Any]) -> Iterator[tuple[RowFormat, float]]:
        for row_format in self.formats:
            columns = [1.0 if name in data else 0.9 if closest(name, data) else 0.0 for name in row_format.required]
            yield row_format, sum(columns) / len(columns)

    def parse(self, data: dict[str, Any], row_format: RowFormat | None = None) -> Any:
        """The parsed row. row_format: its format; None: that of its columns. Raises RowError."""
        row_format = row_format or self.of(data)
        others = self._other_command_columns(data)
        other_command = " and ".join(f'"{name}"' for name in others) + f": {self._other_command}"
        if row_format is None:
            row_format, share = self.nearest(data)
            if not share and len(self.formats) > 1:
                formats = ", ".join(" + ".join(f.required) for f in self.formats)
                columns = other_command if others else ", ".join(f'"{name}"' for name in data) or "none"
                raise RowError(f"expected the columns of one shape ({formats}), found {columns}")
        for name in row_format.required:
            if name not in data:
                candidates = [key for key in data if key not in row_format.required]
                if others and closest(name, candidates) in (None, *others):
                    raise RowError(f'expected "{name}", found {other_command}')
                raise RowError(expected(name, candidates))
            if data[name] is None:
                raise RowError(f'"{name}" is null')
        refuse_unused(data, row_format.ignored(data), row_format.name, self._meanings)
        return row_format.parse(data)
