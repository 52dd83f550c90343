"""`lowalign merge` on a run: the base it names, its exit codes, and the same call from Python."""

import json

import torch
from transformers import AutoModelForCausalLM

import lowalign
from lowalign.cli import main
from tests.tiny import tiny_folder


def make_run(folder):
    """A base and a short SFT run on it in 4 bit."""
    tiny_folder(folder / "model", "llama")
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--train.steps", "2", "--train.batch-size", "4", "--train.learning-rate", "1e-2", "--data.no-cache"]
    files = ["--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--out", str(folder / "run")]
    assert main(["sft", *files, *options]) == 0


def test_a_run_brings_its_base(tmp_path, capsys, monkeypatch):
    make_run(tmp_path)
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    assert "merged against trained on " in capsys.readouterr().err
    report = json.loads((tmp_path / "merged" / "lowalign.json").read_text())["merge"]
    assert report["onto"] == "dequantized" and report["verified"] and report["kl"] < 0.01
    assert report["adapters"][0]["method"] == "sft" and str(tmp_path) not in json.dumps(report)

    again = lowalign.merge([str(tmp_path / "run")], tmp_path / "again", max_shard_size="50KB", verify=False)
    assert not again["verified"]
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("merged", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 1
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert main(["merge", "--out", str(tmp_path / "other")]) == 1
    assert "no adapter to merge: lowalign merge RUN_OR_ADAPTER" in capsys.readouterr().err
