"""`lowalign run`: stages on one load of the base, skipped when finished, resumed when killed; what is wrong is said first."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock

from lowalign import Base
from lowalign.cli import main
from lowalign.config.commands import PipelineConfig
from lowalign.config.pipeline import read_pipeline
from lowalign.errors import UserError
from tests.commands import child
from tests.report.page_check import Page
from tests.tiny import WORDS, tiny_folder

PIPELINES = sorted((Path(__file__).parents[2] / "adapters" / "pipelines").glob("*.yaml"))
TRAIN = "{steps: 4, batch_size: 4, learning_rate: 1e-2, save_every: 1, optimizer: adamw}"
STAGES = f"""
verb: run
stages:
  sft: {{data: "{{rows}}", train: {TRAIN}}}
  dpo: {{recipe: lora/dpo, data: "{{pairs}}", init: "{{sft}}", train: {TRAIN}}}
  merge: {{adapters: "{{dpo}}", dtype: float32}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_folder(folder / "model", "llama")
    rng = random.Random(0)
    turn = lambda role: [{"role": role, "content": " ".join(rng.choices(WORDS, k=6))}]  # noqa: E731
    rows = {
        "rows": [{"messages": turn("user") + turn("assistant")} for _ in range(16)],
        "pairs": [
            {"prompt": turn("user"), "chosen": turn("assistant"), "rejected": turn("assistant")} for _ in range(16)
        ],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "pipeline.yaml").write_text(STAGES)
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def command(world, out, file=None):
    options = ["--set", f"rows={world / 'rows.jsonl'}", f"pairs={world / 'pairs.jsonl'}", "--base.dtype", "float32"]
    return ["run", str(file or world / "pipeline.yaml"), "--model", str(world / "model"), "--out", str(out), *options]


def weights(out):
    return {name: (out / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("sft", "dpo")}


def done(out):
    """The names of the finished stages."""
    file = out / "pipeline.json"
    return list(json.loads(file.read_text())["stages"]) if file.exists() else []


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(world, out)) == 0
    return out


def test_the_base_is_loaded_once(world, tmp_path, monkeypatch, capsys):
    loads = []
    load = Base.load.__func__
    monkeypatch.setattr(Base, "load", classmethod(lambda cls, *a, **k: loads.append(a) or load(cls, *a, **k)))
    assert main(command(world, tmp_path / "out")) == 0
    assert len(loads) == 1  # merge compares on it too
    lines = capsys.readouterr().err.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("stage  ")) :]
    assert [line.split()[:2] for line in table] == [
        ["stage", "verb"],
        ["sft", "sft"],
        ["dpo", "dpo"],
        ["merge", "merge"],
    ]
    assert "kl" in table[-1]
    report = json.loads((tmp_path / "out" / "pipeline.json").read_text())["stages"]
    assert list(report) == ["sft", "dpo", "merge"] and report["merge"]["figures"]["kl"] < 1e-3
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    rows = [[cell.strip() for cell in row] for row in page.cells]
    assert [row[:3] for row in rows if len(row) == 6][1:] == [[name, name, "finished"] for name in report]
    kl = report["merge"]["figures"]["kl"]
    assert ["kl", f"{kl:.4g}"] in rows

    (tmp_path / "out" / "report.html").write_text("mine")
    assert main(command(world, tmp_path / "out")) == 0  # again: nothing is left to do
    error = capsys.readouterr().err
    assert error.count("finished before") == 3 and len(loads) == 1
    assert "no report: " in error and (tmp_path / "out" / "report.html").read_text() == "mine"


def test_the_stages_equal_their_verbs(world, finished, tmp_path):
    """The adapter of the second stage, by `lowalign sft` and `lowalign dpo` alone."""
    options = [
        "--train.steps",
        "4",
        "--train.batch-size",
        "4",
        "--train.learning-rate",
        "1e-2",
        "--train.optimizer",
        "adamw",
    ]
    common = ["--model", str(world / "model"), "--base.dtype", "float32", "--train.save-every", "1", *options]
    assert main(["sft", *common, "--data", str(world / "rows.jsonl"), "--out", str(tmp_path / "sft")]) == 0
    start = ["--init", str(tmp_path / "sft")]
    assert main(["dpo", *common, *start, "--data", str(world / "pairs.jsonl"), "--out", str(tmp_path / "dpo")]) == 0
    assert weights(tmp_path) == weights(finished)


@pytest.mark.parametrize("stage", ["sft", "dpo", "merge"])
def test_killed_and_run_again(stage, world, finished, tmp_path):
    out = tmp_path / "out"
    process = child.start(command(world, out))
    begun = {"merge": lambda: "dpo" in done(out)}.get(stage, lambda: [*(out / stage / "checkpoints").glob("step-*")])
    deadline = time.monotonic() + 300
    while not begun() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert stage not in done(out)
    assert main(command(world, out)) == 0
    assert weights(out) == weights(finished)
    merged = [(folder / "merge" / "model.safetensors").read_bytes() for folder in (out, finished)]
    assert merged[0] == merged[1]


