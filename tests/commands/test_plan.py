"""`lowalign plan` on tiny configs: what it prints, finds, writes and refuses."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowalign import cli
from lowalign.config import recipe
from lowalign.config.training import PPOConfig, SFTConfig
from lowalign.plan import several_cards
from tests.tiny import CONFIGS, tiny_folder

KEYS = {
    "peak_gib", "components", "fits", "tokens_per_second", "max_length", "token_budget", "kernels", "bytes_moved_gb",
    "cpu_gib",
}  # fmt: skip
SHAPE = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 2, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with a config.json and nothing else. Searches end at small micro-batches."""
    monkeypatch.setattr("lowalign.plan.planner.MOST_TOKENS", 4096)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"](**SHAPE).to_dict()))
    return str(tmp_path)


def planned(capsys, *words):
    """The report of a plan that succeeds."""
    assert cli.main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("verb", ["sft", "reward", "dpo", "ppo", "best_of_n"])
@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_every_recipe_has_a_plan(verb, kind, model, capsys):
    report = planned(capsys, f"{kind}/{verb}", "--model", model, "--length", "256")
    assert report.keys() >= KEYS
    assert report["verb"] == verb.replace("_", "-") and report["fits"] and report["predicted_by"] == "dry run"
    assert sum(report["components"].values()) == pytest.approx(report["peak_gib"], abs=0.01)
    assert {"base"} < report["components"].keys()
    assert ("sampling" in report["phases"]) == (verb in ("ppo", "best_of_n"))


def test_the_options_of_the_verb_hold(model, capsys):
    words = ["lora/sft", "--model", model, "--length", "2048"]
    on = planned(capsys, *words)
    off = planned(capsys, *words, "--train.checkpointing", "off")
    offload = planned(capsys, *words, "--train.checkpointing", "offload")
    # Of two layers, the copies that are under way take as much as their inputs: 2,048 · 256 in 16 bit, 0.001 GiB.
    assert offload["peak_gib"] - 0.0015 <= on["peak_gib"] < off["peak_gib"]
    assert on["kernels"] > off["kernels"]  # nothing is computed again
    assert on["cpu_gib"] == off["cpu_gib"] == 0 < offload["cpu_gib"]
    assert planned(capsys, *words, "--adapter.r", "64")["trained_weights"] == 4 * on["trained_weights"]
    fast, slow = (planned(capsys, *words, "--card", card)["tokens_per_second"] for card in ("H100", "L4"))
    assert fast > 2 * slow


def test_the_largest_that_fits_and_its_recipe(model, tmp_path, capsys):
    """One grain more does not fit; the recipe is one of the verb, and has what was found."""
    file = tmp_path / "fits.yaml"
    words = ["lora/sft", "--model", model, "--train.learning-rate", "3e-4"]
    found = planned(capsys, *words, "--vram", "1290MiB", "--write", str(file))
    assert 512 < found["max_length"] < 4096
    for length, fits in ((found["max_length"], True), (found["max_length"] + 128, False)):
        report = planned(capsys, *words, "--length", str(length))
        assert (report["peak_gib"] + 1.2 <= 1290 / 1024) == fits
    written = recipe.parse(SFTConfig, ["--out", "o"], file)
    assert (written.data.max_length, written.train.token_budget) == (
        min(2048, found["max_length"]),
        found["token_budget"],
    )
    assert written.train.learning_rate == 3e-4 and written.model == model
    again = planned(capsys, str(file))  # a complete recipe, as a run writes it
    assert (again["length"], again["token_budget"]) == (written.data.max_length, found["token_budget"])
    assert cli.main(["plan", *words, "--vram", "1GiB", "--write", str(file)]) == 1
    assert "exists and is not overwritten" in capsys.readouterr().err


def test_what_does_not_fit_is_said(model, capsys):
    report = planned(capsys, "lora/sft", "--model", model, "--vram", "1200MiB")
    assert (report["fits"], report["max_length"], report["token_budget"]) == (False, None, None)
    assert cli.main(["plan", "lora/sft", "--model", model, "--vram", "1200MiB"]) == 0
    assert "no length fits in 1.17 GiB" in capsys.readouterr().out


def test_rank(model, capsys):
    found = planned(capsys, "--model", model, "--length", "512", "--vram", "1300MiB", "--rank")
    assert found["max_rank"] % 8 == 0 and 8 <= found["max_rank"] < 512


