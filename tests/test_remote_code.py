"""Code in a model's folder is never run, and nobody is asked whether to."""

import ast
import io
import json
from pathlib import Path

import pytest

from lowalign import Base
from lowalign.cli import main
from lowalign.errors import UserError
from lowalign.model.base.hub import load_tokenizer
from tests.tiny import tiny_folder

ROOT = Path(__file__).parents[1]
LOADERS = {"from_pretrained", "from_config", "pipeline"}
FILES = [f for folder in ("lowalign", "benchmarks", "examples") for f in sorted((ROOT / folder).rglob("*.py"))]


def calls() -> list[tuple[str, ast.Call]]:
    """FILE:LINE of every call that may run a repository's code."""
    return [
        (f"{file.relative_to(ROOT)}:{node.lineno}", node)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) in LOADERS
    ]


def test_every_load_says_that_it_runs_no_code():
    assert len(calls()) > 12  # they are found
    without = [
        where
        for where, call in calls()
        if not any(
            word.arg == "trust_remote_code" and isinstance(word.value, ast.Constant) and word.value.value is False
            for word in call.keywords
        )
    ]
    assert not without, f"without trust_remote_code=False: {without}"


@pytest.fixture
def folder(tmp_path):
    """A base beside a module that leaves a mark when it is imported."""
    tiny_folder(tmp_path / "m")
    (tmp_path / "m" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": "Yes."}) + "\n")
    return tmp_path / "m"


def change(folder, file: str, **values) -> None:
    raw = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps(raw))


NEEDS_CODE = {
    "config.json": {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}, "model_type": "own"},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"},
}


@pytest.mark.parametrize("file", NEEDS_CODE)
@pytest.mark.parametrize("verb", ["data check", "generate", "sft"])
def test_remote_code_after_one_y(folder, tmp_path, monkeypatch, capsys, file, verb):
    change(folder, file, **NEEDS_CODE[file])
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    rows = str(tmp_path / "rows.jsonl")
    words = {
        "data check": ["data", "check", rows],
        "generate": ["generate", "--prompt", "Hi"],
        "sft": ["sft", "--data", rows, "--out", str(tmp_path / "out")],
    }[verb]
    assert main([*words, "--model", str(folder)]) == 1
    captured = capsys.readouterr()
    assert f"{folder} needs code of its own" in captured.err and file in captured.err
    assert "never runs" in captured.err and "[y/N]" not in captured.out + captured.err
    assert not (tmp_path / "ran").exists() and "trust_remote_code" not in captured.err


def test_code_beside_a_model_that_transformers_knows(folder, tmp_path, monkeypatch):
    """Its own class and tokenizer are used, with the same results as without the code."""
    load = lambda: Base.load(folder, quantization="none", dtype="float32", device="cpu", quiet=True)  # noqa: E731
    before = load()
    change(folder, "config.json", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    base = load()
    assert type(base.model) is type(before.model) and base.checksum() == before.checksum()
    assert base.tokenizer("What is the capital?").input_ids == before.tokenizer("What is the capital?").input_ids
    assert not (tmp_path / "ran").exists()


def test_a_known_architecture_whose_causal_model_is_code(folder, monkeypatch):
    """transformers has its configuration, and other models of it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    change(folder, "config.json", auto_map={"AutoModelForCausalLM": "own.Own"}, model_type="clip_text_model")
    with pytest.raises(UserError, match="transformers itself has no causal language model"):
        Base.load(folder, device="cpu", quiet=True)


def test_the_code_of_another_repository(folder):
    change(
        folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["org/code--own.Own", None]}, tokenizer_class="Own"
    )
    with pytest.raises(UserError, match="needs code of its own"):
        load_tokenizer(str(folder))
