"""Metrics: OUT/metrics.jsonl, a line or a progress bar on the terminal, and a tracker on request."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lowalign import processes
from lowalign.config.sections import TrainConfig
from lowalign.durable import write_file, write_point
from lowalign.errors import UserError
from lowalign.log import log, progress
from lowalign.train.tracker import Tracker

# What the line of a step says besides loss, gradient norm and learning rate, where the method has it.
SAID = {
    "reward": "reward",
    "kl": "KL",
    "length": "length",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
}


def metrics_at(out: Path, step: int) -> dict[str, float]:
    """What OUT/metrics.jsonl has of a step and of an evaluation after it."""
    file = out / "metrics.jsonl"
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.exists() else ()
    return {key: value for line in lines if line["step"] == step for key, value in line.items() if key != "step"}


class MetricsLog:
    """Writes the metrics of steps and evaluations.

    done: finished steps of a resumed run; lines after it are removed from metrics.jsonl. None: a new run with an empty
    file. drop_eval: also remove the evaluation at step `done`, because it is repeated. tracker: closed with the log. Raises
    UserError when metrics.jsonl cannot be written.
    """

    def __init__(
        self, out: Path, tracker: Tracker | None, steps: int, done: int | None, drop_eval: bool = False
    ) -> None:
        self._path = out / "metrics.jsonl"
        self._steps, self._first, self._tracker = steps, done or 0, tracker
        with self._explained():
            if done is None:
                self._path.unlink(missing_ok=True)
            elif self._path.exists():
                write_file(self._path, _kept(self._path, done, drop_eval), "metrics-cut")
            self._file = self._path.open("a", encoding="utf-8")
        bar = progress(total=steps, initial=self._first, unit="step")
        self._bar = None if bar.disable else bar
        self._started = time.monotonic()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        for part in (self._file, self._bar, self._tracker):
            if part is not None:
                with contextlib.suppress(OSError):  # a failed write was already reported
                    part.close()

    def step(self, step: int, metrics: dict[str, float], log_due: bool) -> None:
        """After an optimizer step; written and logged when `log_due`."""
        if self._bar is not None:
            said = "".join(f"{word} {value}, " for word, value in _said(metrics))
            postfix = f"loss {metrics['loss']:.4g}, {said}{metrics['tokens_per_second']:,.0f} tokens/s"
            self._bar.set_postfix_str(postfix, refresh=False)
            self._bar.update()
        if not log_due:
            return
        self._write(step, metrics)
        if self._bar is None:
            left = (time.monotonic() - self._started) / (step - self._first) * (self._steps - step)
            log(
                f"step {step}/{self._steps}  loss {metrics['loss']:.4f}  "
                + "".join(f"{word} {value}  " for word, value in _said(metrics))
                + f"grad_norm {metrics['grad_norm']:.3g}  "
                f"lr {metrics['lr']:.3g}  {metrics['tokens_per_second']:,.0f} tokens/s  ETA {tqdm.format_interval(left)}"
            )

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """After an evaluation on held-out rows; the names begin with eval/."""
        self._write(step, metrics)
        log(f"step {step}/{self._steps}  " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        # JSON has neither NaN nor infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self._explained():
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
        write_point("metrics-line")
        if self._tracker is not None:
            self._tracker.log(metrics, step)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}. Checkpoints are intact.") from error


def metrics_log(
    config: TrainConfig, out: Path, options: Mapping[str, Any], done: int | None, drop_eval: bool
) -> "MetricsLog | NoMetricsLog":
    """The log of this process, with the tracker of --train.track. options: of the run, for it. done, drop_eval: as MetricsLog."""
    if not processes.is_main():
        return NoMetricsLog()
    tracker = Tracker(config.track, config.run_name, out, options, done) if config.track != "none" else None
    return MetricsLog(out, tracker, config.steps, done, drop_eval)


class NoMetricsLog(contextlib.nullcontext):
    """What the other processes of a run have: the first one writes."""

    def __enter__(self) -> "NoMetricsLog":
        return self

    def step(self, step: int, metrics: dict[str, float], log_due: bool) -> None:
        """Nothing."""

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Nothing."""


def _said(metrics: dict[str, float]) -> list[tuple[str, str]]:
    return [(word, f"{metrics[name]:.4g}") for name, word in SAID.items() if name in metrics]


def _kept(path: Path, done: int, drop_eval: bool) -> bytes:
    """The lines up to step `done`, without those that a crash left incomplete."""
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError):
            continue
        if step < done or (step == done and not (drop_eval and any(name.startswith("eval/") for name in record))):
            kept.append(line + b"\n")
    return b"".join(kept)
