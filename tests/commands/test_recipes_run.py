"""Every recipe, run for two steps on a tiny base, from the command line to the adapter that stock peft loads."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lowalign.cli import main
from lowalign.config import recipe
from lowalign.config.training import PPOConfig, SFTConfig
from tests.tiny import tiny_folder

ADAPTERS = Path(__file__).parents[2] / "adapters"
RECIPES = sorted(ADAPTERS.rglob("sft.yaml"))
PPO_RECIPES = sorted(ADAPTERS.rglob("ppo.yaml"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    dialogues = [
        ("What is the capital of France?", "Paris."),
        ("Who jumps?", "The quick brown fox."),
        ("Where?", "There."),
    ]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in dialogues * 4]
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_two_steps(path, base, rows, tmp_path, capsys):
    out = tmp_path / "run"
    name = f"{path.parent.name}/{path.stem}"
    flags = [
        "--model",
        str(base),
        "--data",
        str(rows),
        "--out",
        str(out),
        "--train.steps",
        "2",
        "--train.save-every",
        "1",
    ]
    assert main(["sft", name, *flags]) == 0, capsys.readouterr().err

    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps if "loss" in line)

    assert recipe.parse(SFTConfig, [], out / "recipe.yaml") == recipe.parse(SFTConfig, flags, path)

    ids = torch.arange(5, 25)[None]
    stock = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        before = stock(ids).logits
        after = PeftModel.from_pretrained(stock, out / "adapter")(ids).logits
    assert not torch.equal(before, after[:, -20:])

    answers = tmp_path / "answers.jsonl"
    ask = [
        "--model",
        str(base),
        "--adapter",
        str(out),
        "--prompt",
        "Where?",
        "--n",
        "2",
        "--sampling.max-new-tokens",
        "4",
    ]
    assert main(["generate", *ask, "--out", str(answers)]) == 0, capsys.readouterr().err
    drawn = [json.loads(line) for line in answers.read_text().splitlines()]
    asked = [{"role": "user", "content": "Where?"}]  # the adapter was trained on turns of a chat
    assert [(row["prompt"], type(row["completion"])) for row in drawn] == [(asked, str)] * 2


@pytest.mark.parametrize("path", PPO_RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_two_rounds_of_ppo(path, base, rows, tmp_path, capsys):
    reward, out = tmp_path / "length.py", tmp_path / "run"
    reward.write_text("def letters(prompts, completions):\n    return [len(text) for text in completions]\n")
    flags = ["--model", str(base), "--data", str(rows), "--reward", f"{reward}:letters", "--out", str(out)]
    flags += ["--rollout.prompts", "2", "--rollout.samples", "2", "--train.batch-size", "1", "--ppo.epochs", "1"]
    # Random weights end nothing of their own accord.
    flags += ["--sampling.max-new-tokens", "6", "--rollout.missing-eos", "keep"]
    assert main(["ppo", f"{path.parent.name}/ppo", *flags]) == 0, capsys.readouterr().err

    # Three prompts, once each (epochs: 1), two at a time: two rounds of two steps.
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)
    assert recipe.parse(PPOConfig, [], out / "recipe.yaml") == recipe.parse(PPOConfig, flags, path)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [line["round"] for line in samples] == [0, 0, 1, 1]
    assert all(line["reward"] == len(line["completion"]) for line in samples)

    ids = torch.arange(5, 25)[None]
    stock = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        before = stock(ids).logits
        after = PeftModel.from_pretrained(stock, out / "adapter")(ids).logits
    assert not torch.equal(before, after[:, -20:])


def test_a_changed_recipe_is_not_resumed(base, rows, tmp_path, capsys):
    run = ["sft", "prompt/sft", "--model", str(base), "--data", str(rows), "--out", str(tmp_path / "run")]
    assert main([*run, "--train.steps", "1"]) == 0, capsys.readouterr().err
    assert main([*run, "--train.steps", "2", "--resume", "--train.learning-rate", "0.5"]) == 1
    assert "train.learning_rate: 0.03 -> 0.5" in capsys.readouterr().err
    assert main([*run, "--train.steps", "2", "--resume"]) == 0, capsys.readouterr().err
