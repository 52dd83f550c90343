"""`lowalign chat`: answers equal those of the adapters, by pipe and in a terminal; every command, and each held wrong."""

import io
import json
import os
import pty
import select
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig

from lowalign import Host, Sampling
from lowalign.cli import main
from lowalign.data.chat import Chat
from tests.commands.tiny_runs import FP32, load
from tests.tiny import tiny_folder

GREEDY = ("--sampling.temperature", "0", "--sampling.max-new-tokens", "8")
NAMES = ("first", "second", "prefix", "prompt")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, and four adapters of three kinds on it."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_folder(folder / "model", "llama")
    host = Host(load(folder / "model"))
    files = {"chat_template.jinja": Chat(host.base.tokenizer).template}
    torch.manual_seed(0)
    for name in NAMES[:2]:
        host.add(name, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
    host.add("prefix", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    host.add("prompt", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    for name in NAMES[2:]:
        for parameter in host.parameters(name):
            parameter.data.normal_(0, 1)
    for name in NAMES:
        host.save(name, folder / name, files=files)
    return folder


@pytest.fixture
def talk(world, monkeypatch, capsys):
    def run(*lines, options=GREEDY):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        adapters = [str(world / name) for name in NAMES]
        assert main(["chat", *adapters, "--model", str(world / "model"), *FP32, *options]) == 0
        return capsys.readouterr()

    return run


def answer(world, names, *questions):
    """Of the host, greedy: in text, as it is printed."""
    host = Host(load(world / "model"))
    chat = Chat(host.base.tokenizer)
    host.base.end_at(chat.end_of_turn)
    for name in names:
        host.load(name, world / name)
    messages = []
    with host.use(*names):
        for question in questions:
            messages.append({"role": "user", "content": question})
            ids = host.generate([chat.prompt_ids(messages)], 1, Sampling(temperature=0, max_new_tokens=8))[0][0].ids
            text = host.base.tokenizer.decode(ids, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": text.strip()})
    return text


def test_each_adapter_answers_as_it_does_alone(world, talk):
    expected = [answer(world, names, "a fox") for names in (*((name,) for name in NAMES), ("first", "prompt"), ())]
    assert len(set(expected)) == 6
    switches = [f"/use {name}" for name in NAMES] + ["/use first prompt", "/use off"]
    out = talk("a fox", *(line for switch in switches for line in (switch, "/regenerate"))).out
    assert out == "".join(text + "\n" for text in (expected[0], *expected))


def test_the_conversation_is_what_the_model_sees(world, talk, tmp_path):
    second = answer(world, ("first",), "a fox", "the dog")
    printed = talk(
        "a fox", "the dog", f"/save {tmp_path / 'rows.jsonl'}", "/reset", "the dog", "/system Be brief.", "/regenerate"
    )
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 2
    assert row["messages"][2]["content"] == "the dog" and row["messages"][3]["content"] == second.strip()
    assert second in printed.out and answer(world, ("first",), "the dog") in printed.out
    assert "cut off after 8 tokens" in printed.err


def test_compare_prints_one_answer_beside_the_other(world, talk, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    lines = talk("a fox", "/compare first off").out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("first"))
    assert [cell.strip() for cell in lines[header].split("|")] == ["first", "off"]
    columns = [line.split(" | ") for line in lines[header + 2 :]]
    shown = ["".join("".join(cells[i : i + 1]) for cells in columns) for i in range(2)]
    squeeze = lambda text: "".join(text.split())  # noqa: E731 - wrapped at spaces
    assert [squeeze(text) for text in shown] == [squeeze(answer(world, names, "a fox")) for names in (("first",), ())]


def test_a_seed_gives_new_answers_with_regenerate(talk):
    out = talk("a fox", "/regenerate", "/regenerate", options=("--sampling.max-new-tokens", "8"))
    again = talk("a fox", "/regenerate", "/regenerate", options=("--sampling.max-new-tokens", "8"))
    assert out.out == again.out
    assert len(set(out.out.split("\n"))) >= 3


def test_an_answer_is_kept_where_another_one_cannot_be_made(talk, tmp_path):
    """The system text leaves no room for it."""
    saved = tmp_path / "rows.jsonl"
    printed = talk("a fox", f"/system {'fox ' * 600}", "/regenerate", "/system", f"/save {saved}")
    assert "positions; shorten it" in printed.err
    assert [m["role"] for m in json.loads(saved.read_text())["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nope", "/nope is not known; /help lists the commands"),
        ("/use nope", "nope is not loaded; there are: first, second, prefix, prompt, off"),
        ("/use", "nothing is not loaded"),
        ("/use prefix prompt", "are both soft prompts; at most one can be active"),
        ("/compare first", "name at least two: /compare NAME NAME"),
        ("/compare first second", "ask something first"),
        ("/regenerate", "ask something first"),
        ("/set temperature warm", "temperature takes a number, not warm"),
        ("/set temperature -1", "temperature is -1.0; it must be at least 0"),
        ("/set dequantize often", "dequantize is one of auto, on, off, not often"),
        ("/set heat 1", "/set NAME VALUE, where NAME is one of max_new_tokens"),
        ("/save", "/save FILE keeps a conversation that ends with an answer"),
    ],
)
def test_a_mistake_does_not_end_the_conversation(line, message, talk):
    printed = talk(line, "/help", "/quit", "/nope")
    assert message in printed.err and "/use NAME…" in printed.err
    assert printed.err.count("is not known") == (line == "/nope")  # nothing is read after /quit


def test_nothing_to_talk_to(capsys):
    assert main(["chat"]) == 1
    assert "nothing to talk to: lowalign chat RUN_OR_ADAPTER" in capsys.readouterr().err


def test_in_a_terminal(world):
    """With a prompt and line editing, the answer, and the end at Ctrl-D."""
    terminal, child = pty.openpty()
    command = [sys.executable, "-m", "lowalign", "chat", str(world / "first"), "--model", str(world / "model")]
    process = subprocess.Popen(
        [*command, *FP32, *GREEDY],
        stdin=child,
        stdout=child,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TERM": "dumb"},
    )
    os.close(child)
    shown = b""

    def read_until(text: bytes) -> None:
        nonlocal shown
        while not shown.endswith(text):
            assert select.select([terminal], [], [], 120)[0], f"nothing comes after {shown!r}"
            shown += os.read(terminal, 4096)

    try:
        read_until(b"> ")
        os.write(terminal, b"a fxx\x7f\x7fox\n")  # with two corrections
        read_until(b"\n> ")
        os.write(terminal, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(terminal)
    assert answer(world, ("first",), "a fox").strip() in shown.decode().replace("\r\n", "\n")
