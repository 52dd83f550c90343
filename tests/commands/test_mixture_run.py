"""`lowalign sft` on a mixture: shares and losses by source in the metrics, and a resumed run that is the same."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lowalign.cli import main
from lowalign.config.sections import AdapterConfig, DataConfig, TrainConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import load_examples
from lowalign.methods.sft import SFT
from lowalign.model.host import Host
from lowalign.model.policy import add_fresh
from tests.commands.tiny_runs import FP32, load
from tests.tiny import tiny_folder

WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    tiny_folder(folder / "model", "llama")
    for name, size in (("chat", 30), ("refusals", 5)):
        rows = [
            {"prompt": f"what is {i} of the {name}", "completion": f"the {name} " * (i % 3 + 1)} for i in range(size)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(world: Path, out: Path, *more: str) -> list[dict]:
    data = [str(world / "chat.jsonl"), str(world / "refusals.jsonl")]
    command = [
        "sft",
        "--model",
        str(world / "model"),
        "--data",
        *data,
        "--data.weights",
        "3",
        "1",
        "--out",
        str(out),
        *FP32,
    ]
    options = {"batch-size": 8, "schedule": "constant", "save-every": 3, "learning-rate": "1e-3", "optimizer": "adamw"}
    assert main([*command, *(f"--train.{name}={value}" for name, value in options.items()), *more]) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_shares_losses_and_resume(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(world, tmp_path / "whole", "--train.steps", "6")
    said = capsys.readouterr().err
    assert "chat: 75.0% of the examples, 30 rows" in said and "realised shares: chat 75.00%, refusals 25.00%" in said
    for line in lines:
        assert line["share/chat"] == pytest.approx(0.75, abs=0.03) and line["share/chat"] + line["share/refusals"] == 1
        low, high = sorted((line["loss/chat"], line["loss/refusals"]))
        assert low <= line["loss"] <= high
    stored = json.loads((tmp_path / "whole/data_report.json").read_text())["train"]["mixture"]
    assert stored == {"chat": 0.75, "refusals": 0.25}
    run(world, tmp_path / "parts", "--train.steps", "4")
    resumed = run(world, tmp_path / "parts", "--train.steps", "6", "--resume")
    names = [name for name in lines[-1] if "/" in name or name == "loss"]
    assert [[line[name] for name in names] for line in resumed] == [[line[name] for name in names] for line in lines]
    whole, parts = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert all(bool((whole[name] == parts[name]).all()) for name in whole)


def test_the_loss_of_a_source_is_that_of_its_rows_alone(world: Path) -> None:
    base = load(world / "model")
    host, config = Host(base), DataConfig(cache=False)
    add_fresh(host, "policy", AdapterConfig(), ())
    files = [str(world / "chat.jsonl"), str(world / "refusals.jsonl")]
    rows = load_examples(files, Chat(base.tokenizer), config).examples
    method = SFT(host, rows, ("policy",), TrainConfig())
    _, metrics = method.loss(rows, method.normalizers(rows))
    for name in ("chat", "refusals"):
        own = [row for row in rows if row.dataset == name]
        for row in own:
            row.dataset = ""
        alone, only = method.loss(own, method.normalizers(own))
        assert list(only) == ["loss"] and metrics[f"loss/{name}"].item() == pytest.approx(alone.item(), rel=1e-5)
