"""Ctrl-C and kill: the first saves and leaves, the second leaves."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from lowalign.train import checkpoint
from tests.train import toy

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@BOTH
def test_the_unfinished_step_is_dropped_and_the_last_one_saved(tmp_path, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    reached: list[tuple[int, int]] = []

    def hook(step: int, call: int) -> None:
        reached.append((step, call))
        toy.signal_at(5, number=number)(step, call)

    host, _, result = toy.run(tmp_path, hook=hook)
    assert result.stopped_by == number and result.step == 5
    assert reached[-1] == (5, 0)  # that micro-batch is finished, no other is begun
    newest = checkpoint.newest_valid(tmp_path)
    assert newest.step == 5
    saved = torch.cat([t.flatten() for t in newest.read("weights").values()])
    assert torch.equal(saved.sort().values, toy.weights(host).sort().values)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def _resume(out: Path) -> None:
    toy.run(out, resume=True)


@BOTH
def test_during_an_evaluation(tmp_path, number):
    """It is broken off, and made when the run goes on; once, even if that run is killed right after it."""
    method = toy.ToyMethod(toy.ToyHost())

    def hook(step: int, call: int) -> None:
        if not torch.is_grad_enabled() and step == 3:  # the evaluation after four steps
            os.kill(os.getpid(), number)

    method.hook = hook
    _, _, result = toy.run(tmp_path, method=method)
    assert (result.stopped_by, result.step) == (number, 4) and not method.host.adapters.training
    metrics = (tmp_path / "metrics.jsonl").read_text()
    assert '"step": 4, "loss"' in metrics and '"step": 4, "eval/loss"' not in metrics
    assert toy.in_child(_resume, tmp_path, environment={"LOWALIGN_KILL_AT": "metrics-line"}) == -signal.SIGKILL
    assert (tmp_path / "metrics.jsonl").read_text().count('"step": 4, "eval/loss"') == 1
    toy.run(tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text().count('"step": 4, "eval/loss"') == 1


def test_before_the_first_step(tmp_path):
    method = toy.ToyMethod(toy.ToyHost(), hook=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    _, _, result = toy.run(tmp_path, method=method)
    assert (result.stopped_by, result.step) == (signal.SIGTERM, 0)
    host, _, again = toy.run(tmp_path, resume=True)
    straight, _, _ = toy.run(tmp_path / "straight")
    assert again.stopped_by is None and torch.equal(toy.weights(host), toy.weights(straight))


def test_no_handlers_outside_the_main_thread(tmp_path):
    handlers: list[object] = []

    def work() -> None:
        toy.run(tmp_path, hook=lambda *_: handlers.append(signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert set(handlers) == {signal.getsignal(signal.SIGINT)} and checkpoint.newest_valid(tmp_path).step == 8


def _twice(out: Path, first: signal.Signals, second: signal.Signals) -> None:
    method = toy.ToyMethod(toy.ToyHost(), hook=toy.signal_at(5, number=first))

    def state() -> dict:
        if method.step == 5:  # while the checkpoint of the stop is being put together
            os.kill(os.getpid(), second)
            time.sleep(30)
            (out / "slept").touch()
        return toy.ToyMethod.state(method)

    method.state = state
    toy.run(out, method=method)


@pytest.mark.parametrize("first, second", [(signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_the_second_leaves_at_once_and_harms_nothing(tmp_path, first, second):
    out = tmp_path / "run"
    assert toy.in_child(_twice, out, first, second) == 128 + second
    assert not (out / "slept").exists()
    assert checkpoint.steps(out) == [2, 4] and checkpoint.newest_valid(out).step == 4
    host, _, _ = toy.run(out, resume=True)
    straight, _, _ = toy.run(tmp_path / "straight")
    assert torch.equal(toy.weights(host), toy.weights(straight))


def _stopped_from_outside(out: Path) -> None:
    _, _, result = toy.run(out, hook=lambda *_: time.sleep(0.02), steps=5000, save_every=5000)
    os._exit(128 + result.stopped_by if result.stopped_by else 0)


@BOTH
def test_from_outside(tmp_path, number):
    process = toy.fork.Process(target=toy._child, args=(_stopped_from_outside, (tmp_path,), {}))
    process.start()
    metrics = tmp_path / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and '"step": 3, "loss"' in metrics.read_text()):
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    newest = checkpoint.newest_valid(tmp_path)
    steps = metrics.read_text().count('"loss"')
    assert newest.step == steps >= 3
