"""`lowalign report`: the page of runs, with files written by the tests and with a real tiny run."""

import html
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lowalign.cli import main
from lowalign.commands import report as command
from lowalign.config.dump import dump
from lowalign.config.sections import DataConfig, TrainConfig
from lowalign.config.training import DPOConfig, SFTConfig
from tests.report.page_check import Page
from tests.tiny import tiny_folder

EVIL = "<script>alert('x')</script>\"'><img src=x onerror=y>"


def jsonl(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def made(folder, config=SFTConfig, steps=80, lr=1e-3, finished=True, files=("/home/somebody/rows.jsonl",)):
    """A run as the verbs write one: 80 noisy steps and three evaluations. Returns its folder."""
    (folder / "adapter").mkdir(parents=True)
    options = config(
        model="/home/somebody/models/base",
        out=folder,
        data=DataConfig(files=files),
        train=TrainConfig(steps=steps, learning_rate=lr),
    )
    (folder / "recipe.yaml").write_text(dump(options))
    rng = random.Random(steps)
    lines = [
        {"step": i, "loss": 2 - i / steps + rng.gauss(0, 0.2), "lr": lr / i, "tokens_per_second": 900 + rng.random()}
        for i in range(1, steps + 1)
    ]
    lines += [{"step": i, "eval/loss": 2.5 - i / steps} for i in (0, steps // 2, steps)]
    jsonl(folder / "metrics.jsonl", lines)
    if finished:
        meta = {"method": "sft", "step": steps, "base": {"name": "base"}, "metrics": {}}
        (folder / "adapter" / "lowalign.json").write_text(json.dumps(meta))
    return folder


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def page_of(*words, out):
    assert main(["report", *map(str, words), "--out", str(out)]) == 0
    return Page(out.read_text(encoding="utf-8"))


def drawn(page, name):
    """The polylines of the chart of a metric."""
    (svg,) = [svg for svg in page.svgs if svg.get("aria-label").partition(":")[0] == name]
    return [line.get("points").split() for line in svg.iter("polyline")]


def test_the_figures_of_a_run(tmp_path):
    run = made(tmp_path / "first")
    page = page_of(run, out=tmp_path / "page.html")
    lines = lines_of(run)
    for name in ("loss", "eval/loss", "lr", "tokens_per_second"):
        values = [(line[name], line["step"]) for line in lines if name in line]
        chosen = [values[0], values[-1], min(values), max(values)]
        assert page.row(name)[1:] == [f"{value:.4g}" for value, _ in chosen]
        assert all(f"{value!r} at step {step}" in page.titles for value, step in chosen)
    assert page.row("first")[:5] == ["first", "sft", "finished", "base", "80 of 80"]
    assert page.row("first")[5] == f"loss {lines[79]['loss']:.4g}, eval/loss 1.5"
    raw, strong, heldout = drawn(page, "loss")
    assert (len(raw), len(strong), len(heldout)) == (80, 80, 3) and raw != strong
    assert [len(line) for line in drawn(page, "lr")] == [80]  # no noise, so no average
    told = [title.text for svg in page.svgs for title in svg.iter("title")]
    assert {"held out, 0: 2.5", "held out, 40: 2.0", "held out, 80: 1.5"} <= set(told)


def test_smoothing_can_be_set(tmp_path):
    run = made(tmp_path / "run", steps=10)
    assert [len(x) for x in drawn(page_of(run, out=tmp_path / "a.html"), "loss")] == [10, 3]
    assert [len(x) for x in drawn(page_of(run, "--smooth", "0.5", out=tmp_path / "b.html"), "loss")] == [10, 10, 3]
    long = made(tmp_path / "long", steps=90)
    assert [len(x) for x in drawn(page_of(long, "--smooth", "0", out=tmp_path / "c.html"), "loss")] == [90, 3]


def test_several_runs_and_their_differences(tmp_path):
    runs = [made(tmp_path / name, lr=lr) for name, lr in (("a/run", 1e-3), ("b/run", 1e-3), ("c", 3e-4))]
    other = made(tmp_path / "other", config=DPOConfig)
    page = page_of(*runs, other, out=tmp_path / "page.html")
    lasts = [f"{lines_of(run)[79]['loss']:.4g}" for run in runs]
    assert ["loss", *lasts] in [[cell.strip() for cell in row] for row in page.cells]
    assert ["option", "a/run", "b/run", "c"] in page.cells  # the shortest names that differ
    assert page.row("train.learning_rate") == ["train.learning_rate", "0.001", "0.001", "0.0003"]
    assert not [row for row in page.cells if row and row[0] in ("out", "train.steps")]
    charts = [svg for svg in page.svgs if svg.get("aria-label").startswith("loss:")]
    assert [len(list(svg.iter("polyline"))) for svg in charts] == [9, 3]  # sft: three runs; dpo by itself
    colors = {line.get("stroke") for line in charts[0].iter("polyline")}
    assert colors == {"var(--c0)", "var(--c1)", "var(--c2)"}
    assert "The runs have the same options." in page_of(*runs[:2], out=tmp_path / "same.html").text


def test_files_of_the_same_name_in_other_folders_differ(tmp_path):
    runs = [made(tmp_path / name, files=(f"/data/{name}/rows.jsonl",)) for name in ("a", "b")]
    page = page_of(*runs, out=tmp_path / "page.html")
    assert page.row("data.files") == ["data.files", "rows.jsonl (folder 1)", "rows.jsonl (folder 2)"]


def test_no_path_of_the_machine_but_the_one_that_the_user_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = made(Path("runs") / "first")
    where = "/home/somebody/rows.jsonl"
    report = {
        "train": {"files": [{"file": where, "rows": 3, "dropped": {"empty": {"rows": 1, "first": [f"{where}:2"]}}}]}
    }
    (run / "data_report.json").write_text(json.dumps(report))
    page = page_of(run, out=Path("page.html"))
    raw = Path("page.html").read_text()
    assert "somebody" not in raw and str(tmp_path) not in raw
    assert "lowalign sft runs/first/recipe.yaml --out runs/first-again" in page.text
    assert "1 dropped: empty (first: rows.jsonl:2)" in page.text and "model: base" in page.text


def test_the_command_is_one_that_can_be_typed(tmp_path):
    run = made(tmp_path / "it's; rm -rf $HOME")
    text = page_of(run, out=tmp_path / "page.html").text
    (line,) = [line for line in text.split("\n") if line.strip().startswith("lowalign sft")]
    assert shlex.split(line) == ["lowalign", "sft", str(run / "recipe.yaml"), "--out", f"{run}-again"]
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("verb: sft", "verb: sft; curl evil"))
    page = page_of(run, out=tmp_path / "page.html")
    assert "The command" not in page.text


def test_everything_is_escaped(tmp_path):
    run = made(tmp_path / EVIL.replace("/", "_"))
    metrics = [{"step": i, EVIL: i, f"eval/{EVIL}": 1.5, "\ud800\x00\x1b[31m": 2.0} for i in range(4)]
    jsonl(run / "metrics.jsonl", metrics)
    recipe = (run / "recipe.yaml").read_text().replace("/home/somebody/models/base", json.dumps(EVIL))
    (run / "recipe.yaml").write_text(recipe.replace("eval: []", f"eval: [{json.dumps(EVIL)}]"))
    meta = {"method": EVIL, "base": {"name": EVIL}, "merge": {"onto": EVIL, EVIL: EVIL}}
    (run / "adapter" / "lowalign.json").write_text(json.dumps(meta))
    file = {"file": EVIL, "rows": 1, "dropped": {EVIL: {"rows": 1, "first": [EVIL]}}, "lengths": {EVIL: {EVIL: 1}}}
    file |= {
        "ignored_columns": {EVIL: 1},
        "notes": {EVIL: 1},
        "cut": {EVIL: 1},
        "end_of_turn": {"turns": 1, "ended": EVIL},
    }
    (run / "data_report.json").write_text(json.dumps({EVIL: {"files": [file], "heldout": True}}))
    chat = [{"role": EVIL, "content": EVIL}, {"role": "user", "content": [{"text": EVIL}]}]
    jsonl(run / "samples.jsonl", [{"round": 0, "prompt": chat, "completion": EVIL, "reward": 1}])
    jsonl(run / "candidates.jsonl", [{"prompt": EVIL, "completions": [{"completion": EVIL, "score": 1.0}]}])
    jsonl(run / "pairs.jsonl", [{"prompt": EVIL, "chosen": EVIL, "rejected": chat}])
    (run / "result.json").write_text(json.dumps({EVIL: EVIL, "list": [EVIL], "rows": [{EVIL: EVIL}], "win_rate": 0.5}))
    stage = {EVIL: {"verb": EVIL, "seconds": EVIL, "figures": {EVIL: EVIL}}}
    (run / "pipeline.json").write_text(json.dumps({"stages": stage}))
    page = page_of(run, out=tmp_path / "page.html")  # Page knows the tags, and asserts that no data made one
    assert page.text.count(EVIL) > 20
    raw = (tmp_path / "page.html").read_bytes().decode("utf-8")
    assert html.escape(EVIL) in raw and not re.search(r"<script|<img|[\x00-\x08\x0b-\x1f]", raw)
    assert "http://" not in raw and "https://" not in raw
    policy = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_broken_files_are_left_out_and_counted(tmp_path):
    run = made(tmp_path / "run")
    good = {"step": 1, "loss": 1.0, "kl": None}
    raw = [
        json.dumps(good),
        "{",
        "[]",
        '{"loss": 3}',
        '{"step": true, "loss": 9}',
        '{"step": 2, "loss": NaN}',
        "[" * 100_000,
    ]
    raw += [json.dumps({"step": 3, "loss": 10**400}), json.dumps({"step": 4, "loss": True, "kl": "x", "lr": math.inf})]
    (run / "metrics.jsonl").write_text("\n".join([*raw, '{"step": 5, "lo']))  # the last line is being written
    for name in ("data_report.json", "report.json", "pipeline.json", "adapter/lowalign.json"):
        (run / name).write_text("[" * 100_000)
    (run / "samples.jsonl").write_text('{"round": 0}\n{"round": 1, "reward": 1}\n7\n')
    (run / "recipe.yaml").write_text("a: &a [1]\nb: *a\n")
    page = page_of(run, out=tmp_path / "page.html")
    assert "run: broken lines of metrics.jsonl, left out: 5." in page.text
    assert "not finite, left out of the curves: 4." in page.text  # null, NaN, 10**400, infinity
    assert page.row("loss")[1:] == ["1"] * 4
    for text in (
        "null",
        "[]",
        '{"train": 3}',
        '{"train": {"files": [1, {"lengths": 3, "dropped": {"a": 7, "b": null}}]}}',
    ):
        (run / "data_report.json").write_text(text)
        page_of(run, out=tmp_path / "page.html")


def test_samples_over_the_rounds(tmp_path):
    run = made(tmp_path / "run")
    lines = [
        {"round": n, "prompt": f"question {n}.{k}", "completion": f"answer {n}.{k}", "reward": n + k / 10}
        for n in range(20)
        for k in range(6)
    ]
    jsonl(run / "samples.jsonl", lines)
    page = page_of(run, out=tmp_path / "page.html")
    assert "Round 0 (the last is 19), 4 of 6 samples" in page.text and "Round 19" in page.text
    shown = re.findall(r"answer (\d+)\.(\d)", page.text)
    assert len({n for n, _ in shown}) == 8 and {k for _, k in shown} == {"0", "1", "2", "3"}
    assert "reward  0.1 " in page.text.replace("\n", " ").replace(",", "") and "19.3" in page.titles
    told = [title.text for svg in page.svgs for title in svg.iter("title")]
    means = [sum(line["reward"] for line in lines if line["round"] == n) / 6 for n in range(20)]
    assert [f"mean reward, by round, {n}: {mean!r}" for n, mean in enumerate(means)] == [
        x for x in told if "by round" in x
    ]


def test_results_of_other_verbs(tmp_path):
    best = tmp_path / "best"
    best.mkdir()
    rewards = {"1": 0.25, "2": 0.5, "4": 1.0}
    (best / "report.json").write_text(json.dumps({"prompts": 3, "n": 4, "mean_reward": rewards, "acceptance": 0.75}))
    completions = [{"completion": f"text {s}", "score": s} for s in (0.5, 2.0, -1.0)]
    jsonl(best / "candidates.jsonl", [{"prompt": "why?", "completions": completions}])
    compared, merged = tmp_path / "compared", tmp_path / "merged"
    compared.mkdir()
    result = {"win_rate": 0.625, "interval": [0.5, 0.71234567], "ties": 2}
    ratings = [{"policy": "/home/x/dpo", "rating": 51.25}, {"policy": "base", "interval": [-3, 4.5]}]
    (compared / "result.json").write_text(json.dumps(result | {"ratings": ratings}))
    (compared / "recipe.yaml").write_text("verb: compare\na: /home/x/dpo\nb: base\ndata: [p q.jsonl]\njudge: 'it$'\n")
    merged.mkdir()
    (merged / "lowalign.json").write_text(json.dumps({"merge": {"kl": 1.5e-6, "verified": True, "onto": "original"}}))
    page = page_of(best, compared, merged, out=tmp_path / "page.html")
    assert page.row("acceptance") == ["acceptance", "0.75"] and page.row("interval") == ["interval", "0.5, 0.7123"]
    assert [page.row(name) for name in ("policy", "dpo")] == [["policy", "rating", "interval"], ["dpo", "51.25", "–"]]
    assert ["base", "–", "-3, 4.5"] in page.cells
    (line,) = [line for line in page.text.split("\n") if line.strip().startswith("lowalign compare")]
    words = ["lowalign", "compare", "--a", "dpo", "--b", "base", "--data", "p q.jsonl", "--judge", "it$"]
    assert shlex.split(line) == [*words, "--out", f"{compared}-again"]
    assert page.row("kl") == ["kl", "1.5e-06"] and page.row("win_rate")[1] == "0.625"
    assert "text 2.0" in page.text and "text -1.0" in page.text and "text 0.5" not in page.text
    (line,) = drawn(page, "mean reward by n")
    assert len(line) == 3


def test_rounds_of_best_of_n(tmp_path):
    run = tmp_path / "best"
    made(run / "round-1" / "sft")
    (run / "recipe.yaml").write_text("verb: best-of-n\nrounds: 2\n")
    for k in (1, 2):
        (run / f"round-{k}").mkdir(exist_ok=True)
        (run / f"round-{k}" / "report.json").write_text(json.dumps({"mean_reward": {"1": 0.5, "8": k}}))
    page = page_of(run, out=tmp_path / "page.html")
    states = {row[0]: row[1:3] for row in page.cells if len(row) == 6}
    assert states["best"] == ["best-of-n", "not finished"] and states["round-1"] == ["best-of-n", "finished"]
    assert len(drawn(page, "mean reward by n")) == 2
    made(run / "round-2" / "sft")
    page = page_of(run, out=tmp_path / "page.html")
    assert {row[0]: row[2] for row in page.cells if len(row) == 6}["best"] == "finished"


def test_the_step_of_an_adapter_that_is_not_the_last(tmp_path):
    run = made(tmp_path / "first")
    (run / "adapter" / "lowalign.json").write_text(json.dumps({"step": 60}))
    assert page_of(run, out=tmp_path / "page.html").row("first")[4] == "80 of 80, adapter of 60"


def test_a_pipeline_and_a_folder_of_runs(tmp_path):
    out = tmp_path / "whole"
    second, first = made(out / "sft"), made(out / "dpo", config=DPOConfig)
    stages = {
        "sft": {"verb": "sft", "seconds": 12.5, "figures": {"loss": 1.25}},
        "dpo": {"verb": "dpo", "seconds": 3.0},
    }
    (out / "pipeline.json").write_text(json.dumps({"stages": stages}))
    os.utime(first / "recipe.yaml", (1, 1))
    page = page_of(out, out=tmp_path / "page.html")
    assert [row[0] for row in page.cells if len(row) == 6][1:] == ["sft", "dpo"]
    assert ["sft", "sft", "12.5", "loss 1.25"] in page.cells
    (out / "pipeline.json").unlink()  # not one stage has ended: in the order in which they began
    page = page_of(out, second, out=tmp_path / "page.html")  # named twice, shown once
    assert [row[0] for row in page.cells if len(row) == 6][1:] == ["dpo", "sft"]


def test_the_default_place_and_an_adapter_instead_of_its_run(tmp_path):
    run = made(tmp_path / "run")
    assert main(["report", str(run / "adapter")]) == 0
    assert "80 of 80" in (run / "report.html").read_text()
    assert main(["report", str(run)]) == 0  # a report is replaced


def test_a_run_that_has_only_begun(tmp_path):
    run = made(tmp_path / "run", finished=False)
    (run / "metrics.jsonl").unlink()
    page = page_of(run, out=tmp_path / "page.html")
    assert "No metrics yet." in page.text and [row[2] for row in page.cells] == ["state", "not finished"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["report"], "no run to report: lowalign report RUN… --out FILE.html"),
        (["report", "{here}/none"], "none is not there; give the folder of a run"),
        (["report", "{here}/file"], "file is a file; give the folder of a run"),
        (["report", "{here}/empty"], "empty is no run: neither it nor a folder in it has a recipe.yaml"),
        (["report", "{here}/run", "--smooth", "1"], "--smooth is 1.0; it must be at least 0 and below 1"),
        (["report", "{here}/run", "{here}/run2"], "a report of several runs needs a place: give --out FILE.html"),
        (["report", "{here}/run", "--out", "{here}/empty"], "is a folder; give the file of the page, such as"),
        (["report", "{here}/run", "--out", "{here}/file"], "is there, and no report of lowalign; it is not replaced"),
        (["report", "{here}/run", "--out", "{here}/file/page.html"], "page.html cannot be"),
    ],
)
def test_mistakes(tmp_path, capsys, words, message):
    made(tmp_path / "run")
    made(tmp_path / "run2")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert main([word.format(here=tmp_path) for word in words]) == 1
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"