def test_in_words(model, capsys):
    assert (
        cli.main(["plan", "lora/ppo", "--model", model, "--data.max-length", "64", "--sampling.max-new-tokens", "64"])
        == 0
    )
    text = capsys.readouterr().out
    for part in ("predicted by a dry run", "base", "peak of: sampling", "RTX 4090", "s a round", "a checkpoint"):
        assert part in text


def test_several_cards(model, capsys):
    """The time of the largest share and of the sum of the gradients, worked by hand; the memory of one card."""
    words = ["lora/sft", "--model", model, "--length", "256", "--train.batch-size"]
    one, share = planned(capsys, *words, "16"), planned(capsys, *words, "6")
    three = planned(capsys, *words, "16", "--cards", "3", "--link-bandwidth", "0.01")
    assert (one["cards"], one["all_reduce_seconds"], one["examples_per_card"]) == (1, 0, 16)
    ring = 2 * (3 - 1) / 3 * 4 * three["trained_weights"] / 0.01e9
    assert three["all_reduce_seconds"] == pytest.approx(ring, abs=1e-4) and three["examples_per_card"] == 6
    assert three["step_seconds"] == pytest.approx(share["step_seconds"] + ring, abs=2e-3)
    assert three["tokens_per_second"] == pytest.approx(16 * 256 / three["step_seconds"], rel=0.01)
    assert three["peak_gib"] == one["peak_gib"] and three["components"] == one["components"]
    ppo = several_cards.share(PPOConfig("m", Path("o")), 3)
    assert (ppo.train.batch_size, ppo.rollout.prompts) == (6, 12)  # of 16 and 32
    steps = SimpleNamespace(phases=[SimpleNamespace(name="optimizer step", repeats=4)], trained=10**9)
    assert (
        several_cards.all_reduce_seconds(steps, 2, 8.0) == 4 * 0.5
    )  # 4 GB of fp32 gradients, each card sends them once
    assert cli.main(["plan", "--model", model, "--length", "256", "--cards", "2"]) == 0
    assert "2 × RTX 4090" in (text := capsys.readouterr().out) and "at most 8 of a step's examples" in text
    assert cli.main(["plan", "lora/best_of_n", "--model", model, "--cards", "2"]) == 1
    assert "--cards is for commands that train in several processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,message",
    [
        (["--card", "RTX 4091"], "did you mean RTX 4090"),
        (["--vram", "much"], "expected a size such as 24GB"),
        (["--rank"], "--rank goes with --vram"),
        (["--length", "1"], "it must be at least 2"),
        (["--cards", "0"], "it must be at least 1"),
        (["--length", "9000"], "the model has positions for 4,096"),
        (["--vram", "1GB", "--rank", "--adapter.kind", "prefix"], "prefix has no rank"),
        (["--adapter.kind", "lola"], "--adapter.kind: expected one of lora, prompt, prefix, not 'lola'"),
    ],
)
def test_refusals(words, message, model, capsys):
    assert cli.main(["plan", "--model", model, *words]) == 1
    assert message in capsys.readouterr().err


def test_a_recipe_of_another_verb(model, tmp_path, capsys):
    (tmp_path / "judge.yaml").write_text("verb: judge\n")
    assert cli.main(["plan", str(tmp_path / "judge.yaml"), "--model", model]) == 1
    assert "judge.yaml:1: plan is for sft, reward, dpo, ppo, best-of-n, not for judge" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [None, "{", json.dumps({"model_type": "none such"}), json.dumps({"auto_map": {"a": "b"}})]
)
def test_a_folder_that_is_no_model(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert cli.main(["plan", "--model", str(tmp_path)]) == 1
    assert "lowalign: " in (error := capsys.readouterr().err) and "Traceback" not in error


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "qwen3_moe", "bloom"])
def test_other_architectures(kind, tmp_path, capsys):
    """Packed or row by row, with windows, soft caps, experts."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[kind]().to_dict()))
    report = planned(capsys, "lora/sft", "--model", str(tmp_path), "--length", "128")
    assert report["components"].keys() >= {"base"} and report["kernels"] > 100


def test_no_weight_is_read(tmp_path, capsys):
    """The same plan with and without weights beside the config."""
    folder = tiny_folder(tmp_path / "whole")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    reports = [planned(capsys, "--model", str(path), "--length", "128") for path in (folder, tmp_path)]
    assert {**reports[0], "model": ""} == {**reports[1], "model": ""}
