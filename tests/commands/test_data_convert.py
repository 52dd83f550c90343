"""`lowalign data convert` and `lowalign data presets`."""

import gzip
import json
from pathlib import Path

import pytest

from lowalign.cli import main
from lowalign.data.rows.mapping import Mapping
from lowalign.data.rows.normalised import normalised
from lowalign.data.rows.preference_rows import PREFERENCE_ROWS
from lowalign.data.rows.sft_rows import SFT_ROWS


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_of_a_published_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "hh.jsonl.gz", tmp_path / "rows.jsonl"
    turns = "\n\nHuman: hi\n\nAssistant:"
    rows = [{"chosen": f"{turns} yes", "rejected": f"{turns} no"}, {"chosen": turns, "rejected": f"{turns} no"}]
    source.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert main(["data", "convert", str(source), "--out", str(out), "--data.preset", "hh-rlhf"]) == 0
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant"}
    conversations = {
        name: [user, assistant | {"content": text}] for name, text in (("chosen", "yes"), ("rejected", "no"))
    }
    assert read(out) == [conversations]
    assert "1 rows left out: an answer is empty" in capsys.readouterr().err


def test_bad_rows_leave_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "rows.csv", tmp_path / "out.jsonl"
    source.write_text("prompt,completion\na,b\nc,\n")
    command = ["data", "convert", str(source), "--out", str(out)]
    assert main(command) == 1
    assert f'{source}:3: "completion" is empty' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]
    assert main([*command, "--data.on-error", "skip"]) == 0
    assert read(out) == [{"prompt": "a", "completion": "b"}]
    assert main(command) == 1
    assert "exists; --out is a new file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["alpaca_en_demo.json", "dpo_en_demo.json", "glaive_toolcall_en_demo.json", "v1_dpo_demo.jsonl"]
)
def test_converted_rows_mean_the_same(shared: Path, tmp_path: Path, name: str) -> None:
    formats = PREFERENCE_ROWS if "dpo" in name else SFT_ROWS
    source = shared / "data" / name
    once, twice = tmp_path / "once.jsonl", tmp_path / "twice.jsonl"
    assert main(["data", "convert", str(source), "--out", str(once)]) == 0
    assert main(["data", "convert", str(once), "--out", str(twice)]) == 0
    assert read(once) == read(twice)
    before, after = (
        [normalised(formats.parse(row.data)) for row in Mapping().rows(str(file))] for file in (source, once)
    )
    assert before == after


def test_presets_are_listed_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "presets"]) == 0
    listed = capsys.readouterr().out
    assert "dolly" in listed and "templates/summarisation" in listed
    assert main(["data", "presets", "gsm8k"]) == 0
    assert "columns: {instruction: question, output: answer}" in capsys.readouterr().out
    (tmp_path / "own.yaml").write_text("columns: {prompt: q, completion: a}")
    assert main(["data", "presets", str(tmp_path / "own.yaml")]) == 0
    assert capsys.readouterr().out == "columns: {prompt: q, completion: a}"
    assert main(["data", "presets", "gsm9k"]) == 1
    assert "there is no preset gsm9k; did you mean gsm8k?" in capsys.readouterr().err
