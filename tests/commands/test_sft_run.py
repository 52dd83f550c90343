"""`lowalign sft` end to end on a tiny 4-bit base: files of a run, kill and resume, and its adapter in stock peft."""

import hashlib
import json
import random
import shutil
import signal
import time

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lowalign import Base, Host
from lowalign.cli import main
from lowalign.model.policy import load_stack
from tests.commands import child
from tests.tiny import WORDS, tiny_folder

KINDS = ["lora", "prompt", "prefix"]
TIMES = ("tokens_per_second", "seconds", "peak_process_memory_gib", "peak_gpu_memory_gib")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder and a file of rows."""
    folder = tmp_path_factory.mktemp("world")
    tiny_folder(folder / "model", "llama")
    rng = random.Random(0)
    rows = []
    for _ in range(40):
        question, answer = (" ".join(rng.choices(WORDS, k=rng.randint(2, 12))) for _ in range(2))
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


WEIGHTS = "adapter_model.safetensors"


def flags(world, out, *more, kind="lora", steps=6) -> list[str]:
    return [
        "sft", f"{kind}/sft", "--model", f"{world}/model", "--data", f"{world}/rows.jsonl", "--out", str(out),
        "--train.steps", str(steps), "--train.save-every", "2", "--train.batch-size", "4", "--data.eval-rows", "4",
        "--data.no-cache", *more,
    ]  # fmt: skip


def digest(out) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """Uninterrupted runs, one for each kind of adapter."""
    runs = {}
    for kind in KINDS:
        runs[kind] = tmp_path_factory.mktemp("straight") / kind
        assert main(flags(world, runs[kind], kind=kind)) == 0
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_writes(world, straight, kind):
    out = straight[kind]
    log = lines(out)
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in log if "eval/loss" in line] == [0, 6]
    assert {"loss", "grad_norm", "lr", "tokens_per_second"} <= set(next(line for line in log if "loss" in line))
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert written["train"]["steps"] == 6 and written["adapter"]["kind"] == kind and written["resume"] is False
    report = json.loads((out / "data_report.json").read_text())
    assert "train" in report
    meta = json.loads((out / "adapter" / "lowalign.json").read_text())
    assert len(meta["base"]["weights"]) == 16 and meta["method"] == "sft" and meta["parents"] == 0
    assert "<|im_start|>" in (out / "adapter" / "chat_template.jinja").read_text()
    everything = "".join(p.read_text(errors="replace") for p in out.rglob("*.json*"))
    assert "hf_" not in everything
    # The path of a local base is in adapter_config.json alone, where peft looks for it.
    described = [p for p in (out / "adapter").iterdir() if p.name not in ("adapter_config.json", WEIGHTS)]
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config.pop("base_model_name_or_path") == str((world / "model").resolve())
    assert config.pop("tokenizer_name_or_path", str(world / "model")) in (str((world / "model").resolve()), None)
    published = "".join([*(p.read_text(errors="replace") for p in described), json.dumps(config)])
    assert str(world) not in published and str(out) not in published and "rows.jsonl" in meta["recipe"]


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_gives_the_same_logits(world, straight, kind):
    """On the same 4-bit base, with stock PeftModel and with the host."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    base = Base.load(world / "model", dtype="float32", device="cpu", quiet=True)
    stock = PeftModel.from_pretrained(base.model, str(straight[kind] / "adapter")).eval()
    with torch.no_grad():
        want = stock(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -7:-1].float().log_softmax(-1)
    want = want.gather(1, ids[0, 2:, None])[:, 0]
    host = Host(Base.load(world / "model", dtype="float32", device="cpu", quiet=True))
    from lowalign import Example

    with host.use(*load_stack(host, "a", str(straight[kind]))), torch.no_grad():
        ((got,),) = host.logprobs([Example([5, 6], [ids[0, 2:].tolist()])])
    assert (want - got).abs().max() <= 1e-4  # 1e-6 seen


