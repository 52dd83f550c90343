"""Files that are cut, and several processes: the same rows, Examples and report as in one; no broken cache."""

import json
import os
import signal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lowalign.config.sections import DataConfig, PreferenceConfig
from lowalign.data import tokenizing
from lowalign.data.chat import Chat
from lowalign.data.dataset import Dataset, read_examples
from lowalign.data.preferences import PREFERENCE_ENCODER
from lowalign.data.rows.mapping import Mapping
from lowalign.data.sources.read import find_source, iter_rows
from lowalign.data.sources.stretches import LINES, WHOLE, cut, kind_of
from lowalign.errors import UserError
from tests.data import made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for files, with the cache inside it; files are large from the first byte."""
    monkeypatch.setenv("LOWALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizing, "LARGE", 1)
    monkeypatch.setattr(tokenizing, "STRETCH", 700)
    return tmp_path


LINES_OF_ALL_KINDS = [
    json.dumps({"prompt": "q", "completion": "the cat"}),
    "",
    json.dumps({"prompt": "q", "completion": "é" * 900}),
    '{"prompt": "q", "completion": NaN}',
    json.dumps({"promt": "q", "completion": "b"}),
    json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
    json.dumps({"prompt": "q", "completion": "the cat", "id": 1}),
    json.dumps({"text": "the cat sat on the mat " * 20}),
    json.dumps({"other": 1}),
]


@pytest.mark.parametrize("end", ["\n", "\n\n  \n", "", '\n{"prompt": "q'])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_stretches_are_the_whole_file(tmp_path: Path, start: str, end: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((start + "\r\n".join(LINES_OF_ALL_KINDS * 3) + end).encode())
    whole = list(iter_rows(str(path)))
    for size in (1, 17, 300, 5000, 10**6):
        stretches = list(cut(find_source(str(path)), size))
        assert [row for stretch in stretches for row in stretch.rows()] == whole
        assert len(stretches) > 20 or size > 17


def test_what_can_be_cut(tmp_path: Path) -> None:
    for name, text, kind in (
        ("a.jsonl", '{"a": 1}\n{"a": 2}', LINES),
        ("a.json", '[{"a": 1}]', WHOLE),
        ("a.json", '{\n"a": 1}', WHOLE),
        ("a.csv", "a\n1", WHOLE),
        ("a.jsonl.gz", "", WHOLE),
        ("a.jsonl", "", WHOLE),
    ):
        (tmp_path / name).write_text(text)
        assert kind_of(tmp_path / name) == kind, text
    rows = [{"prompt": f"q{i}", "completion": "a" * (i % 7)} for i in range(100)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=9)
    (tmp_path / "b.parquet").write_bytes(b"no table")
    for size, least in ((1, 12), (400, 3), (10**6, 1)):
        stretches = list(cut(find_source(str(tmp_path / "a.parquet")), size))
        assert [row for stretch in stretches for row in stretch.rows()] == list(iter_rows(str(tmp_path / "a.parquet")))
        assert len(stretches) >= least
    with pytest.raises(UserError, match="not a whole Parquet file"):
        [row for stretch in cut(find_source(str(tmp_path / "b.parquet")), 1) for row in stretch.rows()]


def read(file: Path, processes: int, config: type[DataConfig] = DataConfig, **options: object) -> Dataset:
    encoder = PREFERENCE_ENCODER if config is PreferenceConfig else None
    options = {"max_length": 60, "on_error": "skip", "processes": processes} | options
    return read_examples([str(file)], Chat(made.chatml()), config(**options), encoder=encoder)


def test_several_processes_give_the_same(folder: Path) -> None:
    """Examples, facts, bad rows with their places and formats, report; of preferences the groups too."""
    sft = folder / "rows.jsonl"
    sft.write_text("\n".join(LINES_OF_ALL_KINDS * 6))
    one, two = (read(sft, n) for n in (1, 2))
    assert one.examples == two.examples and (one.report, one.bad) == (two.report, two.bad)
    assert (one.examples.parts[0].facts == two.examples.parts[0].facts).all()
    assert len(one.bad) == 18 and one.report["files"][0]["duplicates"] > 0 and not (folder / "cache").exists()
    scores = [{"prompt": f"p{i % 5}", "completion": f"a{i}", "score": i} for i in range(60)]
    pairs = [{"prompt": "p", "chosen": f"good {i}", "rejected": "bad", "margin": i / 8} for i in range(30)]
    mixed = folder / "preferences.jsonl"
    mixed.write_text(
        "".join(json.dumps(row) + "\n" for pair in zip(scores[::2], pairs, scores[1::2], strict=True) for row in pair)
    )
    one, two = (read(mixed, n, PreferenceConfig, cache=n == 2) for n in (1, 2))
    assert one.examples == two.examples and one.report == two.report and not one.bad
    assert [len(e.completions) for e in one.examples][:3] == [12, 2, 12]
    assert read(mixed, 2, PreferenceConfig).examples == one.examples  # from the cache


def test_a_process_that_is_killed_leaves_no_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "rows.jsonl"
    file.write_text((LINES_OF_ALL_KINDS[0] + "\n") * 2000)
    messages = tokenizing.Workers.messages

    def killed(self, stretches):
        for k, message in enumerate(messages(self, stretches)):
            if k == 3:
                os.kill(self._processes[0][0].pid, signal.SIGKILL)
            yield message

    monkeypatch.setattr(tokenizing.Workers, "messages", killed)
    with pytest.raises(UserError, match=r"was ended by SIGKILL, perhaps for lack of memory.*--data.processes 1"):
        read(file, 2)
    assert not (folder / "cache").exists() or not list((folder / "cache" / "data").iterdir())


def test_small_limited_and_uncut_files_take_one_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "rows.jsonl"
    file.write_text((LINES_OF_ALL_KINDS[0] + "\n") * 50)
    count = lambda name, **options: tokenizing.process_count(  # noqa: E731
        str(name), Mapping(), DataConfig(**{"processes": 8} | options), "sft"
    )
    assert count(file) == -(-file.stat().st_size // 700) and count(file, processes=2) == 2
    assert count(file, limit=9) == 1
    (folder / "rows.csv").write_text("prompt,completion\n" + "q,a\n" * 500)
    assert count(folder / "rows.csv") == 1
    monkeypatch.setattr(tokenizing, "LARGE", 10**6)
    assert count(file) == 1
