"""The benchmarks in their tiny form on the CPU: the same code, so that it runs when there is a card, or time."""

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_peers_in_their_tiny_form(tmp_path):
    out = tmp_path / "tiny.json"
    command = [sys.executable, ROOT / "benchmarks" / "peers.py", "--tiny", "--case", "dpo", "reward4"]
    command += ["--allocator", "glibc", "--warmup", "0", "--pairs", "2", "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=600)
    results = json.loads(out.read_text())["results"]
    assert [result["case"] for result in results] == ["dpo", "reward4"]
    for result in results:
        peers = {"plain", "plain-cached"} if result["case"] == "dpo" else {"plain"}
        assert result["contestants"].keys() == peers | {"lowalign"}
        assert result["fastest_peer"] in peers and result["to_fastest_peer"] > 0
        for contestant in result["contestants"].values():
            assert contestant["cpu_seconds"] > 0 and contestant["peak_mb"] > contestant["rss_before_mb"] / 2
            assert abs(contestant["first_loss"] - math.log(2)) < 0.1  # the loss before anything is learned
            # The same model, rows and steps in 16 bit, padded or packed.
            assert contestant["largest_loss_difference"] < 0.01


@pytest.mark.slow
def test_ppo_contestant_in_its_tiny_form(tmp_path):
    """lowalign's side of the case ppo, in a process of its own; the other side needs another environment."""
    from cases import make_model
    from peers import Contestant

    make_model(tmp_path / "model", "tiny")
    options = Namespace(tiny=True, warmup=0, pairs=2, checkpointing="off", attention="eager")
    contestant = Contestant("lowalign", "ppo", "tiny", tmp_path, options, "glibc")
    try:
        contestant.ready()
        contestant.step()
        contestant.step()
    finally:
        contestant.stop()
    assert len(contestant.steps) == 2 and contestant.start["threads"] == 1
    for step in contestant.steps:
        assert step["cpu"] > 0 and step["peak"] >= contestant.start["rss"]
        # Whitened advantages have mean 0, so at a ratio near 1 the steps of a round make about 0 on average.
        assert abs(step["loss"]) < 0.1


def test_a_random_base_carries_the_same_lora_as_a_loaded_one(tmp_path):
    """peft chooses its class by a mark of the model: without it the benchmark would measure another layer."""
    from random_base import TINY, random_base

    from lowalign import Base, Host
    from lowalign.config.sections import AdapterConfig
    from lowalign.model.adapters.kinds import peft_config
    from tests.tiny import tiny_folder

    kinds = []
    for base in (random_base("tiny", TINY["tiny"], "cpu"), Base.load(tiny_folder(tmp_path), device="cpu", quiet=True)):
        host = Host(base)
        host.add("policy", peft_config(AdapterConfig()))
        kinds.append(type(base.model.model.layers[0].mlp.up_proj))
    assert kinds[0] is kinds[1] and kinds[0].__name__ == "Linear4bit"


def test_plan_benchmark_in_its_tiny_form(monkeypatch, capsys):
    """One setting against the allocator, and one line of the table."""
    import plan

    monkeypatch.setattr(plan, "SETTINGS", plan.SETTINGS[:1])
    monkeypatch.setattr(plan, "METHODS", {"SFT": plan.METHODS["SFT"]})
    for words in (["validate"], ["table", "--models", "Llama-3.1-8B"]):
        monkeypatch.setattr(sys, "argv", ["plan.py", "--tiny", *words])
        plan.main()
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    setting, length = rows[1], rows[3]
    assert setting[1].strip() == "SFT, LoRA" and abs(float(setting[4].strip(" %"))) < 2
    assert length[1].strip() == "Llama-3.1-8B" and [cell.strip() for cell in length[4:7]] == ["128*"] * 3


def test_a_recording_keeps_lines_and_three_states_of_each_bar():
    """Lines are written above a bar, which is erased and drawn again; the bar of a part is a line below it."""
    from recording import shown

    def nested(text: str) -> str:
        return f"\r\n\r{text}\x1b[A"

    screen = "loaded\r\n\r  0%|   | 0/4 [00:00<?]" + nested("reading: 40row [00:01]") + nested("reading: 90row [00:02]")
    screen += nested(" " * 22) + "\r" + " " * 25 + "\rstep 0/4  \x1b[1meval/loss\x1b[0m 2\r\n\r  0%|   | 0/4 [00:01<?]"
    for i in (1, 2, 3, 4):  # sampled before each step
        screen += (
            nested(f"sampling:  10%|{i}| [00:01<00:02]")
            + nested("sampling:  90%|#| [00:02<00:00]")
            + nested("scoring:   4%|#| [00:01<00:02]")
            + f"\r{25 * i}%|###| {i}/4 [00:0{i}, loss {i}]"
        )
    screen += "\r100%|###| 4/4 [00:05, loss 4]\r\ndone\r\n"
    assert shown(screen) == [
        "loaded",
        "  0%|   | 0/4 [00:00<?]",
        "reading: 40row [00:01]",
        "reading: 90row [00:02]",
        "step 0/4  eval/loss 2",
        "sampling:  10%|1| [00:01<00:02]",
        "sampling:  90%|#| [00:02<00:00]",
        "scoring:   4%|#| [00:01<00:02]",
        "50%|###| 2/4 [00:02, loss 2]",
        "100%|###| 4/4 [00:05, loss 4]",
        "done",
    ]


def test_a_recording_has_the_bar_of_a_terminal(tmp_path, monkeypatch):
    from recording import on_a_terminal, shown

    bar = "import sys, tqdm; from lowalign.log import log, progress\nfor i in progress(iterable=range(3)): log(f'line {i}')"
    lines = shown(on_a_terminal([sys.executable, "-c", bar]))
    assert [line for line in lines if line.startswith("line ")] == ["line 0", "line 1", "line 2"]
    assert lines[0].startswith("  0%|    ") and lines[-1].startswith("100%|████") and len(lines[-1]) > 100
