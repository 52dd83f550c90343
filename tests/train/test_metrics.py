"""metrics.jsonl, the terminal and tensorboard."""

import json
import sys
import types
from pathlib import Path

import pytest

from lowalign.errors import UserError
from lowalign.train.metrics import MetricsLog
from tests.train import toy

STEP = {"loss": 1.5, "grad_norm": 0.25, "lr": 1e-4, "tokens_per_second": 1234.5}


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
            {"loss", "rows", "grad_norm", "lr", "tokens_per_second"} if "loss" in line else {"eval/loss", "eval/rows"}
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
        with MetricsLog(tmp_path, "none", 3, None) as metrics_log:
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
    with MetricsLog(tmp_path, "none", 3, None) as metrics_log:
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
        MetricsLog(tmp_path, "none", 4, 2, drop_eval).__exit__()
        assert lines(tmp_path) == (before[:-1] if drop_eval else before)
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 3.0}\n')
    with MetricsLog(tmp_path, "none", 3, None) as metrics_log:
        metrics_log.step(1, STEP, log_due=True)
    assert lines(tmp_path) == [{"step": 1, **STEP}]


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr("lowalign.train.metrics.time.monotonic", lambda: next(clock))
    with MetricsLog(tmp_path, "none", 100, 40) as metrics_log:
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
    with MetricsLog(tmp_path, "none", 8, 4) as metrics_log:
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


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    written: list[tuple] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append(("open", folder, purge_step))

        def add_scalar(self, *values: object) -> None:
            written.append(values)

        def close(self) -> None:
            written.append(("close",))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    with MetricsLog(tmp_path, "tensorboard", 8, 4) as metrics_log:
        metrics_log.step(5, STEP, log_due=True)
        metrics_log.evaluation(5, {"eval/loss": 2.0})
    opened = ("open", str(tmp_path / "tensorboard"), 5)
    assert written == [opened, *((name, value, 5) for name, value in STEP.items()), ("eval/loss", 2.0, 5), ("close",)]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'lowalign\[track\]'"):
        toy.run(tmp_path, track="tensorboard")
