"""Runs in several processes: the same adapter and metrics as in one; signals, a killed process, resuming on another number."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowalign.cli import main
from lowalign.train import checkpoint
from tests.commands import child
from tests.tiny import tiny_folder
from tests.train import toy

VERBS = {
    "sft": ("--data", "rows.jsonl", "--data.eval-rows", "3"),
    "dpo": ("--data", "pairs.jsonl", "--data.eval-rows", "2", "--dpo.sft", "0.1"),
    "kto": ("--data", "pairs.jsonl", "--dpo.loss", "kto"),
    "reward": ("--data", "pairs.jsonl", "--data.eval-rows", "2"),
    "ppo": (
        "--data", "prompts.jsonl", "--reward", "reward.py:vowels", "--rollout.prompts", "4", "--rollout.samples", "3",
        "--sampling.max-new-tokens", "6", "--ppo.target-kl", "1e-3", "--ppo.ptx-data", "rows.jsonl", "--data.eval-rows", "2",
        "--rollout.missing-eos", "keep", "--ppo.ptx-coef", "0.5", "--value.adapter.r", "4", "--ppo.epochs", "2",
    ),
}  # fmt: skip
ALL = (
    "--train.steps", "4", "--train.batch-size", "4", "--train.optimizer", "adamw", "--train.save-every", "2", "--adapter.r", "4",
    "--train.learning-rate", "1e-3", "--base.quantization", "none", "--base.dtype", "float32", "--train.token-budget", "60",
    "--train.checkpointing", "off", "--train.eps", "1e-4",
)  # fmt: skip
TIMES = ("per_second", "sampler_difference", "seconds", "memory", "predicted", "measured")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_folder(folder / "model", "llama")
    rows = [{"prompt": f"count {'on ' * (i % 4)}to {i}", "completion": f"{i} and {i + 1}"} for i in range(11)]
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": f"no {i}"} for i, r in enumerate(rows)]
    prompts = [{"prompt": r["prompt"]} for r in rows]
    for name, lines in (("rows", rows), ("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "reward.py").write_text(
        "def vowels(prompts, completions):\n    return [sum(c in 'aeiou' for c in t) / (1 + len(t)) for t in completions]\n"
    )
    return folder


def command(world: Path, verb: str, out: Path, *more: str) -> list[str]:
    options = [f"{world}/{word}" if (world / word.partition(":")[0]).exists() else word for word in VERBS[verb]]
    verb = "dpo" if verb == "kto" else verb
    return [verb, "--model", f"{world}/model", "--out", str(out), *ALL, *options, *more]


def in_processes(count: int, arguments: list[str], folder: Path) -> list[int]:
    return toy.in_processes(count, child._main, arguments, folder / "stderr")


def metrics(out: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not any(word in k for word in TIMES)} for line in lines]


def assert_same(out: Path, alone: Path) -> None:
    """Sums in another order differ by rounding. Adam divides gradients near zero by their size, or by eps: with the default eps
    that rounding moved a weight by 2.5e-6, a part of the learning rate."""
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)
    assert len(metrics(out)) == len(metrics(alone))
    for line, other in zip(metrics(out), metrics(alone), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("verb", "counts"), [("sft", (2, 4)), ("dpo", (2,)), ("kto", (2,)), ("reward", (2,)), ("ppo", (2, 4))]
)
def test_the_same_adapter_as_in_one_process(world, tmp_path, verb, counts):
    assert child.run(command(world, verb, tmp_path / "alone")) == 0
    for count in counts:
        out = tmp_path / str(count)
        assert in_processes(count, command(world, verb, out), tmp_path) == [0] * count, (
            tmp_path / "stderr"
        ).read_text()
        assert_same(out, tmp_path / "alone")


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_in_another_number_of_processes(world, tmp_path, first, then):
    """PPO's checkpoint is in the middle of a round: its rollouts are those of all processes."""
    start = lambda count, *more: in_processes(count, command(world, "ppo", tmp_path / "out", *more), tmp_path)  # noqa: E731
    assert child.run(command(world, "ppo", tmp_path / "alone")) == 0
    stopped = toy.start_processes(first, _interrupted_after, 3, command(world, "ppo", tmp_path / "out"))
    assert [end(process) for process in stopped] == [128 + signal.SIGTERM] * first
    assert checkpoint.newest_valid(tmp_path / "out").step == (3 if first > 1 else 2)  # several finish the step
    assert start(then, "--resume") == [0] * then
    assert_same(tmp_path / "out", tmp_path / "alone")


def end(process) -> int | None:
    process.join(60)
    return process.exitcode


def _interrupted_after(steps: int, arguments: list[str]) -> None:
    """The last process gets the signal, in the middle of the step after `steps`."""
    from lowalign.methods.ppo import PPO

    loss = PPO.loss

    def signalled(self, examples, normalizers):
        if self.last_step == steps - 1 and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, examples, normalizers)

    PPO.loss = signalled
    child._main(arguments, Path(os.devnull))


def _killed_at(steps: int, arguments: list[str], stderr: Path) -> None:
    """Process 1 is killed when it begins the step after `steps`."""
    from lowalign.methods.sft import SFT

    batch = SFT.batch

    def killed(self, step):
        if step == steps and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, step)

    SFT.batch = killed
    child._main(arguments, stderr)


def test_a_killed_process_ends_the_run_and_the_last_checkpoint_is_whole(world, tmp_path):
    alone, out, stderr = tmp_path / "alone", tmp_path / "out", tmp_path / "stderr"
    assert child.run(command(world, "sft", alone)) == 0
    started = toy.start_processes(2, _killed_at, 3, command(world, "sft", out), stderr)
    assert [end(process) for process in started] == [1, -signal.SIGKILL]
    assert "another process of this run has ended" in stderr.read_text() and "Traceback" not in stderr.read_text()
    assert checkpoint.newest_valid(out).step == 2
    assert in_processes(2, command(world, "sft", out, "--resume"), tmp_path) == [0, 0]
    assert_same(out, alone)


def test_a_mistake_in_one_process_ends_all(world, tmp_path):
    (tmp_path / "reward.py").write_text(
        "import os\n\ndef vowels(prompts, completions):\n    assert os.environ['RANK'] == '0'\n    return [0.0] * len(prompts)\n"
    )
    arguments = command(world, "ppo", tmp_path / "out", "--reward", f"{tmp_path}/reward.py:vowels")
    assert in_processes(2, arguments, tmp_path) == [1, 1]
    messages = (tmp_path / "stderr").read_text()
    assert (
        "reward.py" in messages and "another process of this run has ended" in messages and "Traceback" not in messages
    )


def test_other_verbs_run_in_one_process(monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["generate", "--model", "m", "--prompt", "p"]) == 1
    assert "process 1: lowalign: generate runs in one process; start it without a launcher" in capsys.readouterr().err


def test_the_share_of_each_process(monkeypatch):
    """Every row once, about the same number of tokens each, and the same division in all processes."""
    from lowalign import processes

    lengths = [5, 90, 20, 20, 7, 60, 31, 20, 3, 44]
    for name in processes.LAUNCHER:
        monkeypatch.setenv(name, "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(processes.share(lengths))
    assert sorted(i for share in shares for i in share) == list(range(10))
    assert [sum(lengths[i] for i in share) for share in shares] == [100, 100, 100]
