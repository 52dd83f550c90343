"""The rows of what --data names: a file, a folder, a glob, `-` (standard input), or a Hub dataset.

Only UserError is ever raised; a line that is no row becomes a BadRow.
"""

import atexit
import difflib
import glob
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from lowalign.data.sources.hub import HUB_ID, HubSource, SavedSource, saved_source
from lowalign.data.sources.json_rows import json_rows
from lowalign.data.sources.row import BadRow, Row
from lowalign.data.sources.streams import COMPRESSED
from lowalign.data.sources.tables import arrow_rows, delimited_rows, parquet_rows
from lowalign.durable import file_hash
from lowalign.errors import UserError

STDIN = "-"
TEXTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
SUFFIXES = (*TEXTS, *(text + packed for text in TEXTS for packed in COMPRESSED), ".parquet", ".arrow")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # in folders of datasets


@dataclass(frozen=True)
class FileSource:
    """One file, or the files of a folder or glob, in the order of their names."""

    name: str
    files: tuple[Path, ...]

    def rows(self, limit: int | None = None) -> Iterator[Row | BadRow]:
        """All rows, or the first `limit`."""
        return islice((row for file in self.files for row in file_rows(file, self.name)), limit)


Source = FileSource | SavedSource | HubSource


def find_source(name: str) -> Source:
    """What `name` means. Raises UserError when it is nothing that rows can be read from."""
    if name == STDIN:
        return FileSource(STDIN, (_standard_input(),))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix and _suffix(path) not in SUFFIXES and path.suffix not in SUFFIXES:
            raise UserError(
                f"{name}: cannot read {path.suffix} files; rows can be in {', '.join(TEXTS)}, .parquet, .arrow"
            )
        return FileSource(name, (path,))
    if saved := saved_source(name):
        return saved
    if path.is_dir():
        return FileSource(name, _files_in(path))
    if HUB_ID.fullmatch(name) and not (path.suffix in SUFFIXES or _suffix(path) in SUFFIXES):
        return HubSource(name)
    if glob.has_magic(name):
        return FileSource(name, _matching(name))
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, 1)
    raise UserError(f"{name}: no such file" + (f"; did you mean {path.with_name(close[0])}?" if close else ""))


def read_rows(name: str, limit: int | None = None) -> list[Row | BadRow]:
    """All rows of a source, or the first `limit`. Raises UserError when it cannot be read."""
    return list(iter_rows(name, limit))


def iter_rows(name: str, limit: int | None = None) -> Iterator[Row | BadRow]:
    """As `read_rows`, one row after the other."""
    return find_source(name).rows(limit)


def source_hashes(name: str) -> dict[str, str]:
    """sha256 of each file of a source, by its name; empty for Hub datasets, whose content @REVISION fixes."""
    source = find_source(name)
    if isinstance(source, HubSource):
        return {}
    if isinstance(source, SavedSource):
        return {str(file): file_hash(file) for file in sorted(source.folder.rglob("*")) if file.is_file()}
    return {STDIN if name == STDIN else str(file): file_hash(file) for file in source.files}


def content_hash(name: str, limit: int | None = None) -> str:
    """sha256 of all that decides the rows of a source; of a Hub dataset, of the rows."""
    digest = hashlib.sha256()
    if hashes := source_hashes(name):
        digest.update(json.dumps(hashes, sort_keys=True).encode())
    else:
        for row in iter_rows(name, limit):
            digest.update(json.dumps(row.data, default=str).encode())
    return digest.hexdigest()


def name_of(path: Path, source: str) -> str:
    """What a file is called in messages."""
    return STDIN if source == STDIN else str(path)


def file_rows(path: Path, source: str) -> Iterator[Row | BadRow]:
    """All rows of one file of a source."""
    match path.suffix if path.suffix not in COMPRESSED else Path(path.stem).suffix:
        case ".parquet":
            return parquet_rows(path)
        case ".arrow":
            return arrow_rows(path)
        case ".csv":
            return delimited_rows(path, ",")
        case ".tsv":
            return delimited_rows(path, "\t")
    return json_rows(path, name_of(path, source))


def _suffix(path: Path) -> str:
    """The last two suffixes: .jsonl.gz."""
    return "".join(path.suffixes[-2:])


def _files_in(folder: Path) -> tuple[Path, ...]:
    hidden = lambda file: any(part.startswith(".") for part in file.relative_to(folder).parts)  # noqa: E731
    files = [file for file in sorted(folder.rglob("*")) if _readable(file) and not hidden(file)]
    if not files:
        raise UserError(f"{folder} is a folder without a file of rows ({', '.join(TEXTS)}, .parquet, .arrow)")
    return tuple(files)


def _matching(pattern: str) -> tuple[Path, ...]:
    files = [Path(file) for file in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))]
    if not (files := [file for file in files if _readable(file)]):
        raise UserError(f"{pattern}: no file matches")
    return tuple(files)


def _readable(file: Path) -> bool:
    return file.is_file() and (_suffix(file) in SUFFIXES or file.suffix in SUFFIXES) and file.name not in DESCRIPTIONS


@cache
def _standard_input() -> Path:
    """A temporary file with all of standard input, which can be read only once. Raises UserError on a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("- reads rows from standard input, which is a terminal: pipe JSON or JSONL into the command")
    folder = Path(tempfile.mkdtemp(prefix="lowalign-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with (folder / "stdin").open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return folder / "stdin"
