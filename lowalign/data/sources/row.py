"""A row of a source, or what is wrong with it, and the place where it is."""

from dataclasses import dataclass
from typing import Any

from lowalign.errors import UserError


class RowError(UserError):
    """What is wrong with a row. The caller adds file and line."""


class RowDropped(UserError):
    """Why a valid row has nothing to learn from. It is left out and counted."""


@dataclass(frozen=True)
class Row:
    """One row of a file. line: where it begins, from 1 (of Parquet, Arrow and Hub datasets: its number, from 1).

    untyped: all values are texts, as in CSV; lowalign.data.rows.columns reads numbers and lists out of them. original: the
    columns of the source, where options made others of them.
    """

    data: dict[str, Any]
    file: str
    line: int
    untyped: bool = False
    original: dict[str, Any] | None = None

    @property
    def where(self) -> str:
        """file.jsonl:417"""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: file:line, the problem, and its text."""

    where: str
    message: str
    raw: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"
