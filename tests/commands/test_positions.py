"""Rows longer than the base has positions for: cut in training, left out in generating, by one rule and with counts."""

import json

import pytest

from lowalign.cli import main
from lowalign.commands.generate import _fitting
from lowalign.config.sections import AdapterConfig
from lowalign.model.positions import usable_positions
from tests.commands.tiny_runs import FP32
from tests.tiny import tiny_folder

POSITIONS = 48
LONG = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """gpt2, which fails at a position that it has no embedding for."""
    folder = tmp_path_factory.mktemp("positions")
    tiny_folder(folder / "model", "gpt2", n_positions=POSITIONS)
    tiny_folder(folder / "dynamic", "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    rows = [{"prompt": LONG, "completion": " Paris."}, {"prompt": "Who?", "completion": " A fox."}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    return folder


def test_training_cuts_to_the_positions(world, tmp_path, capsys):
    command = [
        "sft",
        "--model",
        f"{world}/model",
        "--data",
        f"{world}/rows.jsonl",
        "--out",
        str(tmp_path / "run"),
        *FP32,
    ]
    assert main([*command, "--train.steps", "1", "--train.optimizer", "adamw", "--data.no-cache"]) == 0
    error = capsys.readouterr().err
    assert "2 of 4 rows cut in the prompt" in error
    assert "a row has at most 48 tokens, the base's positions, not the 2,048 of --data.max-length" in error
    report = json.loads((tmp_path / "run/data_report.json").read_text())["train"]
    assert (report["max_length"], report["cut"]) == (POSITIONS, 2)


def test_generating_leaves_out_and_names_what_is_too_long(world, capsys):
    command = [
        "generate",
        "--model",
        f"{world}/model",
        "--data",
        f"{world}/rows.jsonl",
        "--sampling.max-new-tokens",
        "3",
        *FP32,
    ]
    assert main(command) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in said.out.splitlines()] == ["Who?", "Who?"]
    assert "2 of 4 prompts leave no room for a completion in 48 positions" in said.err
    assert f"{world}/rows.jsonl:1 (" in said.err and f"{world}/rows.jsonl:3 (" in said.err
    assert main([*command, "--data.on-error", "stop"]) == 1
    said = capsys.readouterr()
    assert not said.out and said.err.splitlines()[-1].endswith("shorten them, or --data.on-error skip")


def test_the_last_position_is_for_a_completion(world):
    """A prompt of POSITIONS - 1 tokens fits, one of POSITIONS does not: the sampler's own rule."""
    from lowalign.data.prompts import PromptRow

    rows = [PromptRow("a", f"f:{n}") for n in (POSITIONS - 1, POSITIONS)]
    ids = [[5] * (POSITIONS - 1), [5] * POSITIONS]
    assert _fitting(rows, ids, POSITIONS, "skip") == (rows[:1], ids[:1])


def test_virtual_tokens_take_positions(world):
    assert usable_positions(world / "model") == POSITIONS
    assert usable_positions(world / "model", fresh=AdapterConfig(kind="prompt", virtual_tokens=5)) == POSITIONS - 5
    assert usable_positions(world / "model", fresh=AdapterConfig(kind="lora", virtual_tokens=5)) == POSITIONS
    assert usable_positions(world / "dynamic") is None
