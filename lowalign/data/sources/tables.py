"""Rows of tables: CSV and TSV line by line, Parquet and Arrow in batches. Nothing is held in memory but a batch."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowalign.data.sources.row import BadRow, Row
from lowalign.data.sources.streams import lines_of, open_binary
from lowalign.errors import UserError

BATCH = 500  # rows
CELL = 2**30  # characters; csv's own limit is 131,072


def delimited_rows(path: Path, delimiter: str) -> Iterator[Row | BadRow]:
    """The rows of a file with a header and cells in quotes where they need them (RFC 4180). line: where the row begins.

    Raises UserError for a header that is empty, has a name twice, or is separated by something else.
    """
    csv.field_size_limit(CELL)
    with open_binary(path) as stream:
        reader = csv.reader(lines_of(stream, str(path)), delimiter=delimiter, strict=True)
        header = _header(reader, path, delimiter)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRow(f"{path}:{line}", f"not a row of cells: {error}", "")
                continue
            if cells:
                yield _row(cells, header, path, line)


def _header(reader: Any, path: Path, delimiter: str) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise UserError(f"{path}:1: the header cannot be read: {error}") from error
    if not header:
        return []
    repeated = [name for name in header if header.count(name) > 1]
    if repeated:
        raise UserError(f'{path}:1: the column "{repeated[0]}" is in the header more than once')
    others = [other for other in ",;\t|" if other != delimiter and other in header[0]]
    if len(header) == 1 and others:
        raise UserError(
            f"{path}:1: the header has one column, {header[0]!r}: .csv is separated by commas, .tsv by tabs; save it so"
        )
    return header


def _row(cells: list[str], header: list[str], path: Path, line: int) -> Row | BadRow:
    raw = ",".join(cells)
    if re.search(r"[\ud800-\udfff]", raw):
        printable = raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return BadRow(f"{path}:{line}", "not valid UTF-8", printable)
    if len(cells) != len(header):
        return BadRow(f"{path}:{line}", f"{len(cells)} cells, and the header has {len(header)}", raw)
    return Row(dict(zip(header, cells, strict=True)), str(path), line, untyped=True)


def parquet_rows(path: Path, groups: range | None = None, before: int = 0) -> Iterator[Row]:
    """The rows of a Parquet file, numbered from 1. groups: only these row groups, with `before` rows before them. Raises UserError
    for what is no such file."""
    import pyarrow
    import pyarrow.parquet

    number = before
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH, row_groups=groups):
                for data in batch.to_pylist():
                    number += 1
                    yield Row(data, str(path), number)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _not_a_table(path, number, error) from error


def arrow_rows(path: Path) -> Iterator[Row]:
    """The rows of an Arrow file or stream (datasets writes streams), numbered from 1. Raises as `parquet_rows`."""
    import pyarrow

    number = 0
    try:
        with pyarrow.memory_map(str(path)) as source:
            for batch in _record_batches(pyarrow.ipc, source):
                for start in range(0, len(batch), BATCH):
                    for data in batch.slice(start, BATCH).to_pylist():
                        number += 1
                        yield Row(data, str(path), number)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _not_a_table(path, number, error) from error


def _record_batches(ipc: Any, source: Any) -> Iterator[Any]:
    if source.read(6) == b"ARROW1":
        source.seek(0)
        file = ipc.open_file(source)
        yield from (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        source.seek(0)
        yield from ipc.open_stream(source)


def _not_a_table(path: Path, number: int, error: BaseException) -> UserError:
    after = f" after row {number:,}" if number else ""
    kind = "Parquet" if path.suffix == ".parquet" else "Arrow"
    return UserError(f"{path}: not a whole {kind} file{after} ({' '.join(str(error).split())[:200]})")
