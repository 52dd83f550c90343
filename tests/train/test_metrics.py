"""metrics.jsonl and the terminal."""

import json
import resource
import sys
from pathlib import Path

import psutil
import pytest
import torch
from tqdm import tqdm

from lowalign.errors import UserError
from lowalign.log import progress
from lowalign.train import checkpoint
from lowalign.train.metrics import MetricsLog
from lowalign.train.usage import Usage
from tests.train import toy

STEP = {"loss": 1.5, "grad_norm": 0.25, "lr": 1e-4, "tokens_per_second": 1234.5}

USAGE = ("epoch", "tokens", "seconds", "peak_process_memory_gib")  # the toy is on the CPU


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_one_object_a_line_with_the_names_of_the_field(tmp_path):
    toy.run(tmp_path, steps=5, log_every=2, eval_every=4)
    records = lines(tmp_path)
    assert [(line["step"], "loss" in line) for line in records] == [
        (0, False), (2, True), (4, True), (4, False), (5, True), (5, False),
    ]  # fmt: skip
    for line in records:
        names = (
            {"loss", "rows", "grad_norm", "lr", "tokens_per_second", *USAGE}
            if "loss" in line
            else {"eval/loss", "eval/rows"}
        )
        assert line.keys() == names | {"step"}


def test_tokens_per_second_counts_all_tokens_since_the_last_line(tmp_path, monkeypatch):
    clock = iter(range(10_000))  # every look at the clock is a second later
    monkeypatch.setattr("lowalign.train.engine.time.perf_counter", lambda: float(next(clock)))
    _, method, _ = toy.run(tmp_path, steps=2, log_every=2, eval_every=0, save_every=0)
    tokens = sum(e.length for step in (0, 1) for e in method.batch(step))
    (line,) = [line for line in lines(tmp_path) if "loss" in line]
    seconds = tokens / line["tokens_per_second"]
    assert seconds == int(seconds) and 2 <= seconds <= 8


@pytest.mark.parametrize("terminal", [False, True])
def test_the_line_of_a_step_says_what_its_method_is_about(tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    more = {
        "ppo": {"reward": 0.53125, "kl": 1.25, "length": 47.5, "rewards/short/mean": 9.0},
        "dpo": {"rewards/accuracies": 0.75, "rewards/margins": 0.0312, "rewards/chosen": 9.0},
    }
    said = {"ppo": "reward 0.5312  KL 1.25  length 47.5", "dpo": "accuracy 0.75  margin 0.0312"}
    for name, metrics in more.items():
        with MetricsLog(tmp_path, None, 3, None) as metrics_log:
            metrics_log.step(1, STEP | metrics, log_due=True)
            metrics_log.step(2, STEP | metrics, log_due=True)
        text = capsys.readouterr().err
        line = (
            f"loss 1.5, {said[name].replace('  ', ', ')}, 1,234"
            if terminal
            else f"loss 1.5000  {said[name]}  grad_norm"
        )
        assert line in text and "9" not in said[name]


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    with MetricsLog(tmp_path, None, 3, None) as metrics_log:
        metrics_log.step(1, STEP | {"explained_variance": float("nan"), "kl": float("inf")}, log_due=True)
    (line,) = lines(tmp_path)
    assert line["explained_variance"] is None and line["kl"] is None and line["loss"] == 1.5


@pytest.mark.parametrize("drop_eval", [True, False])
def test_a_resume_cuts_what_comes_after_its_step(tmp_path, drop_eval):
    before = [
        {"step": 0, "eval/loss": 3.0},
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval/loss": 1.1},
    ]
    after = [{"step": 3, "loss": 0.5}, {"step": 3, "eval/loss": 0.6}]
    text = "".join(json.dumps(line) + "\n" for line in before + after)
    # a crash can leave half a line, and a file system can fill a block with zeros
    for tail in ("", '{"step": 2, "lo', '{"step": 4, "loss": 0.1', "\0\0\0\0"):
        (tmp_path / "metrics.jsonl").write_text(text + tail)
        MetricsLog(tmp_path, None, 4, 2, drop_eval).__exit__()
        assert lines(tmp_path) == (before[:-1] if drop_eval else before)
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 3.0}\n')
    with MetricsLog(tmp_path, None, 3, None) as metrics_log:
        metrics_log.step(1, STEP, log_due=True)
    assert lines(tmp_path) == [{"step": 1, **STEP}]


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr("lowalign.train.metrics.time.monotonic", lambda: next(clock))
    with MetricsLog(tmp_path, None, 100, 40) as metrics_log:
        metrics_log.step(41, STEP, log_due=True)
        metrics_log.step(42, STEP, log_due=False)
        metrics_log.step(44, STEP, log_due=True)
        metrics_log.evaluation(44, {"eval/loss": 2.25})
    # one step in 10 s: 59 more take 590 s; four steps in 20 s: 56 more take 280 s
    assert capsys.readouterr().err.splitlines() == [
        "step 41/100  loss 1.5000  grad_norm 0.25  lr 0.0001  1,234 tokens/s  ETA 09:50",
        "step 44/100  loss 1.5000  grad_norm 0.25  lr 0.0001  1,234 tokens/s  ETA 04:40",
        "step 44/100  eval/loss 2.2500",
    ]


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with MetricsLog(tmp_path, None, 8, 4) as metrics_log:
        for step in (5, 6, 7, 8):
            metrics_log.step(step, STEP, log_due=True)
    text = capsys.readouterr().err
    assert "8/8" in text and "loss 1.5, 1,234 tokens/s" in text and "grad_norm" not in text
    assert len(lines(tmp_path)) == 4


