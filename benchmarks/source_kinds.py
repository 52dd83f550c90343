"""The same rows in every kind of source that --data takes, for benchmarks/sources.py."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pyarrow
import pyarrow.parquet

from lowalign.commands.api_rows import with_files
from lowalign.data.sources import read

Row = dict[str, Any]
datasets.disable_progress_bars()


def lines(rows: list[Row]) -> bytes:
    """JSONL."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def delimited(rows: list[Row], delimiter: str) -> bytes:
    """A table with a header; lists and objects as JSON, as spreadsheets and `Dataset.to_csv` need them."""
    text, columns = io.StringIO(), dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, list(columns), delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items() if v is not None})
    return text.getvalue().encode()


def zstd(content: bytes) -> bytes:
    """Packed by pyarrow."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def _file(name: str, content: Callable[[list[Row]], bytes]) -> Callable[[Path, list[Row]], str]:
    def write(folder: Path, rows: list[Row]) -> str:
        (folder / name).write_bytes(content(rows))
        return str(folder / name)

    return write


def _complete(rows: list[Row]) -> list[Row]:
    """The rows with all columns: pyarrow takes those of the first row alone."""
    columns = dict.fromkeys((key for row in rows for key in row), None)
    return [columns | row for row in rows]


def _parquet(folder: Path, rows: list[Row]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_complete(rows)), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def _arrow(folder: Path, rows: list[Row]) -> str:
    table = pyarrow.Table.from_pylist(_complete(rows))
    with pyarrow.ipc.new_file(folder / "rows.arrow", table.schema) as file:
        file.write_table(table)
    return str(folder / "rows.arrow")


def _parts(folder: Path, rows: list[Row]) -> Path:
    for k, part in enumerate((rows[:1], rows[1:])):
        (folder / f"part{k}.jsonl").write_bytes(lines(part))
    return folder


def _saved(folder: Path, rows: list[Row]) -> str:
    datasets.DatasetDict(train=datasets.Dataset.from_list(_complete(rows))).save_to_disk(folder / "saved")
    return f"{folder / 'saved'}:train"


def _standard_input(folder: Path, rows: list[Row]) -> str:
    read._standard_input.cache_clear()
    sys.stdin = io.TextIOWrapper(io.BytesIO(lines(rows)))
    return "-"


def _from_python(folder: Path, rows: list[Row]) -> str:
    return with_files({"data": datasets.Dataset.from_list(_complete(rows))}, folder)["data"][0]


def _hub(folder: Path, rows: list[Row]) -> str:
    stored = datasets.Dataset.from_list(_complete(rows))
    datasets.load_dataset = lambda name, *_, **__: stored
    return "made/rows:train"


KINDS: dict[str, Callable[[Path, list[Row]], str]] = {
    "jsonl": _file("rows.jsonl", lines),
    "json": _file("rows.json", lambda rows: json.dumps(rows).encode()),
    "csv": _file("rows.csv", lambda rows: delimited(rows, ",")),
    "tsv": _file("rows.tsv", lambda rows: delimited(rows, "\t")),
    "parquet": _parquet,
    "arrow": _arrow,
    "gz": _file("rows.jsonl.gz", lambda rows: gzip.compress(lines(rows))),
    "xz": _file("rows.json.xz", lambda rows: lzma.compress(json.dumps(rows).encode())),
    "bz2": _file("rows.csv.bz2", lambda rows: bz2.compress(delimited(rows, ","))),
    "zst": _file("rows.jsonl.zst", lambda rows: zstd(lines(rows))),
    "folder": lambda folder, rows: str(_parts(folder, rows)),
    "glob": lambda folder, rows: f"{_parts(folder, rows)}/part*.jsonl",
    "stdin": _standard_input,
    "saved": _saved,
    "Dataset": _from_python,
    "Hub": _hub,
}
"""By the name in the table: (folder, rows) -> what --data names. Raises pyarrow's errors for rows that a table cannot hold."""


@contextmanager
def standing_in() -> Iterator[None]:
    """Within it, standard input and the Hub may be replaced; afterwards they are as before."""
    with mock.patch.object(sys, "stdin"), mock.patch.object(datasets, "load_dataset"):
        yield
    read._standard_input.cache_clear()
