"""The programs in examples/."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowalign.rewards.function import Samples, load_function, same_columns

EXAMPLES = Path(__file__).parents[1] / "examples"
FILE, GSM8K = EXAMPLES / "ppo_verifiable.py", EXAMPLES / "ppo_gsm8k.py"
ASKED = "What is 1204 + 39? End with the result alone on the last line."


@pytest.mark.parametrize(
    ("prompt", "completion", "reward"),
    [
        (ASKED, "1204 + 39 =\n1243", 1.0),
        (ASKED, "It is 1,243.", 1.0),
        (ASKED, "1243.0", 1.0),
        (ASKED, "The sum of 1204 and 39", 0.0),  # the last number is one of those asked about
        (ASKED, "1243, or is it 1242?", 0.0),
        (ASKED, "-1243", 0.0),
        (ASKED, "1243.5", 0.0),
        (ASKED, "12430", 0.0),
        (ASKED, "I cannot add.", 0.0),
        (ASKED, "", 0.0),
        ([{"role": "user", "content": "What is 2 + 2?"}], "4", 1.0),
        (
            [
                {"role": "user", "content": "What is 2 + 2?"},
                {"role": "assistant", "content": "4"},
                {"role": "user", "content": "And 5 + 6?"},
            ],
            "11",
            1.0,
        ),
    ],
)
def test_a_sum_is_right_or_it_is_not(prompt, completion, reward):
    found = load_function(FILE, "correct")([prompt], None, [[completion]], None)
    assert found == [[reward]]


def test_each_completion_is_compared_with_its_own_prompt():
    found = load_function(FILE, "correct")(["1 + 1", "2 + 3"], None, [["2", "5"], ["2", "5"]], None)
    assert found == [[1.0, 0.0], [0.0, 1.0]]


def test_the_questions_are_sums_that_it_recognises(tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        subprocess.run([sys.executable, FILE, file], check=True)
    assert files[0].read_bytes() == files[1].read_bytes()
    prompts = [json.loads(line)["prompt"] for line in files[0].read_text().splitlines()]
    assert len(prompts) == 2000
    sums = [[int(n) for n in prompt.removeprefix("What is ").partition("?")[0].split(" + ")] for prompt in prompts]
    assert all(len(terms) == 4 and min(terms) >= 10 and max(terms) < 100_000 for terms in sums)
    right_and_wrong = [[str(sum(terms)), str(sum(terms) + 1)] for terms in sums]
    assert load_function(FILE, "correct")(prompts, None, right_and_wrong, None) == [[1.0, 0.0]] * 2000


def test_word_problems_with_their_answer_in_the_row(tmp_path):
    """The arithmetic of each solution holds, no problem is in both files, and the reward compares with the row's answer."""
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    subprocess.run([sys.executable, GSM8K, train, test], check=True)
    parts = [[json.loads(line) for line in file.read_text().splitlines()] for file in (train, test)]
    assert [len(part) for part in parts] == [2000, 200]
    rows = [row for part in parts for row in part]
    assert len({row["prompt"] for row in rows}) == 2200
    for row in rows:
        boxes, each, bought, given = map(int, re.findall(r"\d+", row["prompt"]))
        assert row["answer"].endswith(f"#### {boxes * each + bought - given}")
    right = [row["answer"].rpartition("#### ")[2] for row in rows]
    texts = [[f"It is {number}", f"It is {int(number) + 1}", "I cannot count."] for number in right]
    samples = Samples(same_columns(rows), [[True, False, True]] * len(rows))
    prompts = [row["prompt"] for row in rows]
    assert load_function(GSM8K, "correct")(prompts, None, texts, [], samples) == [[1.0, 0.0, 0.0]] * len(rows)
    assert load_function(GSM8K, "ends")(prompts, None, texts, [], samples) == [[1.0, 0.0, 1.0]] * len(rows)


def test_the_notebook(tmp_path, monkeypatch):
    """Its cells in order, in one namespace: every stage leaves what the next one reads, and training does what it is for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    space: dict = {}
    assert "la.Base.load(BASE," in cells[0]
    cells[0] = cells[0].replace("la.Base.load(BASE,", 'la.Base.load(BASE, quantization="none",')  # a third less CPU
    for cell in cells:
        exec(compile(cell, "notebook", "exec"), space)
    assert len(space["losses"]) == 12 and space["losses"][-1] < space["losses"][0] - 0.2
    assert space["sft"]._repr_html_().count("<polyline") == 2  # training and held out
    scores = json.loads((tmp_path / "runs/reward/adapter/lowalign.json").read_text())["reward"]
    assert scores["pairs"] == 24 and scores["measured_on"] == "held-out rows"
    assert all(
        json.loads((tmp_path / "runs" / name / "adapter/lowalign.json").read_text())["step"] == 2
        for name in ("dpo", "ppo")
    )
    assert space["report"]["kl"] < 1e-4  # in fp32; seen: below 1e-6
