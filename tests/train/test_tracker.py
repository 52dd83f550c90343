"""--track: what reaches each tracker, that a resumed run continues its run, and that no tracker can end a run.

tensorboard is the real one. The others are modules with the part of their documented interface that accelerate calls.
"""

import json
import math
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
from accelerate.tracking import MLflowTracker

from lowalign.config.commands import BestOfNConfig
from lowalign.config.recipe import parse
from lowalign.config.sections import DataConfig, TrainConfig
from lowalign.config.training import SFTConfig
from lowalign.errors import UserError
from lowalign.train.run_folder import flat_options
from lowalign.train.tracker import Tracker, refuse_not_installed, without_secrets
from tests.train import toy


class Server:
    """What a tracker was told: (run id, "start" | "log" | "finish", …). fails: the call that raises."""

    def __init__(self, fails: str | None = None) -> None:
        self.calls, self.fails, self.started = [], fails, 0

    def add(self, what: str, *values: object) -> None:
        self.calls.append((what, *values))
        if what == self.fails:
            raise ConnectionError("no route to https://me:hunter2hunter2@host, key 0123456789abcdef")

    def run(self, **options: object) -> SimpleNamespace:
        self.started += 1
        self.add("start", options)
        name = options.get("id") or options.get("run_id") or options.get("name") or options.get("run_name")
        return SimpleNamespace(
            id=f"id-{name}" if "id" not in options else name,
            name=name,
            info=SimpleNamespace(run_id=name),
            log=lambda values, step: self.add("log", step, values),
            finish=lambda: self.add("finish"),
        )


def modules(server: Server) -> dict[str, ModuleType]:
    config = SimpleNamespace(update=lambda values, allow_val_change: server.add("options", values))
    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    mlflow = {
        "search_experiments": lambda filter_string: [SimpleNamespace(experiment_id="0")],
        "start_run": server.run,
        "log_params": lambda values: server.add("options", values),
        "log_metrics": lambda values, step: server.add("log", step, values),
        "end_run": lambda: server.add("finish"),
        "utils": SimpleNamespace(validation=limits),
    }
    alike = {"init": server.run, "config": config}
    made = {}
    for name, members in {"wandb": alike, "trackio": alike, "mlflow": mlflow}.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(members)
    return made


@pytest.fixture
def server(monkeypatch):
    def install(fails: str | None = None) -> Server:
        made = Server(fails)
        for name, module in modules(made).items():
            monkeypatch.setitem(sys.modules, name, module)
        return made

    return install


