"""Rows as their source has them to rows in the columns of a format, by the options of --data: columns, prompt, completion, …,
preset, rename, ignore."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lowalign.config.sections import DataConfig
from lowalign.data.rows.columns import typed
from lowalign.data.rows.expressions import Compiled, compiled
from lowalign.data.rows.presets import Preset, load_preset, named_columns
from lowalign.data.rows.time_limit import TookTooLong
from lowalign.data.rows.trees import tree_rows
from lowalign.data.rows.unused import read_renames, with_columns
from lowalign.data.sources.read import iter_rows
from lowalign.data.sources.row import BadRow, Row, RowDropped, RowError
from lowalign.errors import UserError

TEXTS = ("prompt", "completion", "chosen", "rejected", "system")  # options that are Jinja
T = TypeVar("T")


@dataclass(frozen=True)
class SkippedRow:
    """A row that a preset leaves out, and why."""

    where: str
    why: str


class Mapping:
    """What the options make of a row. Raises UserError for options that contradict each other."""

    def __init__(self, config: DataConfig | None = None, preset: str | None = None):
        """preset: the name of that of this source."""
        config = config or DataConfig()
        self.arguments = config, preset  # what another process makes the same Mapping of
        self._ignore, self._renames = config.ignore, read_renames(config.rename)
        self._columns = read_columns(config.columns)
        given = {name: getattr(config, name, None) for name in TEXTS}
        self._texts: dict[str, Compiled] = {
            name: compiled(text, f"--data.{name}") for name, text in given.items() if text is not None
        }
        self.preset: Preset | None = None if preset in (None, "none") else load_preset(preset)
        flags = [*(["--data.columns"] if self._columns else []), *(f"--data.{name}" for name in self._texts)]
        if self.preset and flags:
            raise UserError(f"--data.preset {preset} says what the columns mean; leave out {' and '.join(flags)}")

    @property
    def fingerprint(self) -> str:
        """Changes when a preset's file does."""
        return self.preset.fingerprint if self.preset else ""

    @property
    def row_by_row(self) -> bool:
        """Whether each row is mapped by itself: trees are put together from several rows."""
        return self.preset is None or self.preset.trees is None

    def rows(self, name: str, limit: int | None = None) -> Iterator[Row | BadRow | SkippedRow]:
        """The rows of a source, mapped. Raises UserError when it cannot be read."""
        rows: Iterable[Row | BadRow] = iter_rows(name, limit)
        if self.preset and self.preset.trees is not None:
            rows = tree_rows(rows, self.preset.trees)
        return map(self.row, rows)

    def row(self, row: Row | BadRow) -> Row | BadRow | SkippedRow:
        """One row, mapped; a BadRow where that fails."""
        if isinstance(row, BadRow):
            return row
        try:
            return replace(row, data=self._mapped(row), untyped=False, original=row.data)
        except RowDropped as dropped:
            return SkippedRow(row.where, str(dropped))
        except TookTooLong as error:
            raise UserError(f"{row.where}: {error}") from error
        except RowError as error:
            return BadRow(row.where, str(error), json.dumps(row.data, ensure_ascii=False, default=str))

    def _mapped(self, row: Row) -> dict[str, Any]:
        data = with_columns(row.data, self._renames, self._ignore)
        if self._columns or self._texts:
            texts = {name: text(data | {"row": data}) for name, text in self._texts.items()}
            data = (
                named_columns(data, self._columns, "--data.columns") | texts
            )  # others would make it mean something else
        elif self.preset:
            data = self.preset(data)
        return typed(replace(row, data=data))


def parse_rows(
    name: str, parse: Callable[[dict[str, Any]], T], mapping: Mapping | None = None
) -> Iterator[tuple[Row, T]]:
    """All rows, with what `parse` returns for them. Raises UserError, with file:line, for a bad row and for a RowError."""
    for row in (mapping or Mapping()).rows(name):
        if isinstance(row, BadRow):
            raise UserError(str(row))
        if isinstance(row, SkippedRow):
            continue
        try:
            yield row, parse(row.data)
        except RowError as error:
            raise UserError(f"{row.where}: {error}") from error


def mappings_of(config: DataConfig, sources: int) -> list[Mapping]:
    """The mapping of each source: --data.preset is one for all, or one for each. Raises UserError for another number."""
    names = config.preset * sources if len(config.preset) == 1 else config.preset or (None,) * sources
    if len(names) != sources:
        raise UserError(
            f"--data.preset has {len(names)} names for {sources} sources: give one for all, or one for each (none: as they are)"
        )
    return [Mapping(config, name) for name in names]


def read_columns(columns: Iterable[str]) -> dict[str, str]:
    """{new: old} of NEW=OLD, also several with commas. Raises UserError."""
    pairs = [part.partition("=") for item in columns for part in item.split(",")]
    for new, equals, old in pairs:
        if not (new.strip() and equals and old.strip()):
            raise UserError(
                f"--data.columns {new}{equals}{old}: write NEW=OLD, for example prompt=question,completion=answer"
            )
    return {new.strip(): old.strip() for new, _, old in pairs}
