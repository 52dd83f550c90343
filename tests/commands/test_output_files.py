"""`generate --out` and `score --out`: the file is never overwritten, grows by blocks, and is resumed to the same bytes."""

import json
import os
import signal

import pytest

from lowalign.cli import main
from lowalign.commands import generate, score
from lowalign.model.host import Host
from lowalign.train import output_file
from tests.commands.tiny_runs import FP32, make

QUESTIONS = ["Where is Paris?", "Who jumps?", "What is lazy?", "The dog.", "Is it quick?", "A fox?", "Why?"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(generate, "PROMPTS_PER_BLOCK", 2)
    monkeypatch.setattr(score, "EXAMPLES_PER_BLOCK", 2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("world"))
    rows = [{"prompt": q, "chosen": "France.", "rejected": "The lazy dog."} for q in QUESTIONS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(verb: str, world, *more: str) -> list[str]:
    common = [verb, "--model", f"{world}/model", *FP32]
    if verb == "generate":
        return [*common, "--data", f"{world}/rows.jsonl", "--n", "3", "--sampling.max-new-tokens", "5", *more]
    return [*common, "--adapter", f"{world}/reward", "--data", f"{world}/rows.jsonl", *more]


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """What each verb writes when nothing stops it."""
    folder, written = tmp_path_factory.mktemp("straight"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "PROMPTS_PER_BLOCK", 2)
        patch.setattr(score, "EXAMPLES_PER_BLOCK", 2)
        for verb in ("generate", "score"):
            assert main(command(verb, world, "--out", str(folder / verb))) == 0
            written[verb] = (folder / verb).read_bytes()
    return written


def stop_at(monkeypatch, verb: str, call: int) -> None:
    """SIGINT arrives when the verb computes its block number `call`."""
    name = "generate" if verb == "generate" else "scores"
    compute, calls = getattr(Host, name), []

    def stopped(*args, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return compute(*args, **options)

    monkeypatch.setattr(Host, name, stopped)


def test_the_lines(straight):
    generated = [json.loads(line) for line in straight["generate"].splitlines()]
    assert [line["prompt"] for line in generated] == [q for q in QUESTIONS for _ in range(3)]
    scores = [json.loads(line) for line in straight["score"].splitlines()]
    assert [line["rank"] for line in scores] == [0, 1] * 7


@pytest.mark.parametrize("verb", ["generate", "score"])
def test_an_existing_file_is_destroyed(world, tmp_path, capsys, verb):
    out = tmp_path / "answers.jsonl"
    out.write_text("work of a week\n")
    for more in ((), ("--resume",)):
        assert main(command(verb, world, "--out", str(out), *more)) == 1
        message = capsys.readouterr().err
        assert f"{out} " in message and "choose another --out" in message and "Traceback" not in message
        assert out.read_text() == "work of a week\n"


@pytest.mark.parametrize("verb", ["generate", "score"])
def test_ctrl_c_loses_every_line(world, straight, tmp_path, capsys, monkeypatch, verb):
    """Stopped in the second block, resumed, stopped in the next but one, cut off in a line, and resumed: the same bytes."""
    out = tmp_path / "new" / "answers.jsonl"
    per_block = 6 if verb == "generate" else 4
    with monkeypatch.context() as patch:
        stop_at(patch, verb, 2)
        assert main(command(verb, world, "--out", str(out))) == 130
    assert "go on with the same command and --resume" in capsys.readouterr().err
    assert out.read_bytes() == b"".join(straight[verb].splitlines(keepends=True)[:per_block])
    assert main(command(verb, world, "--out", str(out))) == 1
    assert f"{out} exists: go on with --resume" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        stop_at(patch, verb, 2)
        assert main(command(verb, world, "--out", str(out), "--resume")) == 130
    assert len(out.read_bytes().splitlines()) == 2 * per_block
    out.write_bytes(out.read_bytes()[:-9])  # as after a power cut
    assert main(command(verb, world, "--out", str(out), "--resume")) == 0
    assert out.read_bytes() == straight[verb]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        stop_at(patch, verb, 1)  # nothing is computed any more
        assert main(command(verb, world, "--out", str(out), "--resume")) == 0
    assert out.read_bytes() == straight[verb]
    if verb == "score":
        assert "14 completions, score" in capsys.readouterr().err


def test_resume_with_something_else(world, tmp_path, capsys, monkeypatch):
    out = tmp_path / "answers.jsonl"
    with monkeypatch.context() as patch:
        stop_at(patch, "generate", 2)
        assert main(command("generate", world, "--out", str(out))) == 130
    kept = out.read_bytes()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Another?"}) + "\n")
    for more, says in {
        ("--sampling.temperature", "0.5"): "sampling.temperature: 1.0 -> 0.5",
        ("--adapter", f"{world}/policy"): "adapter: () -> (",
        ("--data", str(prompts)): "the content of prompts:",
    }.items():
        capsys.readouterr()
        assert main(command("generate", world, "--out", str(out), "--resume", *more)) == 1
        message = capsys.readouterr().err
        assert says in message and "Traceback" not in message
        assert out.read_bytes() == kept


def test_standard_output_and_devices(world, straight, tmp_path, capfd):
    for more in ((), ("--out", "/dev/stdout")):
        assert main(command("generate", world, *more)) == 0
        assert capfd.readouterr().out.encode() == straight["generate"]
    assert main(command("generate", world, "--resume")) == 1
    assert "--out FILE" in capfd.readouterr().err


def test_two_processes_cannot_write_one_file(world, tmp_path, capsys, monkeypatch):
    out = tmp_path / "answers.jsonl"
    holder = output_file.lock_folder(out.with_name(".answers.jsonl.run"))
    with holder:
        monkeypatch.setattr("lowalign.train.lock._held_here", set())
        assert main(command("generate", world, "--out", str(out))) == 1
    assert "is in use by process" in capsys.readouterr().err
