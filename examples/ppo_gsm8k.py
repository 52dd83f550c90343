"""A verifiable reward with the answer in the row: GSM8K-like word problems with a column `answer`.

python examples/ppo_gsm8k.py train.jsonl test.jsonl                              # writes the problems, none in both files
lowalign ppo … --data train.jsonl --reward examples/ppo_gsm8k.py:correct 0.1*examples/ppo_gsm8k.py:ends --ppo.advantage group

In the original data (openai/gsm8k) the column `answer` has the same form: a solution, then "#### " and the number.
"""

import json
import random
import re
import sys
from pathlib import Path

TRAIN, TEST = 2000, 200
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
PEOPLE = ("Ana", "Ben", "Chen", "Dora", "Emre", "Fatou", "Goran", "Hana")
THINGS = ("apples", "marbles", "stickers", "books", "shells", "coins")


def correct(prompts: list, completions: list[str], answer: list[str]) -> list[float]:
    """1.0 for each completion whose last number is the number at the end of its row's `answer`, else 0.0."""
    return [float(last_number(text) == last_number(right)) for text, right in zip(completions, answer, strict=True)]


def ends(prompts: list, completions: list[str], stopped: list[bool]) -> list[float]:
    """1.0 for each completion that ended by itself before the length limit, else 0.0."""
    return [float(stop) for stop in stopped]


def last_number(text: str) -> float | None:
    """ "5 * 12 = 60\\n#### 1,060" -> 1060.0."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def problem(draw: random.Random) -> dict:
    """A row: `prompt` in two or three steps, and `answer`, its solution."""
    person, thing = draw.choice(PEOPLE), draw.choice(THINGS)
    boxes, each, bought = draw.randint(2, 9), draw.randint(3, 30), draw.randint(10, 99)
    given = draw.randint(1, boxes * each)
    total = boxes * each
    question = (
        f"{person} has {boxes} boxes with {each} {thing} in each. {person} buys {bought} more and gives away {given}. "
        f"How many {thing} does {person} have now?"
    )
    solution = (
        f"In the boxes are {boxes} * {each} = {total} {thing}.\nWith those bought, {total} + {bought} = {total + bought}.\n"
        f"After giving away {given}: {total + bought} - {given} = {total + bought - given}.\n#### {total + bought - given}"
    )
    return {"prompt": question, "answer": solution}


def problems(count: int) -> list[dict]:
    """Different problems; the same ones every time."""
    draw = random.Random(0)
    rows: dict[str, dict] = {}
    while len(rows) < count:
        row = problem(draw)
        rows[row["prompt"]] = row
    return list(rows.values())


if __name__ == "__main__":
    rows = [json.dumps(row) + "\n" for row in problems(TRAIN + TEST)]
    Path(sys.argv[1]).write_text("".join(rows[:TRAIN]))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text("".join(rows[TRAIN:]))