def expected(out):
    """(step, metrics) of every line of metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line.pop("step"), line) for line in lines]


@pytest.mark.parametrize("kind", ["wandb", "trackio", "mlflow"])
def test_every_line_reaches_the_tracker_and_a_resume_continues_its_run(kind, server, tmp_path):
    told, out = server(), tmp_path / "first"
    toy.run(out, hook=toy.signal_at(5), track=kind)
    toy.run(out, resume=True, track=kind)
    logged = [(step, values) for what, *rest in told.calls if what == "log" for step, values in [rest]]
    assert logged == expected(out)
    assert [what for what, *_ in told.calls if what in ("start", "finish")] == ["start", "finish"] * 2
    first, again = (call[1] for call in told.calls if call[0] == "start")
    assert first.get("run_name" if kind == "mlflow" else "name") == "first"
    assert first.get("id") is None and first.get("run_id") is None and first.get("resume") in (None, "never")
    continued = {
        "wandb": {"id": "id-first", "resume": "allow"},
        "trackio": {"name": "first", "resume": "allow"},
        "mlflow": {"run_id": "first"},
    }
    assert again.items() >= continued[kind].items()


def test_its_name_and_options(server, tmp_path):
    told = server()
    options = {"model": "M", "train.learning_rate": 2e-4, "init": None, "data.files": "a.jsonl, b.jsonl"}
    tracker = Tracker("wandb", "mine", tmp_path, options)
    tracker.close()
    start, sent, _ = told.calls
    assert start[1]["name"] == "mine" and start[1]["project"] == "lowalign" and sent == ("options", options)
    Tracker("wandb", "mine", tmp_path, options, done=None)  # not a resumed run: another one
    assert "id" not in told.calls[3][1]


def test_tensorboard_has_every_number_of_a_resumed_run_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy.run(tmp_path, hook=toy.signal_at(5), track="tensorboard", save_every=2)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000005")  # as if it was killed: step 5 is repeated
    toy.run(tmp_path, resume=True, track="tensorboard")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    for name in ("loss", "eval/loss", "peak_process_memory_gib"):
        lines = [(step, values[name]) for step, values in expected(tmp_path) if name in values]
        found = [(event.step, event.value) for event in board.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in lines] and len(lines) >= 4
        assert all(math.isclose(a, b, rel_tol=1e-6) for (_, a), (_, b) in zip(found, lines, strict=True))  # fp32


@pytest.mark.parametrize("kind", ["wandb", "trackio", "mlflow"])
@pytest.mark.parametrize("fails", ["start", "options", "log", "finish"])
def test_no_failure_of_a_tracker_ends_the_run(kind, fails, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    told = server(fails)
    tracker = Tracker(kind, None, tmp_path, {"train.steps": 1})
    tracker.log({"loss": 1.0}, 1)
    tracker.log({"loss": 1.0}, 2)
    tracker.close()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line == (
        f"{kind}: ConnectionError: no route to https://…@host, key …. The run goes on without it; metrics.jsonl has everything"
    )
    assert sum(what == fails for what, *_ in told.calls) == 1


def test_a_run_whose_tracker_fails(server, tmp_path, capsys):
    server("log")
    assert toy.run(tmp_path, track="wandb")[2].step == 8
    assert capsys.readouterr().err.count("The run goes on without it") == 1
    assert "0123456789abcdef" not in "".join(p.read_text() for p in tmp_path.glob("*.json*"))


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_one_that_is_not_installed(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if kind == "tensorboard" else kind, None)
    with pytest.raises(UserError, match=rf"{kind} is not installed: pip install 'lowalign\[{kind}\]'"):
        refuse_not_installed(kind)
    refuse_not_installed("none")


def test_secrets_in_messages(monkeypatch):
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "tr-123456")
    text = "https://u:p@h/?write_token=abc&x=1 failed with tr-123456 at https://h/path"
    assert without_secrets(text) == "https://…@h/?write_token=…&x=1 failed with … at https://h/path"


def test_accelerates_trackers_take_what_they_are_given():
    """The keyword that continues a run is one of mlflow's tracker; the others pass theirs on."""
    assert MLflowTracker("p", run_id="x", run_name="n").run_id == "x"


def test_options_are_plain_values_without_local_paths(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    data = DataConfig(files=(str(tmp_path / "rows.jsonl"), "hub/rows"), template=tmp_path / "chat.jinja")
    shown = flat_options(SFTConfig(model="M", out=tmp_path, data=data, train=TrainConfig(betas=(0.9, 0.95))))
    assert shown["data.files"] == "rows.jsonl, hub/rows" and shown["data.template"] == "chat.jinja"
    assert (shown["train.betas"], shown["train.learning_rate"], shown["init"]) == ("0.9, 0.95", 2e-4, None)
    assert str(tmp_path) not in json.dumps(shown)


@pytest.mark.parametrize(
    "flags", [("--track", "wandb", "--run-name", "x"), ("--train.track=wandb", "--train.run-name=x")]
)
def test_the_flags(flags, tmp_path):
    (tmp_path / "r.yaml").write_text("verb: sft\ntrain:\n  track: mlflow\n")
    config = parse(SFTConfig, ["--model", "M", "--out", "O", *flags], tmp_path / "r.yaml")
    assert (config.train.track, config.train.run_name) == ("wandb", "x")


def test_the_flags_of_the_training_in_best_of_n():
    for flag in ("--track", "--sft.train.track"):
        config = parse(BestOfNConfig, ["--model", "M", "--out", "O", flag, "wandb"])
        assert config.sft.train.track == "wandb"
