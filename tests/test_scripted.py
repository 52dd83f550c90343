"""What others script against: the README's Python, and the names of commands, flags, files and keys that stay."""

import json
import re
from pathlib import Path

import pytest

import lowalign as la
from lowalign.cli import main
from tests.commands.tiny_runs import FP32, load
from tests.tiny import tiny_folder

README = Path(__file__).parents[1] / "README.md"
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
    for i in range(8)
]
TURN = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
PAIRS = [
    {
        "prompt": TURN("user", f"What is {i}?"),
        "chosen": TURN("assistant", f"It is {i}."),
        "rejected": TURN("assistant", "No."),
    }
    for i in range(8)
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a base and rows, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_folder(tmp_path / "model", "llama")
    for name, rows in (("rows", ROWS), ("pairs", PAIRS), ("prompts", [{"prompt": r["messages"][:1]} for r in ROWS])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("judge.py").write_text("def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    return tmp_path


def test_the_python_of_the_readme(here):
    """Both blocks as they are, on a tiny base."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    runs, host = (
        next(block for block in blocks if block.startswith(start))
        for start in ("import lowalign as la", "from peft import LoraConfig")
    )
    base = load(here / "model")
    la.sft(base, data=ROWS, out="runs/tone", adapter=la.LoRA(r=4), steps=1, optimizer="adamw")
    space: dict = {"pairs": PAIRS}
    for block in (runs, host):
        assert '"Qwen/Qwen2.5-7B")' in block
        exec(block.replace('"Qwen/Qwen2.5-7B")', '"model", quantization="none", dtype="float32")'), space)
    assert Path("merged/model.safetensors").is_file() and space["dpo"].adapter == Path("runs/dpo/adapter")
    kind, curt = space["kind"], space["curt"]
    assert len(kind) > 0 and len(curt) > 0 and len(space["answers"]) == 4
    (same, _) = space["reference"][0]
    assert len(same) == len(kind) and not bool((same == kind).all())  # without the adapters the log-probs differ


def test_names_that_stay(here, capsys):
    """sft in Python; compare, eval, report and run by their flags, with the files and keys that they write."""
    base = load(here / "model")
    for name in ("a", "b"):
        run = la.sft(
            base, data="rows.jsonl", out=f"runs/{name}", steps=1, learning_rate=1.0, optimizer="adamw", seed=ord(name)
        )
        assert isinstance(run.adapter, Path) and (run.adapter / "adapter_model.safetensors").is_file()
        assert len(run.metrics) == 1
    small = ["--sampling.max-new-tokens", "8", *FP32]
    sides = ["--a", "runs/a", "--b", "runs/b", "--data", "prompts.jsonl", "--judge", "judge.py:length"]
    assert main(["compare", *sides, "--out", "compared", *small]) == 0
    result = json.loads(Path("compared/result.json").read_text())
    assert {"win_rate", "interval", "length_controlled", "wins", "ties", "losses"} <= result.keys()
    wins, ties, losses = (result[key] for key in ("wins", "ties", "losses"))
    assert wins + ties + losses == 8 and result["win_rate"] == (wins + ties / 2) / 8
    assert result["interval"][0] <= result["win_rate"] <= result["interval"][1]

    assert main(["eval", "--data", "rows.jsonl", "--adapter", "runs/a", "--out", "figures.json", *FP32]) == 0
    assert json.loads(Path("figures.json").read_text())
    assert main(["report", "runs/a", "runs/b", "--out", "page.html"]) == 0
    assert "<svg" in Path("page.html").read_text()
    Path("pipeline.yaml").write_text("verb: run\nstages:\n  sft: {data: rows.jsonl, train: {steps: 1}}\n")
    assert main(["run", "pipeline.yaml", "--model", "model", "--out", "all", "--dry-run"]) == 0
    assert "# sft: lowalign sft → all/sft" in capsys.readouterr().out and not Path("all").exists()
