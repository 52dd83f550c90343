"""Experiment trackers of --track, through accelerate's: tensorboard, wandb, trackio and mlflow.

metrics.jsonl is the record of a run. A tracker is a copy for a dashboard: whatever goes wrong in it is one line of the log, and
the run goes on without it. OUT/tracker.json has each tracker's own id of the run, with which a resumed run continues it.
Credentials are those of the tracker (`wandb login`, MLFLOW_TRACKING_URI, …): no option takes one.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lowalign.durable import write_json
from lowalign.errors import UserError
from lowalign.log import log

FILE = "tracker.json"
PROJECT = "lowalign"
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
TIMEOUT = 30  # seconds that wandb may take to log in and to reach its server; its own is 90
SECRET = re.compile(r"(TOKEN|KEY|PASSWORD|SECRET)$")  # environment variables whose values are not logged
IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)|(?<=token=)[^&\s]+")


def refuse_not_installed(kind: str) -> None:
    """Raise UserError for a tracker that cannot be imported."""
    if kind == "none":
        return
    try:
        import_module(MODULES[kind])
    except ImportError as error:
        raise UserError(f"{kind} is not installed: pip install 'lowalign[{kind}]', or leave --track out") from error


class Tracker:
    """One run in one tracker. kind: of --track. name: of the run; default: of its folder. options: shown beside the metrics.

    done: the finished steps of a resumed run, which continues the tracker's run; None for another run.
    """

    def __init__(
        self, kind: str, name: str | None, out: Path, options: Mapping[str, Any], done: int | None = None
    ) -> None:
        self.kind = kind
        self._tracker: Any = None
        file = out / FILE
        ids = json.loads(file.read_text(encoding="utf-8")) if done is not None and file.exists() else {}

        def start() -> None:
            from accelerate import PartialState  # its trackers log through it

            PartialState()
            tracker = _tracker(kind, name or out.resolve().name, out, ids.get(kind), done or 0)
            with contextlib.redirect_stdout(sys.stderr):  # trackio prints; standard output is for results
                tracker.start()
            self._tracker = tracker
            write_json(file, ids | {kind: _id(kind, tracker.tracker)})
            if kind == "tensorboard":  # its own form makes another folder for them
                text = "\n".join(f"    {option}: {value}" for option, value in options.items())
                tracker.log({"options": text}, step=done or 0)
            elif kind not in ids:  # mlflow refuses other values
                tracker.store_init_configuration(dict(options))

        self._try(start)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Metrics of a step."""
        self._try(lambda: self._tracker and self._tracker.log(dict(values), step=step))

    def close(self) -> None:
        """End the run in the tracker, which may upload what is left."""
        with contextlib.redirect_stdout(sys.stderr):
            self._try(lambda: self._tracker and self._tracker.finish())

    def _try(self, action: Callable[[], object]) -> None:
        """Do it. At the first error there is one line, and nothing more is sent."""
        try:
            action()
        except Exception as error:
            self._tracker = None
            text = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:300].rstrip(".")
            log(f"{self.kind}: {text}. The run goes on without it; metrics.jsonl has everything")


def _tracker(kind: str, name: str, out: Path, known: str | None, done: int) -> Any:
    """accelerate's tracker, not started. known: the id of the run that it continues."""
    from accelerate import tracking

    if kind == "tensorboard":  # a resumed run repeats the steps after `done`
        return tracking.TensorBoardTracker("tensorboard", out, purge_step=done + 1)
    if kind == "mlflow":
        return tracking.MLflowTracker(PROJECT, run_id=known, run_name=name)
    if kind == "trackio":
        continued = {"name": known, "resume": "allow"} if known else {"name": name}
        return tracking.TrackioTracker(PROJECT, **continued)
    settings = {"init_timeout": TIMEOUT, "login_timeout": TIMEOUT}
    continued = {"id": known, "resume": "allow"} if known else {}
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return tracking.WandBTracker(project, name=name, dir=str(out), settings=settings, **continued)


def _id(kind: str, run: Any) -> str:
    """By which the tracker knows the run."""
    if kind == "tensorboard":
        return "tensorboard"  # the folder
    return {"wandb": lambda: run.id, "trackio": lambda: run.name, "mlflow": lambda: run.info.run_id}[kind]()


def without_secrets(text: str) -> str:
    """The text with … for the values of environment variables that hold credentials, and for those in URLs."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 6:
            text = text.replace(value, "…")
    return IN_URL.sub("…", text)
