"""Files cut into stretches that can be read by themselves: JSONL at the ends of lines, Parquet by row groups, others whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowalign.data.sources.json_rows import line_rows
from lowalign.data.sources.read import FileSource, file_rows, name_of
from lowalign.data.sources.row import BadRow, Row
from lowalign.data.sources.streams import LONGEST, open_binary
from lowalign.data.sources.tables import parquet_rows

LINES, GROUPS, WHOLE = "lines", "groups", "whole"


@dataclass(frozen=True)
class Stretch:
    """Part of a file. start, end: bytes (lines) or row groups (groups). before: lines or rows of the file before it. source: what the
    file is part of."""

    path: Path
    source: str
    kind: str
    start: int = 0
    end: int = 0
    before: int = 0

    def rows(self) -> Iterator[Row | BadRow]:
        """Its rows, with the places that they have in the whole file."""
        match self.kind:
            case "lines":
                return line_rows(self.path, name_of(self.path, self.source), self.start, self.end, self.before)
            case "groups":
                return parquet_rows(self.path, range(self.start, self.end), self.before)
        return file_rows(self.path, self.source)


def cut(source: FileSource, size: int) -> Iterator[Stretch]:
    """The stretches of all files in order, each of about `size` bytes where a file can be cut."""
    for path in source.files:
        match kind_of(path):
            case "lines":
                yield from _lines(path, source.name, size)
            case "groups":
                yield from _groups(path, source.name, size)
            case _:
                yield Stretch(path, source.name, WHOLE)


def count(source: FileSource, size: int) -> int:
    """About how many stretches there are."""
    return sum(1 if kind_of(path) == WHOLE else -(-path.stat().st_size // size) for path in source.files)


def kind_of(path: Path) -> str:
    """How a file can be cut."""
    if path.suffix == ".parquet":
        return GROUPS
    if path.suffix not in (".json", ".jsonl", ".ndjson", ""):
        return WHOLE
    with open_binary(path) as stream:
        first, _, rest = stream.peek(1024)[:1024].lstrip().partition(b"\n")
    return LINES if first.startswith(b"{") and first.strip() != b"{" and (rest or len(first) > 1) else WHOLE


def _lines(path: Path, source: str, size: int) -> Iterator[Stretch]:
    before = 0
    with open_binary(path) as stream:
        start = stream.tell()
        while piece := stream.read(size):
            lines, end = piece.count(b"\n"), start + len(piece)
            if not piece.endswith(b"\n"):
                rest = stream.readline(LONGEST)
                lines, end = lines + rest.endswith(b"\n"), end + len(rest)
            yield Stretch(path, source, LINES, start, end, before)
            start, before = end, before + lines


def _groups(path: Path, source: str, size: int) -> Iterator[Stretch]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError, ValueError):  # reading it says what is wrong with it
        yield Stretch(path, source, WHOLE)
        return
    start = before = rows = weight = 0
    for k in range(metadata.num_row_groups):
        group = metadata.row_group(k)
        rows, weight = rows + group.num_rows, weight + group.total_byte_size
        if weight >= size or k + 1 == metadata.num_row_groups:
            yield Stretch(path, source, GROUPS, start, k + 1, before)
            start, before, rows, weight = k + 1, before + rows, 0, 0
