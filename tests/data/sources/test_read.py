"""Rows and the lines they begin on; nothing in a file can raise anything but UserError."""

import json
import random
from pathlib import Path

import datasets
import pytest

from lowalign.data.sources.read import read_rows
from lowalign.data.sources.row import BadRow, Row
from lowalign.errors import UserError


def read(path: Path, content: bytes, limit: int | None = None) -> list[tuple[int, object]]:
    path.write_bytes(content)
    return [(row.line, row.data) for row in read_rows(str(path), limit)]


def test_lines_are_the_true_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read(path, b'{"a": 1}\n\n  \n{"a": 2}\n{"a": 3}') == [(1, {"a": 1}), (4, {"a": 2}), (5, {"a": 3})]
    assert read_rows(str(path))[1].where == f"{path}:4"


def test_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    content = '\ufeff{"a": "é"}\r\n{"a": "\u2028 is no end of a line"}\r\n\r\n'.encode()
    assert read(tmp_path / "a.jsonl", content) == [(1, {"a": "é"}), (2, {"a": "\u2028 is no end of a line"})]
    assert read(tmp_path / "a.json", "\ufeff\r\n[\r\n{}\r\n]\r\n".encode()) == [(3, {})]
    assert (
        read(tmp_path / "a.json", b"") == [] == read(tmp_path / "a.json", b"[]") == read(tmp_path / "a.json", b"\n\n")
    )


def test_arrays_however_they_are_laid_out(tmp_path: Path) -> None:
    """Each row is found on the line its text was put on, with the data it was made of."""
    rng = random.Random(0)
    for _ in range(30):
        text, expected = "\n" * rng.randrange(3) + "[" + "\n" * rng.randrange(3), []
        for k in range(rng.randrange(1, 6)):
            row = {"k": k, "text": rng.choice(["a", "b\n]c", '"quoted", {', "é\u2028"]), "inner": {"list": [1, [k]]}}
            text += "," + rng.choice(["", " ", "\n", "\r\n\n"]) if k else ""
            expected.append((text.count("\n") + 1, row))
            text += json.dumps(row, indent=rng.choice([None, 1, 4]), ensure_ascii=rng.random() < 0.5)
        assert read(tmp_path / "rows.json", (text + "\n ]" + "\n" * rng.randrange(3)).encode()) == expected


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_limit_counts_bad_rows_too(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"a": 1}\n7\n{"a": 2}\n' if name == "rows.jsonl" else '[{"a": 1}, 7, {"a": 2}]')
    assert [type(row) for row in read_rows(str(path), 2)] == [Row, BadRow]
    assert [type(row) for row in read_rows(str(path), 9)] == [Row, BadRow, Row]


def hub(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> list[tuple]:
    """A Hub with one dataset, whose rows are a, b, c. Returns the list of what is asked of it."""
    calls = []

    def load_dataset(name: str, subset: str | None, *, split: str, **options: object) -> datasets.Dataset:
        calls.append((name, subset, split, options))
        if error:
            raise error
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}, {"text": "c"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_datasets_are_numbered_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch)
    rows = read_rows("someone/things", limit=2)
    assert [(row.where, row.data) for row in rows] == [
        ("someone/things:train:1", {"text": "a"}),
        ("someone/things:train:2", {"text": "b"}),
    ]
    assert [row.where for row in read_rows("things:test")] == ["things:test:1", "things:test:2", "things:test:3"]
    read_rows("openai/gsm8k:main:train[:1000]@v1.2/x")
    read_rows("a/b@main")
    read_rows("a/b:test[10%:20%]")
    safe = {"trust_remote_code": False}
    assert calls == [
        ("someone/things", None, "train", safe | {"revision": None}),
        ("things", None, "test", safe | {"revision": None}),
        ("openai/gsm8k", "main", "train[:1000]", safe | {"revision": "v1.2/x"}),
        ("a/b", None, "train", safe | {"revision": "main"}),
        ("a/b", None, "test[10%:20%]", safe | {"revision": None}),
    ]


def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, ConnectionError("cannot reach no/where\nlong story"))
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "train.txt").write_text("a,b")
    (tmp_path / "wide.json").write_text("[]", encoding="utf-16")
    (tmp_path / "wider.json").write_bytes('{"a": 1}'.encode("utf-16-le"))
    (tmp_path / "empty").mkdir()
    close = f"; did you mean {tmp_path / 'train.jsonl'}?"
    kinds = ".json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow"
    utf16 = "is not in UTF-8 (UTF-16 or UTF-32, it seems); save it as UTF-8"
    messages = {
        f"{tmp_path}/trian.jsonl": f"{tmp_path}/trian.jsonl: no such file{close}",
        f"{tmp_path}/nothing/at/all": f"{tmp_path}/nothing/at/all: no such file",
        f"{tmp_path}/empty": f"{tmp_path}/empty is a folder without a file of rows ({kinds})",
        f"{tmp_path}/*.csv": f"{tmp_path}/*.csv: no file matches",
        f"{tmp_path}/train.txt": f"{tmp_path}/train.txt: cannot read .txt files; rows can be in {kinds}",
        f"{tmp_path}/wide.json": f"{tmp_path}/wide.json {utf16}",
        f"{tmp_path}/wider.json": f"{tmp_path}/wider.json {utf16}",
        "no/where": "no/where: no such file, and as a Hub dataset (NAME:SUBSET:SPLIT@REVISION) it cannot be loaded "
        "(ConnectionError: cannot reach no/where long story)",
    }
    for name, message in messages.items():
        with pytest.raises(UserError) as caught:
            read_rows(name)
        assert str(caught.value) == message


def test_no_bytes_make_it_fall_over(tmp_path: Path) -> None:
    """Random bytes, and good files with a few bytes changed: rows, complaints or UserError, and nothing unprintable."""
    rng = random.Random(1)
    good = [
        b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00 hi"}], "n": [1.5e3, null, true]}\n' * 2,
        '\ufeff[\n {"text": "é", "a": {"b": []}},\n {"text": "\\u00e9"}\n]\n'.encode(),
    ]
    pieces = [
        b"\xff",
        b"\\ud800",
        b"NaN",
        b"\0",
        b'"',
        b"{",
        b"[",
        b"]",
        b"\n",
        b"\r",
        b"\xed\xa0\x80",
        b'{"a":1,"a":2}',
        b"9" * 5000,
    ]
    path = tmp_path / "rows.json"
    seen = {Row: 0, BadRow: 0, UserError: 0}
    for k in range(600):
        if k % 3 == 0:
            content = rng.randbytes(rng.randrange(40))
        else:
            content = bytearray(rng.choice(good))
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(content))
                content[at : at + rng.randrange(3)] = rng.choice(pieces)
        path.write_bytes(content)
        try:
            rows = read_rows(str(path))
        except UserError:
            seen[UserError] += 1
            continue
        for row in rows:
            seen[type(row)] += 1
            shown = f"{row} {row.raw}" if isinstance(row, BadRow) else json.dumps(row.data, ensure_ascii=False)
            shown.encode("utf-8")
    assert all(seen.values()), seen
