"""Losses by source of reward, dpo and kto: those of the source's rows alone, whatever the micro-batch."""

import json
from dataclasses import replace

import pytest

from lowalign.cli import main
from lowalign.config.sections import TrainConfig
from lowalign.config.training import DPOLossConfig, RewardLossConfig
from lowalign.data.micro_batches import micro_batches
from lowalign.durable import write_jsonl
from lowalign.methods.dpo import DPO
from lowalign.methods.fixed_data import FixedDataMethod, by_source, completions_of
from lowalign.methods.kto import KTO
from lowalign.methods.reward_model import RewardModel
from tests.commands.tiny_runs import FP32
from tests.methods.made import host_with, rankings
from tests.tiny import tiny_folder

METHODS = {
    "reward": lambda host, rows: RewardModel(host, rows, ("policy",), RewardLossConfig(centring=0.1), TrainConfig()),
    "plackett-luce": lambda host, rows: RewardModel(
        host, rows, ("policy",), RewardLossConfig(loss="plackett-luce"), TrainConfig()
    ),
    "ties": lambda host, rows: RewardModel(host, rows, ("policy",), RewardLossConfig(), TrainConfig(), ties=True),
    "dpo": lambda host, rows: DPO(host, rows, ("policy",), (), DPOLossConfig(sft=0.5), TrainConfig()),
    "orpo": lambda host, rows: DPO(host, rows, ("policy",), (), DPOLossConfig(loss="orpo"), TrainConfig()),
    "kto": lambda host, rows: KTO(host, rows, ("policy",), (), DPOLossConfig(loss="kto"), TrainConfig()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def host(folder):
    return host_with(folder, head=True)


def sums(method: FixedDataMethod, rows: list, budget: int, normalizers: dict[str, float]) -> dict[str, float]:
    """The metrics of a step, added up over its micro-batches."""
    total: dict[str, float] = {}
    for part in micro_batches(rows, budget):
        for name, value in method.loss(part, normalizers)[1].items():
            total[name] = total.get(name, 0.0) + float(value)
    return total


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_of_a_source_is_that_of_its_rows_alone(host, name) -> None:
    rows = [replace(row, dataset="ab"[i % 3 == 0], weight=1 + i / 4) for i, row in enumerate(rankings())]
    rows.append(replace(rows[2], rank=[0] * len(rows[2].rank)))  # all tie
    method = METHODS[name](host, rows)
    normalizers = method.normalizers(rows)
    whole, parts = (sums(method, rows, budget, normalizers) for budget in (1000, 1))
    for source in ("a", "b"):
        own = [replace(row, dataset="") for row in rows if row.dataset == source]
        z0 = {"z0": normalizers["z0"]} if "z0" in normalizers else {}  # of the whole step
        alone = sums(method, own, 1000, method.normalizers(own) | z0)
        assert not any(key.startswith("loss/") for key in alone)
        assert whole[f"loss/{source}"] == pytest.approx(alone["loss"], rel=1e-5)
        assert parts[f"loss/{source}"] == pytest.approx(alone["loss"], rel=1e-5)
    low, high = sorted((whole["loss/a"], whole["loss/b"]))
    assert low < whole["loss"] < high


def test_places_of_sources_and_their_completions() -> None:
    rows = [replace(row, dataset=name) for row, name in zip(rankings((2, 3, 2)), "aba", strict=True)]
    assert by_source(rows) == {"a": [0, 2], "b": [1]} and completions_of(rows, [0, 2]) == [0, 1, 5, 6]
    assert by_source(rankings((2,))) == {}


@pytest.mark.parametrize(("verb", "loss"), [("reward", ()), ("dpo", ()), ("dpo", ("--dpo.loss", "kto"))])
def test_a_run_logs_them_in_training_and_on_held_out_rows(folder, tmp_path, verb, loss) -> None:
    files = [tmp_path / "chat.jsonl", tmp_path / "safety.jsonl"]
    for file in files:
        write_jsonl(
            file, [{"prompt": f"what {i}", "chosen": f"{file.stem} {i}", "rejected": f"no {i * 7}"} for i in range(6)]
        )
    words = ["--data", *map(str, files), "--data.eval", *map(str, files), "--out", str(tmp_path / "run"), *FP32, *loss]
    train = ["--train.steps", "1", "--train.batch-size", "8", "--train.optimizer", "adamw", "--data.no-cache"]
    assert main([verb, "--model", str(folder), *words, *train]) == 0
    metrics = {}
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        metrics |= json.loads(line)
    for kind in ("", "eval/"):
        low, high = sorted(metrics[f"{kind}loss/{file.stem}"] for file in files)
        assert low <= metrics[f"{kind}loss"] <= high
