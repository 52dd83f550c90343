"""Which weights of a run become its adapter, and adapters from checkpoints of runs that were interrupted."""

import hashlib
import json
import re
import shlex
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowalign import Host
from lowalign.cli import main
from lowalign.config.sections import DataConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import load_examples, split_heldout
from lowalign.model.policy import load_stack
from tests.commands import child
from tests.commands.tiny_runs import FP32, load
from tests.tiny import tiny_folder

HELDOUT = 4
DIVERGES = ("--train.learning-rate", "0.1", "--train.schedule", "constant", "--train.eval-every", "1")
TIMES = ("tokens_per_second", "seconds", "peak_process_memory_gib", "peak_gpu_memory_gib")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_folder(folder / "model", "llama")
    asked = [("Where is Paris?", "France."), ("Who jumps?", "A fox."), ("Why?", "No."), ("How?", "Lazy dog.")] * 4
    sft_rows = [{"prompt": f"{q} {i}", "completion": a} for i, (q, a) in enumerate(asked)]
    pairs = [{"prompt": f"{q} {i}", "chosen": a, "rejected": "The."} for i, (q, a) in enumerate(asked)]
    for name, rows in (("sft", sft_rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(world, out, *more, verb="sft") -> list[str]:
    return [
        verb, "--model", f"{world}/model", "--data", f"{world}/{'sft' if verb == 'sft' else 'pairs'}.jsonl",
        "--out", str(out), "--train.steps", "6", "--train.save-every", "2", "--train.keep", "9",
        "--train.batch-size", "4", "--data.eval-rows", str(HELDOUT), "--data.no-cache", *FP32, *more,
    ]  # fmt: skip


def weights(folder) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def losses(out) -> dict[int, float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}


@pytest.fixture(scope="module")
def best(world, tmp_path_factory):
    """A run whose held-out loss is lowest in the middle, or before the first step."""
    out = tmp_path_factory.mktemp("best") / "run"
    assert main(flags(world, out, *DIVERGES)) == 0
    assert min(losses(out), key=losses(out).get) < 6
    return out


@pytest.fixture(scope="module")
def last(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("last") / "run"
    assert main(flags(world, out, *DIVERGES, "--train.result", "last")) == 0
    return out


def test_the_best_weights_cannot_be_used(world, best, last):
    """The adapter has the held-out loss that the evaluations found lowest, computed from its folder."""
    step = min(losses(best), key=losses(best).get)
    meta = json.loads((best / "adapter" / "lowalign.json").read_text())
    assert meta["step"] == step and meta["metrics"]["eval/loss"] == losses(best)[step]
    assert losses(best) == losses(last) and weights(best / "adapter") != weights(last / "adapter")
    host = Host(load(world / "model"))
    chat = Chat(host.base.tokenizer)
    examples = load_examples([f"{world}/sft.jsonl"], chat, DataConfig(cache=False)).examples
    _, heldout = split_heldout(examples, HELDOUT, 0)
    for run, expected in ((best, min(losses(best).values())), (last, losses(last)[6])):
        name = run.parent.name.rstrip("0")
        with host.use(*load_stack(host, name, str(run))), torch.no_grad():
            logps = [lp[torch.tensor(e.mask(0))] for e in heldout for lp in host.logprobs([e])[0]]
        assert -torch.cat(logps).mean().item() == pytest.approx(expected, rel=1e-3)  # 1e-6 seen


def test_what_the_last_line_says(world, tmp_path, capsys):
    def last_line(*more) -> str:
        assert main(flags(world, tmp_path / "run", *more)) == 0
        return capsys.readouterr().err.splitlines()[-1]

    text = last_line(*DIVERGES)
    loss = losses(tmp_path / "run")
    step = min(loss, key=loss.get)
    assert (
        f"weights of step {step}, with the lowest eval/loss: {loss[step]:.4g}, after the last step {loss[6]:.4g}"
        in text
    )
    again = last_line(*DIVERGES, "--resume", "--train.result", "last")  # it may change: nothing is trained
    assert f"weights of step 6, the last; the lowest eval/loss was at step {step}" in again
    none = ["sft", *flags(world, tmp_path / "none")[1:], "--data.eval-rows", "0", "--train.steps", "1"]
    assert main(none) == 0
    assert "no held-out rows to choose by" in capsys.readouterr().err.splitlines()[-1]
    assert main([*none, "--train.result", "best"]) == 1
    assert "--data.eval-rows N or --data.eval FILE" in capsys.readouterr().err


@pytest.mark.parametrize("point", ["save-optimizer:3", "best-written:1", "best-replaced:1", "save-renamed:1"])
def test_killed_and_resumed_has_the_same_best(world, best, tmp_path, point):
    out = tmp_path / "run"
    assert child.run(flags(world, out, *DIVERGES), LOWALIGN_KILL_AT=point) == -signal.SIGKILL
    assert main(flags(world, out, *DIVERGES, "--resume")) == 0
    assert weights(out / "adapter") == weights(best / "adapter")
    described = [json.loads((run / "adapter" / "lowalign.json").read_text()) for run in (out, best)]
    for meta in described:
        for name in TIMES:
            meta["metrics"].pop(name, None)
        meta["recipe"] = meta["recipe"].replace("resume: true", "resume: false")
    assert described[0] == described[1]


def test_a_checkpoint_is_the_adapter_of_its_step(world, best, last, tmp_path, capsys):
    assert main(["checkpoint", f"{last}@6", "--out", str(tmp_path / "last")]) == 0
    assert "has the weights of step 6" in capsys.readouterr().err
    written, expected = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (tmp_path / "last", last / "adapter"))
    assert written == expected
    more = ["--model", f"{world}/model", "--device", "cpu"]
    assert main(["checkpoint", str(last), "--out", str(tmp_path / "newest"), *more]) == 0
    assert weights(tmp_path / "newest") == weights(last / "adapter")
    assert main(["checkpoint", f"{last}@best", "--out", str(tmp_path / "best")]) == 0
    assert weights(tmp_path / "best") == weights(best / "adapter")
    assert main(["checkpoint", f"{last}@2", "--out", str(tmp_path / "two")]) == 0
    stored = load_file(last / "checkpoints" / "step-000002" / "weights.safetensors")
    found = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert sum(t.double().sum() for t in found.values()) == sum(t.double().sum() for t in stored.values())
    assert json.loads((tmp_path / "two" / "lowalign.json").read_text())["step"] == 2


KINDS = {
    "lora": (),
    "prompt": ("--adapter.kind", "prompt"),
    "projection": ("--adapter.kind", "prefix", "--adapter.projection"),
    "stacked": ("--init", "RUN"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_as_adapter(world, last, tmp_path, capsys, monkeypatch, kind):
    """The message names a command; its adapter is what a run of that many steps would have saved."""
    more = ["--train.schedule", "constant", *(str(last) if word == "RUN" else word for word in KINDS[kind])]
    out = tmp_path / "run"
    assert child.run(flags(world, out, *more), LOWALIGN_KILL_AT="save-begin:2") == -signal.SIGKILL
    ask = ["generate", "--model", f"{world}/model", "--prompt", "Who?", "--sampling.max-new-tokens", "4", *FP32]
    for command in ([*ask, "--adapter", str(out)], flags(world, tmp_path / "x", "--init", str(out)), ["merge", str(out), "--out", f"{tmp_path}/y"]):  # fmt: skip
        assert main(command) == 1
        message = capsys.readouterr().err
        assert "has not finished" in message and "--resume" in message and "Traceback" not in message
    words = shlex.split(re.search(r"lowalign (checkpoint .* --out) DIR", message)[1])
    assert main([*words, str(tmp_path / "adapter")]) == 0
    short = flags(world, tmp_path / "short", *more, "--train.steps", "2", "--train.result", "last")
    assert main(short) == 0
    assert weights(tmp_path / "adapter") == weights(tmp_path / "short" / "adapter")
    assert main([*ask, "--adapter", str(tmp_path / "adapter")]) == 0


def test_a_checkpoint_of_a_reward_run_scores(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert child.run(flags(world, out, verb="reward"), LOWALIGN_KILL_AT="save-begin:3") == -signal.SIGKILL
    assert main(["checkpoint", str(out), "--out", str(tmp_path / "adapter")]) == 0
    ask = ["score", "--model", f"{world}/model", "--adapter", f"{tmp_path}/adapter", "--data", f"{world}/pairs.jsonl"]
    assert main([*ask, *FP32]) == 0, capsys.readouterr().err


def test_wrong_use(world, last, tmp_path, capsys):
    def refused(source, out=tmp_path / "out") -> str:
        assert main(["checkpoint", str(source), "--out", str(out)]) == 1
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    assert "has no checkpoint of step 3; there are: 2, 4, 6" in refused(f"{last}@3")
    assert "after @ comes a step or best" in refused(f"{last}@first")
    assert "is not the folder of a run with checkpoints" in refused(tmp_path / "nothing")
    assert "is not the folder of a run with checkpoints" in refused(world / "model")
    assert "exists and is not overwritten" in refused(last, tmp_path)
    assert not (tmp_path / "out").exists()
    stacked = tmp_path / "stacked"
    shutil.copytree(last / "adapter", tmp_path / "init")
    assert main(flags(world, stacked, "--init", f"{tmp_path}/init", "--train.steps", "1", "--data.eval-rows", "0")) == 0
    assert "has no best weights" in refused(f"{stacked}@best") and not (tmp_path / "out").exists()
    (tmp_path / "init" / "lowalign.json").unlink()
    file = tmp_path / "init" / "adapter_model.safetensors"
    save_file({k: t + 1 for k, t in load_file(file).items()}, file, {"format": "pt"})
    assert "has changed since" in refused(stacked)