def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path, monkeypatch):
    class Full:
        def write(self, _: str) -> None:
            raise OSError(28, "No space left on device")

        def isatty(self) -> bool:
            return False

        flush = write

    monkeypatch.setattr(sys, "stderr", Full())
    assert toy.run(tmp_path)[2].step == 8


def test_metrics_that_cannot_be_written_are_a_user_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: Is a directory\. Checkpoints are intact"):
        toy.run(tmp_path)


def test_what_a_run_has_used(tmp_path, monkeypatch):
    """Epochs and tokens by hand; seconds of both halves of an interrupted run; memory as the kernel counts it."""
    clock = iter(range(10_000))  # every look at the clock is a second later
    monkeypatch.setattr("lowalign.train.usage.time.monotonic", lambda: float(next(clock)))
    toy.run(tmp_path, steps=5, hook=toy.signal_at(3))
    _, method, result = toy.run(tmp_path, steps=5, resume=True)
    steps = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["epoch"] for line in steps] == [6 * (i + 1) / 40 for i in range(5)]  # 6 of 40 rows a step
    counts = [sum(e.length for e in method.batch(i)) for i in range(5)]
    assert [line["tokens"] for line in steps] == [sum(counts[: i + 1]) for i in range(5)]
    seconds = [line["seconds"] for line in steps]
    assert seconds == sorted(seconds) and seconds[0] >= 1 and seconds[3] - seconds[2] < 10
    assert result.metrics["tokens"] == sum(counts)
    now, most = psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 0.5 * now < steps[-1]["peak_process_memory_gib"] * 2**30 < 1.05 * most


def test_a_callback_sees_every_step_and_ends_the_run(tmp_path):
    seen = []

    def on_step(step, metrics):
        seen.append((step, metrics["loss"], metrics.get("eval/loss")))
        return step < 5

    _, _, result = toy.run(tmp_path / "run", on_step=on_step, eval_every=3, save_every=0)
    records = lines(tmp_path / "run")
    losses = {line["step"]: line["loss"] for line in records if "loss" in line}
    evals = {line["step"]: line["eval/loss"] for line in records if "eval/loss" in line}
    assert (result.step, result.stopped_by) == (5, None)
    assert sorted(evals) == [0, 3, 5] and checkpoint.steps(tmp_path / "run") == [5]
    # A step is evaluated after its call.
    assert seen == [(i, losses[i], evals[0 if i < 4 else 3]) for i in range(1, 6)]
    straight = toy.run(tmp_path / "straight")[0]
    host, _, result = toy.run(tmp_path / "run", resume=True)
    assert result.step == 8 and torch.equal(toy.weights(host), toy.weights(straight))


def test_a_callback_that_raises_loses_nothing(tmp_path):
    def on_step(step, metrics):
        if step == 3:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        toy.run(tmp_path / "run", on_step=on_step, save_every=0)
    assert checkpoint.steps(tmp_path / "run") == [3]
    host, _, _ = toy.run(tmp_path / "run", resume=True)
    assert torch.equal(toy.weights(host), toy.weights(toy.run(tmp_path / "straight")[0]))


def test_bars_are_for_terminals_and_notebooks(monkeypatch):
    widget = type("Widget", (tqdm,), {"__module__": "tqdm.notebook"})  # as tqdm.auto has it in a notebook
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda value=terminal: value)
        for notebook in (True, False):
            monkeypatch.setattr("lowalign.log.tqdm", widget if notebook else tqdm)
            assert progress(total=1).disable is not (terminal or notebook)
            assert progress(False, total=1).disable


def test_memory_of_a_card_is_that_of_its_allocator(monkeypatch):
    """Of the device that is trained on, since the run began. Without a card: the calls that torch documents."""
    calls, card = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29 if device == card else 0)
    metrics = Usage(card).metrics()
    assert calls == [card] and metrics["peak_gpu_memory_gib"] == 1.5 and "peak_process_memory_gib" not in metrics
