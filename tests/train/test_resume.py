"""A run that was interrupted, at any moment, ends with the very bits of one that was not."""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from lowalign import durable
from lowalign.train import checkpoint
from tests.train import toy

OPTIMIZERS = ("paged_adamw_8bit", "adamw_8bit", "adamw")


TIMES = ("tokens_per_second", "seconds", "peak_process_memory_gib", "peak_gpu_memory_gib")


def run(out: Path, optimizer: str, resume: bool = False, delay: float = 0.0) -> None:
    toy.run(out, resume=resume, optimizer=optimizer, hook=lambda *_: time.sleep(delay))


def ending(out: Path) -> dict[str, str]:
    """Hashes of all that a finished run leaves: the last checkpoints, the best weights, the metrics but for the times."""
    files = {p.relative_to(out): p.read_bytes() for p in (out / "checkpoints").rglob("*.safetensors")}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in TIMES:
            line.pop(name, None)
    files[Path("metrics.jsonl")] = json.dumps(lines).encode()
    return {str(name): hashlib.sha256(data).hexdigest() for name, data in files.items()}


@pytest.fixture(scope="module")
def case(request, tmp_path_factory) -> tuple[str, Path, dict[str, str]]:
    """(optimizer, a run killed after its first checkpoint, the ending of a run that was left alone)"""
    root = tmp_path_factory.mktemp(request.param)
    run(root / "straight", request.param)
    begun = root / "begun"
    assert toy.in_child(run, begun, request.param, environment={"LOWALIGN_KILL_AT": "save-renamed"}) == -signal.SIGKILL
    assert checkpoint.steps(begun) == [2]
    return request.param, begun, ending(root / "straight")


# Every point with one optimizer; the others differ only in what the optimizer's file holds.
KILLED = [
    pytest.param(o, p, marks=() if o == OPTIMIZERS[0] or p == "save-optimizer" else pytest.mark.slow)
    for o in OPTIMIZERS
    for p in durable.WRITE_POINTS
]


@pytest.mark.parametrize(("case", "point"), KILLED, indirect=["case"])
def test_killed_at_a_write_point_of_a_resumed_run(case, point, tmp_path):
    """By itself with SIGKILL, the second time it comes by (the once-only ones the first time); resumed in a new process."""
    optimizer, begun, expected = case
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    count = 1 if point.startswith("metrics-cut") else 2
    environment = {"LOWALIGN_KILL_AT": f"{point}:{count}"}
    assert toy.in_child(run, out, optimizer, True, environment=environment) == -signal.SIGKILL
    whole = checkpoint.newest_valid(out)
    assert whole is not None and whole.step == checkpoint.steps(out)[-1]  # none of those in sight is damaged
    run(out, optimizer, resume=True)
    assert ending(out) == expected
    assert not [p for p in out.rglob(".*") if p.name != ".lock"]


@pytest.mark.parametrize("point", durable.WRITE_POINTS[:6])
def test_killed_while_writing_the_first_checkpoint(point, tmp_path):
    """There is nothing to resume yet, or all of it."""
    run(tmp_path / "straight", "adamw")
    out = tmp_path / "run"
    assert toy.in_child(run, out, "adamw", environment={"LOWALIGN_KILL_AT": point}) == -signal.SIGKILL
    assert checkpoint.steps(out) == ([2] if point == "save-renamed" else [])
    run(out, "adamw", resume=True)
    assert ending(out) == ending(tmp_path / "straight")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_stopped_and_resumed_is_the_same_run(tmp_path, optimizer, step):
    """Objects, weights, optimizer state, the method's state and its random draws, at steps with and without evaluation."""
    straight, method, ended = toy.run(tmp_path / "straight", optimizer=optimizer)
    _, _, stopped = toy.run(tmp_path / "run", optimizer=optimizer, hook=toy.signal_at(step))
    assert stopped.step == step and checkpoint.newest_valid(tmp_path / "run").step == step
    method_b = toy.ToyMethod(toy.ToyHost(seed=9))  # a fresh adapter is other weights until they are loaded
    method_b.host.embedding.load_state_dict(straight.embedding.state_dict())
    method_b.host.head.load_state_dict(straight.head.state_dict())
    host, _, again = toy.run(tmp_path / "run", optimizer=optimizer, method=method_b, resume=True)
    assert torch.equal(toy.weights(host), toy.weights(straight)) and torch.equal(method_b.rounds, method.rounds)
    assert (again.step, again.best_step) == (ended.step, ended.best_step)
    metrics = [{k: v for k, v in one.metrics.items() if k not in TIMES} for one in (again, ended)]
    assert metrics[0] == metrics[1]
    one, other = (checkpoint.newest_valid(tmp_path / name) for name in ("straight", "run"))
    for part in checkpoint.PARTS:
        for name, tensor in one.read(part).items():
            assert torch.equal(tensor, other.read(part)[name]), name


def test_two_adapters_and_a_low_precision_copy_resume(tmp_path):
    def method(hook=None) -> toy.ToyMethod:
        return toy.ToyMethod(toy.ToyHost(working_dtype=torch.bfloat16), {"policy": 1.0, "value": 0.3}, hook=hook)

    straight, _, _ = toy.run(tmp_path / "straight", method=method())
    toy.run(tmp_path / "run", method=method(toy.signal_at(5)))
    host, _, _ = toy.run(tmp_path / "run", method=method(), resume=True)
    for name in ("policy", "value"):
        assert torch.equal(toy.weights(host, name), toy.weights(straight, name))
        for p, q in zip(host.adapters[name].parameters(), straight.adapters[name].parameters(), strict=True):
            assert p.dtype == torch.bfloat16 and torch.equal(p, q)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    _, _, first = toy.run(tmp_path)
    before = ending(tmp_path)
    _, method, again = toy.run(tmp_path, resume=True)
    assert ending(tmp_path) == before and again == first and method.calls == 0


def test_a_finished_run_can_be_prolonged(tmp_path):
    toy.run(tmp_path, schedule="constant", warmup=0.0, steps=4)
    host, _, result = toy.run(tmp_path, schedule="constant", warmup=0.0, steps=8, resume=True)
    straight, _, _ = toy.run(tmp_path / "straight", schedule="constant", warmup=0.0, steps=8)
    assert result.step == 8 and torch.equal(toy.weights(host), toy.weights(straight))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_at_random_times(tmp_path, optimizer):
    """From outside, again and again, until the run gets through."""
    run(tmp_path / "straight", optimizer)
    chance, kills = random.Random(0), 0
    for attempt in range(200):
        arguments = (run, (tmp_path / "run", optimizer, attempt > 0, 0.05), {})  # about 2 s when left alone
        process = toy.fork.Process(target=toy._child, args=arguments)
        process.start()
        process.join(chance.uniform(0.2, 0.9) if kills < 25 else None)
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills >= 3
    assert ending(tmp_path / "run") == ending(tmp_path / "straight")