def test_live_ends_with_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PAUSE", 0.05)
    run, out = made(tmp_path / "run", finished=False), tmp_path / "page.html"
    holder = (
        "import sys; from pathlib import Path; from lowalign.train.lock import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", holder, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["report", str(run), "--live", "--out", str(out)])))
    thread.start()
    seen = wait_for(out, "running")
    assert '<meta http-equiv="refresh"' in seen and "reloads" in Page(seen).text
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 81, "loss": 0.123456}\n')
    assert thread.is_alive()
    wait_for(out, "0.123456 at step 81")
    child.communicate()
    thread.join(60)
    final = out.read_text()
    assert codes == [0] and 'http-equiv="refresh"' not in final and "not finished" in final


def test_live_without_a_running_run_and_after_ctrl_c(tmp_path, monkeypatch, capsys):
    run, out = made(tmp_path / "run"), tmp_path / "page.html"
    assert main(["report", str(run), "--live", "--out", str(out)]) == 0
    assert "no run is in progress: the page is written once" in capsys.readouterr().err

    def interrupt(_):
        assert 'http-equiv="refresh"' in out.read_text()
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", interrupt)
    monkeypatch.setattr(command, "in_use", lambda folder: True)
    assert main(["report", str(run), "--live", "--out", str(out)]) == 130
    assert 'http-equiv="refresh"' not in out.read_text()


