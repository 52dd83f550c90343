"""`lowalign reward` and `lowalign dpo` end to end: their files, cached reference log-probs, kill and resume, real rows."""

import hashlib
import json
import math
import random
import signal

import pytest
import torch
from safetensors.torch import load_file

from lowalign import Base, Example, Host
from lowalign.cli import main
from lowalign.data.cache import cache_folder
from lowalign.model.policy import load_stack
from tests.commands import child
from tests.tiny import WORDS, tiny_folder

KINDS = ["lora", "prompt", "prefix"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder, pairs, rankings and thumbs."""
    folder = tmp_path_factory.mktemp("world")
    tiny_folder(folder / "model", "llama")
    rng = random.Random(0)
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(2, 9)))  # noqa: E731
    user = lambda: [{"role": "user", "content": text()}]  # noqa: E731
    assistant = lambda: [{"role": "assistant", "content": text()}]  # noqa: E731
    rows = {
        "pairs": [{"prompt": user(), "chosen": assistant(), "rejected": assistant()} for _ in range(24)],
        "rankings": [{"prompt": user(), "completions": [assistant() for _ in range(4)]} for _ in range(16)],
        "thumbs": [{"prompt": user(), "completion": assistant(), "label": i % 3 == 0} for i in range(24)],
        "sft": [{"messages": user() + assistant()} for _ in range(16)],
    }
    for name, examples in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWALIGN_CACHE", str(tmp_path / "cache"))


def flags(world, verb, out, *more, data="pairs", kind="lora", steps=4) -> list[str]:
    return [
        verb, f"{kind}/{verb}", "--model", f"{world}/model", "--data", f"{world}/{data}.jsonl", "--out", str(out),
        "--train.steps", str(steps), "--train.save-every", "2", "--train.batch-size", "4", "--data.eval-rows", "4",
        "--data.no-cache", *more,
    ]  # fmt: skip


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def digest(out) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def refused(capsys, arguments) -> str:
    assert main(arguments) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_run_saves_metrics_of_its_scores(world, tmp_path, kind):
    out = tmp_path / "run"
    assert main(flags(world, "reward", out, data="rankings", kind=kind)) == 0
    meta = json.loads((out / "adapter" / "lowalign.json").read_text())
    assert meta["method"] == "reward" and meta["reward"]["pairs"] == 4 * 6
    host = Host(Base.load(world / "model", device="cpu", quiet=True))
    stack = load_stack(host, "judge", str(out))
    report = json.loads((out / "data_report.json").read_text())
    assert report["train"]["used"] == 16
    with torch.no_grad(), host.use(*stack):
        assert host.scores([Example([5], [[6], [7]])], "judge")[0].shape == (2,)


def test_the_figures_of_a_reward_run_say_what_they_were_measured_on(world, tmp_path, capsys):
    """Without held-out rows the accuracy is that of the training rows: it is 1 for random labels too."""
    for rows, what in ((4, "held-out rows"), (0, "training rows")):
        out = tmp_path / str(rows)
        assert main([*flags(world, "reward", out), "--data.eval-rows", str(rows)]) == 0
        meta = json.loads((out / "adapter" / "lowalign.json").read_text())
        assert meta["reward"]["measured_on"] == what
        assert ("scores of held-out rows: " in capsys.readouterr().err) == (rows > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_of_a_reward_model_holds_rows_out(world, tmp_path, capsys, kind):
    """A tenth of 24 rows. A file of a few rows trains too, and its figures are marked."""
    out, few = tmp_path / "a", tmp_path / "few.jsonl"
    options = ["--train.steps", "1", "--train.batch-size", "4", "--data.no-cache"]
    command = ["reward", f"{kind}/reward", "--model", f"{world}/model", *options, "--data"]
    assert main([*command, f"{world}/pairs.jsonl", "--out", str(out)]) == 0
    assert json.loads((out / "adapter" / "lowalign.json").read_text())["reward"]["pairs"] == 2
    few.write_text("".join((world / "pairs.jsonl").read_text().splitlines(keepends=True)[:6]))
    assert main([*command, str(few), "--out", str(tmp_path / "b")]) == 0
    meta = json.loads((tmp_path / "b" / "adapter" / "lowalign.json").read_text())
    assert meta["reward"]["measured_on"] == "training rows"


def test_a_reward_run_contains_the_sft_run_under_it(world, tmp_path, capsys):
    """PPO, which is proposed next, starts from that run too."""
    sft = flags(world, "sft", tmp_path / "sft", data="sft")
    assert main(sft) == 0
    assert main(flags(world, "reward", tmp_path / "reward", "--init", str(tmp_path / "sft"))) == 0
    log, runs = capsys.readouterr().err, f"--init {tmp_path}/sft --reward {tmp_path}/reward"
    assert f"Next: lowalign ppo lora/ppo --model {world}/model {runs} --data PROMPTS --out DIR\n" in log
    host = Host(Base.load(world / "model", device="cpu", quiet=True))
    stack = load_stack(host, "judge", str(tmp_path / "reward"))
    assert len(stack) == 2 and host.has_scalar_head("judge") and not host.has_scalar_head(stack[0])


def test_dpo_starts_at_ln_2_and_keeps_its_reference_on_disk(world, tmp_path, capsys):
    assert main(flags(world, "dpo", tmp_path / "a")) == 0
    stderr = capsys.readouterr().err
    assert "the LoRA starts as the base: log-probs equal on 4 examples" in stderr
    assert "the reference's log-probs of 20 examples are computed once" in stderr
    first = lines(tmp_path / "a")[0]
    assert first["eval/loss"] == pytest.approx(math.log(2), rel=1e-6) and first["eval/rewards/margins"] == 0
    # Another run on the same rows reads them, and has the same metrics.
    assert main(flags(world, "dpo", tmp_path / "b")) == 0
    stderr = capsys.readouterr().err
    assert "the reference's log-probs of 20 examples are read from" in stderr
    assert (
        "stored and recomputed values differ by at most 0.0e+00" in stderr
    )  # the packs of the first pass are the same
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    # Without the cache they come from the same packs, as long as this is the first pass.
    assert main(flags(world, "dpo", tmp_path / "c", "--reference-cache", "off")) == 0
    assert digest(tmp_path / "c") == digest(tmp_path / "a")


def test_another_reference_is_another_file(world, tmp_path, capsys):
    assert main(flags(world, "sft", tmp_path / "sft", data="sft")) == 0
    stacked = ["--init", str(tmp_path / "sft")]
    assert main(flags(world, "dpo", tmp_path / "a", *stacked)) == 0
    assert main(flags(world, "dpo", tmp_path / "b", *stacked, "--reference", "base")) == 0
    capsys.readouterr()
    assert len(list(cache_folder().glob("reference-*"))) == 4  # rows and held-out rows, twice
    assert main(flags(world, "dpo", tmp_path / "c", *stacked, "--reference", str(tmp_path / "sft"))) == 0
    assert "are read from" in capsys.readouterr().err  # the cache key is the weights, not the name
    assert digest(tmp_path / "c") == digest(tmp_path / "a") != digest(tmp_path / "b")
    assert lines(tmp_path / "a")[0]["eval/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert abs(lines(tmp_path / "b")[0]["eval/loss"] - math.log(2)) > 1e-5


def test_reference_values_of_an_interrupted_computation_are_used(world, tmp_path, capsys):
    assert main(flags(world, "dpo", tmp_path / "a")) == 0
    (whole,) = (f for f in cache_folder().glob("reference-*") if len(load_file(f)["logps"]) == 40)
    from safetensors.torch import save_file

    values = load_file(whole)["logps"]
    values[10:] = math.nan
    save_file({"logps": values}, whole)
    capsys.readouterr()
    assert main(flags(world, "dpo", tmp_path / "b")) == 0
    assert "of 15 examples are computed once" in capsys.readouterr().err
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.parametrize("kind,title", [("prompt", "soft prompt"), ("prefix", "prefix")])
def test_a_fresh_soft_prompt_logs_its_divergence(world, tmp_path, kind, title, capsys):
    assert main(flags(world, "dpo", tmp_path / "a", kind=kind)) == 0
    assert f"the fresh {title} starts at a KL divergence of " in capsys.readouterr().err


@pytest.mark.parametrize("data", ["thumbs", "pairs"])
def test_kto_runs_on_thumbs_and_on_pairs(world, tmp_path, data):
    assert main(flags(world, "dpo", tmp_path / "a", "--dpo.loss", "kto", data=data)) == 0
    first = lines(tmp_path / "a")[0]
    assert first["eval/loss"] == pytest.approx(0.5, rel=1e-6) and first["eval/kl"] == 0  # the policy is its reference


KILLED = [("dpo", "pairs", []), ("reward", "rankings", []), ("dpo", "thumbs", ["--dpo.loss", "kto"])]


@pytest.mark.parametrize(("verb", "data", "more"), KILLED)
def test_killed_and_resumed_is_the_same_run(world, tmp_path, verb, data, more):
    assert main(flags(world, verb, tmp_path / "straight", *more, data=data)) == 0
    command = flags(world, verb, tmp_path / "killed", *more, data=data)
    assert child.run(command, LOWALIGN_KILL_AT="metrics-line:3") == -signal.SIGKILL
    assert main(flags(world, verb, tmp_path / "killed", *more, "--resume", data=data)) == 0
    assert digest(tmp_path / "killed") == digest(tmp_path / "straight")


def test_wrong_use(world, tmp_path, capsys):
    stderr = refused(capsys, flags(world, "dpo", tmp_path / "a", "--adapter.dropout", "0.1"))
    assert "--adapter.dropout is 0.1: with dropout the policy is not its reference at the start" in stderr
    stderr = refused(capsys, flags(world, "dpo", tmp_path / "b", data="thumbs"))
    assert (
        "24 rows, the first" in stderr
        and "thumbs.jsonl:1, have a label and no second answer: they need --dpo.loss kto" in stderr
    )
    stderr = refused(capsys, flags(world, "reward", tmp_path / "c", data="thumbs"))
    assert "a reward model needs comparisons" in stderr
    stderr = refused(capsys, flags(world, "dpo", tmp_path / "d", "--dpo.loss", "kto", "--train.batch-size", "1"))
    assert "--train.batch-size 2 or more" in stderr
    stderr = refused(capsys, flags(world, "reward", tmp_path / "e", data="sft"))
    assert "sft.jsonl:1" in stderr and "lowalign sft" in stderr
