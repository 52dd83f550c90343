"""A verifiable reward: is the last number of an answer the sum in the question?

python examples/ppo_verifiable.py prompts.jsonl                                  # writes the questions
lowalign ppo … --reward examples/ppo_verifiable.py:correct --ppo.advantage group
"""

import json
import random
import re
import sys
from pathlib import Path

QUESTIONS = 2000
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def correct(prompts: list, completions: list[str]) -> list[float]:
    """1.0 for each completion whose last number is the sum of the numbers in its prompt's last turn, else 0.0."""
    sums = [sum(numbers(question(prompt))) for prompt in prompts]
    return [float(numbers(text)[-1:] == [right]) for text, right in zip(completions, sums, strict=True)]


def question(prompt: str | list[dict]) -> str:
    """The text of the question: a prompt is text, or messages of which the last is the question."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def numbers(text: str) -> list[float]:
    """The numbers of a text: "1,204 + 3.5" -> [1204.0, 3.5]."""
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def questions(count: int) -> list[str]:
    """Sums of four numbers from 10 to 99,999; the same ones every time."""
    draw = random.Random(0)
    sums = [" + ".join(str(draw.randint(10, 99_999)) for _ in range(4)) for _ in range(count)]
    return [f"What is {terms}? End with the result alone on the last line." for terms in sums]


if __name__ == "__main__":
    rows = [json.dumps({"prompt": text}) + "\n" for text in questions(QUESTIONS)]
    Path(sys.argv[1]).write_text("".join(rows))
