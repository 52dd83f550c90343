"""Rows from JSON and JSONL files and from Hub datasets, each with file and line.

A line that is no row becomes a BadRow with the reason; only UserError is ever raised. Arrays are read element by element,
so that each row has its true line; JSONL is read line by line. CSV and Parquet are not read: docs/data.md shows how
`datasets` converts them.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from lowalign.data.rows.strict_json import StrictParser, half_surrogate, json_type
from lowalign.errors import UserError

HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>[\w.-]+))?")
SUFFIXES = (".json", ".jsonl", ".ndjson")
WHITESPACE = re.compile(r"[ \t\r\n]*")
BOM = b"\xef\xbb\xbf"
T = TypeVar("T")


class RowError(UserError):
    """What is wrong with a row. The caller adds file and line."""


class RowDropped(UserError):
    """Why a valid row has nothing to learn from. It is left out and counted."""


@dataclass(frozen=True)
class Row:
    """One row of a file. line: where it begins, from 1 (for a Hub dataset: its number, from 1)."""

    data: dict[str, Any]
    file: str
    line: int

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


def is_file(name: str) -> bool:
    """True for a file of rows, False for the name of a Hub dataset. Raises UserError when `name` is neither."""
    path = Path(name)
    if path.is_file():
        if path.suffix not in (*SUFFIXES, ""):
            raise UserError(f"{name}: cannot read {path.suffix} files; convert it to JSON or JSONL (see docs/data.md)")
        return True
    if path.is_dir():
        raise UserError(f"{name} is a folder; name the JSON or JSONL files in it")
    if path.suffix in SUFFIXES or not HUB_ID.fullmatch(name):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, 1)
        raise UserError(f"{name}: no such file" + (f"; did you mean {path.with_name(close[0])}?" if close else ""))
    return False


def read_rows(name: str, limit: int | None = None) -> list[Row | BadRow]:
    """All rows, or the first `limit`, of a JSON or JSONL file or of a Hub dataset (NAME or NAME:SPLIT).

    Raises UserError when there is no such file or dataset, or the file is not UTF-8.
    """
    return list(iter_rows(name, limit))


def iter_rows(name: str, limit: int | None = None) -> Iterator[Row | BadRow]:
    """As `read_rows`, one row after the other."""
    return islice(_from_file(name) if is_file(name) else _from_hub(name, limit), limit)


def parse_rows(name: str, parse: Callable[[dict[str, Any]], T]) -> Iterator[tuple[Row, T]]:
    """All rows, with what `parse` returns for them. Raises UserError, with file:line, for a bad row and for a RowError."""
    for row in read_rows(name):
        if isinstance(row, BadRow):
            raise UserError(str(row))
        try:
            yield row, parse(row.data)
        except RowError as error:
            raise UserError(f"{row.where}: {error}") from error


def _from_file(name: str) -> Iterator[Row | BadRow]:
    try:
        with Path(name).open("rb") as stream:
            start = stream.read(1024)
            if start[:2] in (b"\xff\xfe", b"\xfe\xff") or (b"\0" in start[:4] and start[:4].strip(b"\0")):
                raise UserError(f"{name} is not in UTF-8 (UTF-16 or UTF-32, it seems); save it as UTF-8")
            stream.seek(len(BOM) if start.startswith(BOM) else 0)
            # Bytes that are not UTF-8 become lone surrogates, which _invalid_text finds.
            if start.removeprefix(BOM).lstrip().startswith(b"["):
                yield from _array(name, stream.read().decode("utf-8", "surrogateescape"))
            else:
                yield from _lines(name, (line.decode("utf-8", "surrogateescape") for line in stream))
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from error


def _lines(name: str, lines: Iterator[str]) -> Iterator[Row | BadRow]:
    parser, first = StrictParser(), True
    for number, line in enumerate(lines, 1):
        text = line.strip("\r\n\t ")
        if not text:
            continue
        if first and text == "{":
            message = "a row spread over several lines: write each row in one line, or all of them in one array"
            yield BadRow(f"{name}:{number}", f"{message}; nothing after this is read", text)
            return
        first = False
        data, end, message = parser.parse(text, 0)
        if not message and text[end:].strip():
            message = f"more text after the row, at column {end + 1}: write one row per line"
        elif message and not line.endswith("\n") and parser.ended:
            message += "; the file seems to be cut off here"
        yield _checked(name, number, data, message, text)


def _array(name: str, text: str) -> Iterator[Row | BadRow]:
    parser = StrictParser()
    at, line, counted = _skip(text, text.index("[") + 1), 1, 0
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        data, end, message = parser.parse(text, at)
        if end is None:
            yield _checked(name, line, None, f"{message}; nothing after this can be read", text[at : at + 2000])
            return
        yield _checked(name, line, data, message, text[at:end])
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            break
    line += text.count("\n", counted, at)
    if at >= len(text):
        yield BadRow(f"{name}:{line}", 'the array is not closed with "]"; the file seems to be cut off here', "")
    elif text[at] != "]":
        rest = _printable(text[at : at + 2000])
        yield BadRow(f"{name}:{line}", 'expected "," or "]" after a row; nothing after this can be read', rest)
    elif text[_skip(text, at + 1) :]:
        start = _skip(text, at + 1)
        line += text.count("\n", at, start)
        rest = _printable(text[start : start + 2000])
        yield BadRow(f"{name}:{line}", 'more text after the "]" that ends the rows', rest)


def _skip(text: str, at: int) -> int:
    """The index of the first character from `at` that is no white space."""
    return WHITESPACE.match(text, at).end()


def _checked(name: str, line: int, data: Any, message: str, raw: str) -> Row | BadRow:
    if not message and not isinstance(data, dict):
        message = f"a row must be an object {{…}}, found {json_type(data)}"
    message = message or _invalid_text(data, raw)
    if not message:
        return Row(data, name, line)
    return BadRow(f"{name}:{line}", message.encode("utf-8", "backslashreplace").decode(), _printable(raw))


def _invalid_text(data: dict[str, Any], raw: str) -> str:
    bad = re.search(r"[\ud800-\udfff]", raw)
    if bad:
        return f"not valid UTF-8 at column {bad.start() - raw.rfind(chr(10), 0, bad.start())}"
    return half_surrogate(data, raw)


def _printable(raw: str) -> str:
    """The text, bytes that are not UTF-8 written as \\xNN."""
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _from_hub(name: str, limit: int | None) -> Iterator[Row | BadRow]:
    import datasets

    match = HUB_ID.fullmatch(name)
    dataset, split = match["name"], match["split"] or "train"
    try:
        rows = datasets.load_dataset(dataset, split=split)
    except Exception as error:  # the Hub, the network and dataset builders raise many types
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: no such file, and as a Hub dataset it cannot be loaded ({type(error).__name__}: {reason})"
        ) from error
    for number in range(min(len(rows), len(rows) if limit is None else limit)):
        yield Row(dict(rows[number]), f"{dataset}:{split}", number + 1)
