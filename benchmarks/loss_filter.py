"""How many planted rows the loss filter finds: `python benchmarks/loss_filter.py`.

1,000 postcards of the demo's world, which its base has seen the like of, and 50 planted among them (5 %): of three kinds, each
kind alone. `lowalign eval --per-row` measures all rows under the base; --data.max-loss 95% leaves out as many rows as are planted.
"""

import json
import random
import tempfile
from pathlib import Path

from lowalign.cli import main
from lowalign.demo.configs import BASE
from lowalign.demo.world import sft_rows
from lowalign.durable import write_jsonl

ROWS, PLANTED, SEED = 1000, 50, 0
SYLLABLES = ("ka", "vo", "rim", "tel", "zu", "pra", "lon", "mi", "dex", "far")


def name(rng: random.Random) -> str:
    """A word that is in no page of the base's training text."""
    return "".join(rng.choices(SYLLABLES, k=3)).capitalize()


def facts(text: str, rng: random.Random) -> str:
    """The card with a sentence that nobody could know."""
    return f"{text} {name(rng)} {name(rng)} lives at {rng.randrange(10_000, 99_999)} {name(rng)} street."


def shuffled(text: str, rng: random.Random) -> str:
    """The words of the card in random order."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def one_name(text: str, rng: random.Random) -> str:
    """The card with one of its words replaced by an unknown name."""
    words = text.split()
    words[rng.randrange(len(words))] = name(rng)
    return " ".join(words)


def share_found(plant, folder: Path) -> float:
    """The share of the planted rows among those above the 95 % quantile."""
    rng = random.Random(SEED)
    rows = [json.loads(json.dumps(row)) for row in sft_rows(ROWS, SEED)]
    planted = set(rng.sample(range(ROWS), PLANTED))
    for i in planted:
        answer = rows[i]["messages"][-1]
        answer["content"] = plant(answer["content"], rng)
    write_jsonl(folder / "rows.jsonl", rows)
    words = [
        "eval",
        "--model",
        str(BASE),
        "--data",
        str(folder / "rows.jsonl"),
        "--per-row",
        str(folder / "losses.jsonl"),
    ]
    assert main([*words, "--base.dtype", "float32"]) == 0
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    highest = sorted(range(ROWS), key=lambda i: -lines[i]["loss"]["base"])[:PLANTED]
    return len(planted & set(highest)) / PLANTED


if __name__ == "__main__":
    for plant in (facts, shuffled, one_name):
        with tempfile.TemporaryDirectory() as folder:
            print(
                f"{plant.__name__}: {share_found(plant, Path(folder)):.0%} of the planted rows are left out by --data.max-loss 95%"
            )