def test_a_stage_that_fails_leaves_the_others(world, finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "world" / "pairs.jsonl").write_text('{"prompt": "no answers"}\n')
    assert main(command(tmp_path / "world", out)) == 1
    error = capsys.readouterr().err
    assert "stage dpo: " in error and "finished stages are kept; the same command goes on here" in error
    assert (out / "sft" / "adapter" / "lowalign.json").exists()


def test_one_process_at_a_time(world, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        assert main(command(world, tmp_path / "out")) == 1
    assert f"{tmp_path / 'out'} is in use by another process" in capsys.readouterr().err
    assert not (tmp_path / "out" / "sft").exists()


def test_other_options_are_refused(world, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    other = tmp_path / "other.yaml"
    other.write_text(STAGES.replace("learning_rate: 1e-2", "learning_rate: 2e-2"))
    assert main(command(world, tmp_path / "out", other)) == 1
    assert "stage sft is finished in " in capsys.readouterr().err


def test_a_signal_stops_it_and_it_goes_on(world, finished, tmp_path):
    out = tmp_path / "out"
    process = child.start(command(world, out))
    while not (out / "sft" / "recipe.yaml").exists() and process.is_alive():
        time.sleep(0.002)
    process.terminate()
    process.join()
    assert process.exitcode in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
    assert main(command(world, out)) == 0
    assert weights(out) == weights(finished)


def test_dry_run_starts_nothing(world, tmp_path, capsys):
    assert main([*command(world, tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"# dpo: lowalign dpo → {tmp_path / 'out' / 'dpo'}" in printed
        and f"init: {tmp_path / 'out' / 'sft'}" in printed
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_packaged_pipelines_are_read(path, tmp_path):
    """With the names that their header tells, each stage's options are complete; the header's command names the file."""
    header = path.read_text().partition("verb:")[0]
    names = header.partition("--set ")[2].partition(" --")[0].split()
    config = PipelineConfig(file=f"pipelines/{path.stem}", out=tmp_path, model="M", set=tuple(names))
    assert f"lowalign run pipelines/{path.stem} " in header
    assert next(stage.name for stage in read_pipeline(config)) == "sft"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "stages: {sft: {data: '{nothing}'}}",
            r"f.yaml:1: \{nothing\} is no earlier stage; give it with --set nothing=VALUE",
        ),
        ("stages: {dpo: {init: '{sfd}', data: x}, sft: {data: x}}", r"\{sfd\} is no earlier stage"),
        ("stages: {a: {verb: sfx, data: x}}", "stage a has no verb that is known; write `verb: sft`"),
        ("stages: {chat: {}}", "stage chat has no verb that is known"),
        ("stages: {a: {verb: dpo, recipe: lora/sft, data: x}}", "lora/sft is a recipe for sft, not for dpo"),
        (
            "stages: {sft: {data: x, train: {stepz: 3}}}",
            r"f.yaml:1: there is no key train.stepz; did you mean train.steps\?",
        ),
        ("stages: {sft: {data: x, train: {steps: many}}}", "f.yaml:1: train.steps: expected a whole number"),
        ("stages: {sft: {data: x, out: y}}", "stage sft: out is set for all stages by the pipeline"),
        ("stages: {sft: {data: x, base: {dtype: float32}}}", "stage sft: base is set for all stages"),
        ("stages: {sft: {data: x}, sft: {data: y}}", "a key is one word, and stands once"),
        ("stages: {a b: {data: x}}", "a b cannot be the name of a stage"),
        ("stages: {}", "there is no stage"),
        ("stages: sft", "stages is made of lines"),
        ("stage: {}", r"there is no key stage; did you mean stages\?"),
        ("verb: sft\nmodel: m", "is a recipe for sft, not a pipeline"),
        ("- a", "a pipeline is made of lines"),
        ("stages: {sft: &a {data: x}}", ""),
    ],
)
def test_held_wrong(text, message, tmp_path):
    (tmp_path / "f.yaml").write_text(text + "\n")
    config = PipelineConfig(file=str(tmp_path / "f.yaml"), out=tmp_path / "out", model="M")
    if not message:  # an anchor that nothing refers to is harmless
        assert read_pipeline(config)
        return
    with pytest.raises(UserError, match=message):
        read_pipeline(config)
    assert not (tmp_path / "out").exists()


def test_set_held_wrong(tmp_path):
    (tmp_path / "f.yaml").write_text("stages: {sft: {data: x}}\n")
    with pytest.raises(UserError, match="--set takes NAME=VALUE, found rows"):
        read_pipeline(PipelineConfig(file=str(tmp_path / "f.yaml"), out=tmp_path, model="M", set=("rows",)))
    with pytest.raises(UserError, match="there is no recipe nope"):
        read_pipeline(PipelineConfig(file="nope", out=tmp_path, model="M"))
    with pytest.raises(UserError, match="sft cannot be the name of a stage: it is taken"):
        read_pipeline(PipelineConfig(file=str(tmp_path / "f.yaml"), out=tmp_path, model="M", set=("sft=x",)))
