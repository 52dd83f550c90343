"""What `lowalign data check` prints."""

import json
from pathlib import Path

import pytest

from lowalign.cli import main
from lowalign.commands.data_check import check, marked_text
from lowalign.config.commands import AnyDataConfig
from lowalign.data.chat import Chat
from lowalign.errors import UserError
from tests.data import made
from tests.tiny import tiny_folder


def test_check_prints_rows_with_what_is_supervised(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWALIGN_CACHE", str(tmp_path / "cache"))
    made.chatml().save_pretrained(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    talk = [{"role": "user", "content": "hi\x1b[2J"}, {"role": "assistant", "content": "ho"}] * 2
    rows = [{"messages": talk}, {"messages": talk}, {"mesages": talk}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert check(AnyDataConfig(files=(str(file),)), str(tmp_path / "model"), rows=1) == 1
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == f"{file}: 3 rows (2 messages), 2 used"
    assert "  end of turn in loss: 4/4" in lines and "  1 of 3 rows repeat an earlier one" in lines
    assert f'  {file}:3: expected "messages", found "mesages"; did you mean "messages"?' in lines
    shown = "\n".join(lines[-9:])
    assert shown == (
        "<|im_start|>user\nhi\\x1b[2J<|im_end|>\n<|im_start|>assistant\n«ho<|im_end|>»\n"
        "<|im_start|>user\nhi\\x1b[2J<|im_end|>\n<|im_start|>assistant\n«ho<|im_end|>»\n"
    )


def test_check_recognises_preferences(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt and answers under headings, the best first; what is not a preference is as for fine-tuning."""
    monkeypatch.setenv("LOWALIGN_CACHE", str(tmp_path / "cache"))
    made.chatml().save_pretrained(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": [{"role": "user", "content": "hi"}], "chosen": "ho", "rejected": "no", "margin": 0.5},
        {"prompt": "q", "completions": ["x", "y", "z"], "ranks": [2, 1, 1]},
        {"prompt": "q", "completion": "x", "label": False},
        {"prompt": "q", "chosen": "x"},
    ]

    def shown(rows: list[dict]) -> str:
        file.write_text("\n".join(map(json.dumps, rows)))
        check(AnyDataConfig(files=(str(file),)), str(tmp_path / "model"))
        return capsys.readouterr().out

    out = shown(rows)
    assert f"{file}: 4 rows (1 pairs, 1 ranking, 1 labels), 3 used" in out
    assert f'  {file}:4: expected "rejected", found nothing' in out
    prompt = "prompt:\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n\n"
    assert f"margin 0.5)\n{prompt}chosen:\n«ho<|im_end|>»\nrejected:\n«no<|im_end|>»\n" in out
    assert "prompt:\nq\nrank 0:\n«y<|im_end|>»\nrank 0:\n«z<|im_end|>»\nrank 1:\n«x<|im_end|>»\n" in out
    assert "prompt:\nq\nlabelled false:\n«x<|im_end|>»\n" in out
    assert f"{file}: 1 rows (prompt-completion), 1 used" in shown([{"prompt": "q", "completion": "x"}])


def test_all_examples_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Every example with its ids; the marked text is that of the ids."""
    monkeypatch.setenv("LOWALIGN_CACHE", str(tmp_path / "cache"))
    tokenizer = made.chatml()
    tokenizer.save_pretrained(tmp_path / "model")
    file, out = tmp_path / "rows.jsonl", tmp_path / "examples.jsonl"
    talk = [{"role": "user", "content": "hi\x1b"}, {"role": "assistant", "content": "ho " * 500}]
    rows = [{"messages": talk * 2}, {"prompt": "q", "completion": "x"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert check(AnyDataConfig(files=(str(file),), max_length=9000), str(tmp_path / "model"), out=out) == 0
    assert f"2 examples written to {out}" in capsys.readouterr().out
    first, second = map(json.loads, out.read_text().splitlines())
    assert first["source"] == f"{file}:1" and second["source"] == f"{file}:2"
    stock = tokenizer.apply_chat_template(talk * 2, return_dict=False)
    ids = first["prompt"] + first["completions"][0]
    assert ids == stock[: len(ids)]
    learned = [i for i, m in zip(first["completions"][0], first["masks"][0], strict=True) if m]
    assert tokenizer.decode(learned) == ("ho " * 500 + "<|im_end|>") * 2
    assert first["text"][0] == "<|im_start|>user\nhi\x1b<|im_end|>\n<|im_start|>assistant\n"
    assert first["text"][1].count("«" + "ho " * 500 + "<|im_end|>»") == 2 and second["text"] == ["q", "«x<|im_end|>»"]
    with pytest.raises(UserError, match=r"examples\.jsonl exists"):
        check(AnyDataConfig(files=(str(file),)), str(tmp_path / "model"), out=out)
    file.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2}))
    check(AnyDataConfig(files=(str(file),)), str(tmp_path / "model"), out=tmp_path / "pairs.jsonl")
    (pair,) = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert pair["rank"] == [0, 1] and pair["margin"] == 2 and pair["text"] == ["q", "«a<|im_end|>»", "«b<|im_end|>»"]


def test_colour_and_long_rows() -> None:
    tokenizer = made.chatml()
    (example,) = Chat(tokenizer).example(
        [{"role": "user", "content": "x" * 5000}, {"role": "assistant", "content": "ho"}]
    )
    text = marked_text(example, tokenizer, colour=True)
    assert text.endswith("\x1b[32mho<|im_end|>\x1b[0m") and " […] " in text and len(text) < 1300


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing is not a folder"):
        check(AnyDataConfig(files=("a.jsonl",)), str(tmp_path / "nothing"))


def test_a_check_before_dpo_is_read_from_its_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of sft: the check stores them as such; dpo must not take them for preferences, whatever was checked before."""
    monkeypatch.setenv("LOWALIGN_CACHE", str(tmp_path / "cache"))
    tiny_folder(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    file.write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})
    )
    command = ["--model", f"{tmp_path}/model", "--data", str(file), "--out", f"{tmp_path}/out"]
    messages = []
    capsys.readouterr()
    for check_first in (False, True):
        if check_first:
            assert main(["data", "check", str(file), "--model", f"{tmp_path}/model"]) == 0
        assert main(["dpo", *command]) == 1
        messages.append(capsys.readouterr().err)
    assert messages[0] == messages[1] and f"{file}:1" in messages[0] and "Traceback" not in messages[1]
    # The same the other way round: pairs that were read as preferences are no rows of sft.
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "hi", "chosen": "ho", "rejected": "no"}))
    assert main(["data", "check", str(pairs), "--model", f"{tmp_path}/model"]) == 0
    assert main(["sft", *command, "--data", str(pairs)]) == 1
    assert "Traceback" not in capsys.readouterr().err
