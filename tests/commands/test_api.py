"""`import lowalign as la`: the same runs as the command line, from Python; its errors are exceptions with the same messages."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

import lowalign as la
from lowalign.cli import main
from lowalign.errors import UserError
from tests.commands.tiny_runs import load
from tests.tiny import tiny_folder

ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(8)]
PAIRS = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "The dog."} for i in range(8)]
STEPS = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "optimizer": "adamw"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load(tiny_folder(tmp_path_factory.mktemp("base") / "model", "llama"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def weights(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def command(verb, base, data, out):
    train = [f"--train.{name.replace('_', '-')}={value}" for name, value in STEPS.items()]
    same = ["--base.quantization", "none", "--base.dtype", "float32"]
    return [verb, "--model", str(base.folder), "--data", str(data), "--out", str(out), *same, *train]


def test_the_adapter_is_that_of_the_command_line(base, tmp_path):
    """From a list of rows, a datasets.Dataset and a file: bit for bit."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main([*command("sft", base, tmp_path / "rows.jsonl", tmp_path / "cli"), "--adapter.r", "4"]) == 0
    for name, data in (("rows", ROWS), ("dataset", Dataset.from_list(ROWS)), ("file", tmp_path / "rows.jsonl")):
        run = la.sft(base, data=data, out=tmp_path / name, adapter=la.LoRA(r=4), **STEPS)
        assert run.adapter == tmp_path / name / "adapter"
        assert weights(tmp_path / name) == weights(tmp_path / "cli"), name


def test_preferences_and_a_section(base, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    first = la.sft(base, data=ROWS, out=tmp_path / "sft", **STEPS)
    start = ["--init", str(tmp_path / "sft"), "--dpo.beta", "0.3"]
    assert main([*command("dpo", base, tmp_path / "pairs.jsonl", tmp_path / "cli"), *start]) == 0
    la.dpo(base, data=PAIRS, out=tmp_path / "dpo", init=first.out, dpo={"beta": 0.3}, train=STEPS)
    assert weights(tmp_path / "dpo") == weights(tmp_path / "cli")


def test_what_a_run_answers(base, tmp_path):
    run = la.sft(base, data=ROWS, eval_rows=2, out=tmp_path / "run", eval_every=1, **STEPS)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    metrics = run.metrics if isinstance(run.metrics, list) else run.metrics.to_dict("records")
    assert [line["loss"] for line in metrics if line.get("loss") == line.get("loss") and "loss" in line] == [
        line["loss"] for line in lines if "loss" in line
    ]
    losses = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    assert run.best_step == min(losses, key=losses.get)
    host = la.Host(base)
    host.load("run", run.adapter)
    from lowalign.data.chat import Chat

    chat = Chat(base.tokenizer)
    with host.use("run"):
        prompt = chat.prompt_ids([{"role": "user", "content": "What is 3?"}])
        ids = host.generate([prompt], 1, la.Sampling(temperature=0, max_new_tokens=6))[0][0].ids
    host.delete("run")
    expected = base.tokenizer.decode(ids, skip_special_tokens=True)
    assert run.generate("What is 3?", temperature=0, max_new_tokens=6) == [expected]


def test_ppo_with_a_function(base, tmp_path):
    """A function of this file as reward, without a file that is run again."""
    calls = []

    def length(prompts, completions):
        calls.append(len(completions))
        return [float(len(text)) for text in completions]

    sizes = {"rollout": {"prompts": 4}, "ppo": {"advantage": "group"}, "max_new_tokens": 4}
    options = sizes | {"steps": 1, "batch_size": 4, "optimizer": "adamw", "samples": 2}
    run = la.ppo(base, data=[{"prompt": row["prompt"]} for row in ROWS], reward=length, out=tmp_path / "ppo", **options)
    assert calls == [8] and run.adapter.is_dir()
    folder = la.best_of_n(base, data=ROWS, reward=[length], out=tmp_path / "best", n=2, max_new_tokens=4)
    scores = [
        c for line in (folder / "candidates.jsonl").read_text().splitlines() for c in json.loads(line)["completions"]
    ]
    assert all(c["score"] == len(c["completion"]) for c in scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stepz": 3}, r"sft has no option stepz; did you mean steps\?"),
        ({"train": {"steps": 0.5}}, "--train.steps"),
        ({"sampling": {"n": 3}}, "sft has no section sampling"),
        ({"adapter": {"kind": "ia3"}}, "--adapter.kind"),
        ({"data": 3}, "not iterable"),
        ({"data": [1, 2]}, "data is a file, several files, or rows: dictionaries"),
        ({"data": []}, "no data: give --data FILE"),
        ({"recipe": "lora/nope"}, "there is no recipe lora/nope"),
        ({"recipe": "lora/dpo"}, "lora/dpo is a recipe for dpo, not for sft"),
    ],
)
def test_held_wrong(options, message, base, tmp_path):
    with pytest.raises((UserError, TypeError), match=message):
        la.sft(base, **{"data": ROWS, "out": tmp_path / "run", **options})
    assert not (tmp_path / "run" / "adapter").exists()