def wait_for(file, text):
    """The content of a file, once it holds the text."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if file.exists() and text in (content := file.read_text()):
            return content
        time.sleep(0.02)
    raise AssertionError(f"{text} did not come")


def test_a_real_run(tmp_path, monkeypatch):
    """The page of a tiny sft run: its figures are those of metrics.jsonl, its command repeats it bit for bit."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "model", "llama")
    jsonl(tmp_path / "rows.jsonl", [{"prompt": "the quick", "completion": f" brown fox {i}"} for i in range(12)])
    flags = ["--train.steps", "4", "--train.batch-size", "4", "--train.log-every", "1", "--data.eval-rows", "4"]
    given = ["--model", "model", "--data", "rows.jsonl", "--out", "runs/first"]
    assert main(["sft", "lora/sft", *given, *flags]) == 0
    page = page_of("runs/first", out=tmp_path / "page.html")
    lines = lines_of(tmp_path / "runs/first")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert page.row("loss")[1:] == [f"{x:.4g}" for x in (losses[0], losses[-1], min(losses), max(losses))]
    told = [title.text for svg in page.svgs for title in svg.iter("title")]
    assert [f"training, {i + 1}: {loss!r}" for i, loss in enumerate(losses)] == [
        text for text in told if any(text.endswith(repr(loss)) for loss in losses)
    ]
    assert page.row("first")[1:3] == ["sft", "finished"] and "12 rows, 12 used" in page.text
    (line,) = [line.strip() for line in page.text.split("\n") if line.strip().startswith("lowalign sft")]
    assert main(shlex.split(line)[1:]) == 0
    weights = [tmp_path / f"runs/{name}/adapter/adapter_model.safetensors" for name in ("first", "first-again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
