"""The same rows out of every kind of source, and a message with its place for what is wrong in one."""

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lowalign.data.rows.mapping import Mapping
from lowalign.data.sources import read
from lowalign.data.sources.read import content_hash, read_rows, source_hashes
from lowalign.data.sources.row import BadRow
from lowalign.errors import UserError

ROWS = [
    {"prompt": "What is it?", "completion": 'A "cat", she said.'},
    {"prompt": "two\nlines", "completion": "é\u2028 💡"},
    {"prompt": "[1, 2]", "completion": "{}"},
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def delimited(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


CONTENTS = {
    "rows.jsonl": JSONL,
    "rows.json": json.dumps(ROWS, indent=1).encode(),
    "rows.csv": delimited(","),
    "rows.tsv": b"\xef\xbb\xbf" + delimited("\t"),
    "rows.jsonl.gz": gzip.compress(JSONL),
    "rows.json.xz": lzma.compress(json.dumps(ROWS).encode()),
    "rows.csv.bz2": bz2.compress(delimited(",")),
    "rows.jsonl.zst": zstd(JSONL),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_texts_packed_or_not(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTENTS[name])
    assert [row.data for row in Mapping().rows(str(tmp_path / name))] == ROWS


def test_lines_of_a_table_are_those_in_which_rows_begin(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(CONTENTS["rows.csv"])
    assert [row.line for row in read_rows(str(tmp_path / "rows.csv"))] == [2, 3, 5]


def test_parquet_and_arrow(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{**row, "n": [{"k": i}]} for i, row in enumerate(ROWS)])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table)
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("rows.parquet", "file.arrow", "stream.arrow"):
        rows = read_rows(str(tmp_path / name))
        assert [row.data for row in rows] == [{**row, "n": [{"k": i}]} for i, row in enumerate(ROWS)]
        assert [row.where for row in rows] == [f"{tmp_path / name}:{n}" for n in (1, 2, 3)]


def test_saved_datasets_with_split_and_slice(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([2])).save_to_disk(tmp_path / "two")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert [row.data for row in read_rows(one)] == [row.data for row in read_rows(two)] == ROWS
    assert [(row.where, row.data) for row in read_rows(f"{two}:test")] == [(f"{two}:test:1", ROWS[2])]
    assert [row.data for row in read_rows(f"{two}:train[1:]")] == ROWS[1:]
    assert [row.data for row in read_rows(f"{two}:train[:34%]")] == ROWS[:1]
    assert content_hash(one) != content_hash(two)
    with pytest.raises(UserError, match=f"{two} has no split dev; write {two}:SPLIT, of train, test"):
        read_rows(f"{two}:dev")
    assert [row.data for row in read_rows(f"{one}:train[:1]")] == ROWS[:1]
    with pytest.raises(UserError, match=f"{one} has no split dev: it is one dataset"):
        read_rows(f"{one}:dev")


def test_folders_and_globs(tmp_path: Path) -> None:
    """Files by name, also below; descriptions of data sets and hidden files are no rows."""
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b/2.jsonl", "1.csv", ".git/3.jsonl"):
        (tmp_path / name).write_bytes(CONTENTS["rows.csv" if name.endswith("csv") else "rows.jsonl"])
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("# rows")
    places = [f"{tmp_path}/1.csv:{n}" for n in (2, 3, 5)] + [f"{tmp_path}/b/2.jsonl:{n}" for n in (1, 2, 3)]
    assert [row.where for row in read_rows(str(tmp_path))] == places
    assert [row.where for row in read_rows(f"{tmp_path}/**/*.jsonl")] == places[3:]
    assert len(read_rows(str(tmp_path), 4)) == 4
    assert list(source_hashes(str(tmp_path))) == [f"{tmp_path}/1.csv", f"{tmp_path}/b/2.jsonl"]


def test_standard_input_can_be_read_more_than_once(tmp_path: Path) -> None:
    code = (
        "from lowalign.data.sources.read import read_rows, source_hashes\n"
        "print([row.where for row in read_rows('-')], len(read_rows('-')), list(source_hashes('-')))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=JSONL, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "['-:1', '-:2', '-:3'] 3 ['-']"


def test_a_terminal_is_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    read._standard_input.cache_clear()
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="which is a terminal: pipe JSON or JSONL into the command"):
        read_rows("-")


BAD_CELLS = {
    'a,b\n1,"x\n': (2, "not a row of cells: unexpected end of data"),
    "a,b\n1,2\n1\n": (3, "1 cells, and the header has 2"),
    "a,b\n1,2,3\n": (2, "3 cells, and the header has 2"),
}


@pytest.mark.parametrize("text", BAD_CELLS)
def test_bad_rows_of_a_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    (bad,) = [row for row in read_rows(str(path)) if isinstance(row, BadRow)]
    line, message = BAD_CELLS[text]
    assert str(bad) == f"{path}:{line}: {message}"


def test_bytes_that_are_not_utf8_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"a\n\xffx\nok\n")
    bad, good = read_rows(str(path))
    assert str(bad) == f"{path}:2: not valid UTF-8" and bad.raw == r"\xffx" and good.data == {"a": "ok"}


def damaged(content: bytes) -> bytes:
    return content[: len(content) // 2]


UNREADABLE = {
    "a.csv": (b"a,a\n1,2\n", r':1: the column "a" is in the header more than once'),
    "b.csv": (b"a;b\n1;2\n", r":1: the header has one column, 'a;b': .csv is separated by commas"),
    "c.jsonl.gz": (damaged(CONTENTS["rows.jsonl.gz"]), ": damaged or cut off"),
    "d.json.xz": (damaged(CONTENTS["rows.json.xz"]), ": damaged or cut off"),
    "e.jsonl.zst": (b"no zstd", ": cannot be read"),
    "f.jsonl.gz": (b"no gzip", ": damaged or cut off"),
    "g.parquet": (b"PAR1 no parquet PAR1", ": not a whole Parquet file"),
    "h.arrow": (b"\xff\xff\xff\xff\x10", ": not a whole Arrow file"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(str(tmp_path / name))
    assert str(caught.value).startswith(f"{tmp_path / name}")


def test_a_row_as_long_as_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowalign.data.sources.streams.LONGEST", 2**20)
    (tmp_path / "rows.jsonl").write_text('{}\n{"' + "a" * 2**20 + '": 1}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2: a line of more than 1 MiB; write one row per line"):
        read_rows(str(tmp_path / "rows.jsonl"))


def test_values_of_tables_that_are_no_texts(tmp_path: Path) -> None:
    turns = json.dumps([{"role": "user", "content": "a"}])
    cells = {
        "messages": turns,
        "score": "0.5",
        "label": "True",
        "margin": "",
        "prompt": "3",
        "completion": "[1]",
        "tools": "",
    }
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, cells)
        writer.writeheader()
        writer.writerow(cells)
    (row,) = Mapping().rows(str(tmp_path / "rows.csv"))
    assert row.data == {
        "messages": [{"role": "user", "content": "a"}],
        "score": 0.5,
        "label": True,
        "margin": None,
        "prompt": "3",
        "completion": "[1]",
        "tools": None,
    }


def test_half_a_character_in_a_cell(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('messages\n"[{""role"": ""user"", ""content"": ""\\ud83d""}]"\n')
    (bad,) = Mapping().rows(str(tmp_path / "rows.csv"))
    assert str(bad) == f"{tmp_path}/rows.csv:2: \\ud83d is half of a surrogate pair, not a character"