def test_one_name_in_several_sections(base, tmp_path):
    with pytest.raises(
        UserError, match=r"kind could be adapter.kind or value.adapter.kind: give it in its section, adapter="
    ):
        la.ppo(base, data=ROWS, reward="runs/r", out=tmp_path / "run", kind="lora")


def test_a_stopped_run_raises(base, tmp_path, monkeypatch):
    monkeypatch.setattr("lowalign.commands.sft.sft", lambda config, base: 130)
    with pytest.raises(KeyboardInterrupt, match="goes on with resume=True"):
        la.sft(base, data=ROWS, out=tmp_path / "run")


def test_a_failed_run_leaves_the_base_as_it_was(base, tmp_path):
    """The next run on the same base starts from nothing again."""

    def fails(step, metrics):
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        la.sft(base, data=ROWS, out=tmp_path / "failed", on_step=fails, **STEPS)
    first = la.sft(base, data=ROWS, out=tmp_path / "first", **STEPS)
    assert la.sft(base, data=ROWS, out=tmp_path / "failed", resume=True, **STEPS).out.is_dir()
    assert weights(tmp_path / "failed") == weights(first.out)


def test_the_rows_of_a_run_are_not_replaced(base, tmp_path):
    """A finished run in `out` keeps its rows, and can still be resumed with them."""
    out = tmp_path / "run"
    la.sft(base, data=ROWS, out=out, **STEPS)
    before = (out / "data.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"holds results of a run on other rows than these \(data.jsonl\)"):
        la.sft(base, data=ROWS[:-1], out=out, **STEPS)
    assert (out / "data.jsonl").read_bytes() == before and not list(out.glob(".new-*"))
    la.sft(base, data=ROWS, out=out, resume=True, **STEPS | {"steps": 3})
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3


def test_a_method_of_ones_own(base, tmp_path):
    """The loss of docs/python.md: at smoothing 0 it is sft's, bit for bit; otherwise another one."""
    text = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    code = text.partition("```python\nimport torch")[2].partition("```")[0]
    assert len(code.splitlines()) < 30
    space = {"base": base, "rows": ROWS, "OUT": tmp_path / "own", "STEPS": STEPS}
    exec("import torch" + code.replace("out=OUT)", "out=OUT, **STEPS)"), space)
    sft = la.sft(base, data=ROWS, out=tmp_path / "sft", **STEPS)
    assert weights(tmp_path / "own") != weights(sft.out)
    smoothed = space["Smoothed"]
    smoothed.smoothing = 0.0
    la.train_with(smoothed, base, data=ROWS, out=tmp_path / "plain", **STEPS)
    assert weights(tmp_path / "plain") == weights(sft.out)
    assert json.loads((tmp_path / "plain" / "adapter" / "lowalign.json").read_text())["method"] == "smoothed"


def test_a_call_after_each_step(base, tmp_path):
    """Of the four that train: number and metrics; False ends the run with that step, and it has an adapter."""
    data = {"sft": ROWS, "reward": PAIRS, "dpo": PAIRS, "ppo": [{"prompt": row["prompt"]} for row in ROWS]}
    ppo = {"reward": lambda prompts, completions: [float(len(c)) for c in completions], "rollout": {"prompts": 4}}
    ppo |= {"ppo": {"advantage": "group"}, "samples": 2, "max_new_tokens": 4}
    for verb, rows in data.items():
        seen = []
        watch = lambda step, metrics: seen.append((step, metrics["loss"])) or step < 2  # noqa: E731, B023
        options = {**STEPS, "steps": 9} | (ppo if verb == "ppo" else {})
        run = getattr(la, verb)(base, data=rows, out=tmp_path / verb, on_step=watch, **options)
        lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
        assert seen == [(line["step"], line["loss"]) for line in lines] and [step for step, _ in seen] == [1, 2]
        assert json.loads((run.adapter / "lowalign.json").read_text())["step"] == 2