def test_the_recipe_of_a_run_is_the_same_run(world, straight, tmp_path):
    assert main(["sft", str(straight["lora"] / "recipe.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert digest(tmp_path / "again") == digest(straight["lora"])


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_is_the_same_run(world, straight, tmp_path, kind):
    """SIGKILL in the middle of writing the checkpoint of step 4; the run resumes from step 2 and ends with the same bits."""
    out = tmp_path / "run"
    assert child.run(flags(world, out, kind=kind), LOWALIGN_KILL_AT="save-optimizer:2") == -signal.SIGKILL
    assert sorted(p.name for p in (out / "checkpoints").glob("step-*")) == ["step-000002"]
    assert main(flags(world, out, "--resume", kind=kind)) == 0
    assert digest(out) == digest(straight[kind])
    strip = lambda log: [{k: v for k, v in line.items() if k not in TIMES} for line in log]  # noqa: E731
    assert strip(lines(out)) == strip(lines(straight[kind]))


def test_signal_saves_and_leaves(world, straight, tmp_path):
    out = tmp_path / "run"
    process = child.start(flags(world, out, steps=6), tmp_path / "stderr")
    while process.is_alive() and not (out / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.terminate()
    process.join()
    if process.exitcode != 0:  # it may have ended before the signal came
        errors = (tmp_path / "stderr").read_text()
        assert process.exitcode == 143 and "--resume" in errors and "Traceback" not in errors
        assert main(flags(world, out, "--resume")) == 0
    assert digest(out) == digest(straight["lora"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_times(world, straight, tmp_path, kind):
    """Killed at random times and resumed, until it ends by itself."""
    duration = child.seconds(flags(world, tmp_path / "whole", kind=kind))  # of a run that is not killed
    out, rng, kills = tmp_path / "run", random.Random(kind), 0
    while True:
        process = child.start(flags(world, out, "--resume", kind=kind))
        process.join(rng.uniform(0.05, 0.5) * duration if kills < 8 else None)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills
    assert digest(out) == digest(straight[kind])


def test_stacked_on_an_earlier_run(world, straight, tmp_path):
    out = tmp_path / "two"
    assert main(flags(world, out, "--init", str(straight["lora"]), kind="prefix", steps=2)) == 0
    host = Host(Base.load(world / "model", device="cpu", quiet=True))
    assert len(load_stack(host, "both", str(out))) == 2


@pytest.mark.parametrize("which", ["rows.jsonl", "init"])
def test_resume_with_changed_content_is_refused(world, straight, tmp_path, capsys, which):
    """The options are the same, but the content of a file or adapter has changed."""
    rows, init, out = tmp_path / "rows.jsonl", tmp_path / "init", tmp_path / "run"
    shutil.copy(world / "rows.jsonl", rows)
    shutil.copytree(straight["lora"] / "adapter", init)
    (
        init / "lowalign.json"
    ).unlink()  # as in a folder of stock peft; its hash would already show that the weights changed
    model = str(world / "model")
    command = [
        "sft", "lora/sft", "--model", model, "--data", str(rows), "--init", str(init), "--out", str(out), "--resume",
        "--train.steps", "1", "--train.batch-size", "4", "--data.no-cache",
    ]  # fmt: skip
    assert main(command) == 0
    assert main(command) == 0  # nothing left to do
    if which == "rows.jsonl":
        rows.write_text(rows.read_text() + "\n")
    else:
        weights = load_file(init / "adapter_model.safetensors")
        save_file({k: w + 1e-3 for k, w in weights.items()}, init / "adapter_model.safetensors")
    capsys.readouterr()
    assert main(command) == 1
    message = capsys.readouterr().err
    assert f"{tmp_path / which}: the content has changed" in message and "Traceback" not in message


def test_wrong_use(world, straight, tmp_path, capsys):
    def refused(arguments) -> str:
        capsys.readouterr()
        assert main(arguments) == 1
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    again = refused(flags(world, straight["lora"]))
    assert "holds results of an earlier run" in again and "--resume" in again
    changed = refused(flags(world, straight["lora"], "--resume", "--train.learning-rate", "1"))
    assert "train.learning_rate: 0.0002 -> 1.0" in changed
    assert "no data" in refused(["sft", "--model", f"{world}/model", "--out", str(tmp_path / "a")])
    missing = refused(["sft", "--model", f"{world}/model", "--data", "nothing.jsonl", "--out", str(tmp_path / "b")])
    assert "nothing.jsonl" in missing
    assert "is not a folder" in refused(
        ["sft", "--model", "./nothing", "--data", f"{world}/rows.jsonl", "--out", str(tmp_path / "c")]
    )
    wrong = refused(flags(world, tmp_path / "d", "--init", str(straight["lora"]), "--init-mode", "copy", kind="prefix"))
    assert "cannot be copied" in wrong
