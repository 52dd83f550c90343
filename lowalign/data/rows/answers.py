"""Rows that hold several answers to one prompt, without saying which is better.

prompt + completions              all of them in a row
prompt + completion_a, completion_b
prompt + completion               one a row, as `lowalign generate` writes them; rows of one prompt that follow each other
                                  belong together
A prompt is text or messages; so is an answer, which may also be an object with "completion".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowalign.data.rows.read import BadRow, Row, kind_of, read_rows
from lowalign.data.rows.rewrite import tools_as_text
from lowalign.data.rows.turns import Message, RowError, expected, read_turns
from lowalign.errors import UserError

Prompt = str | list[Message]


@dataclass(frozen=True)
class Answers:
    """A prompt and its answers, each as it stands in the file, and where (file:line)."""

    prompt: Prompt
    completions: list[Prompt]
    source: str


def read_answers(files: Sequence[str]) -> list[Answers]:
    """What the files hold. Raises UserError, with file:line, for a row that has no prompt or no answers."""
    found: list[Answers] = []
    for name in files:
        gathering = False
        for row in read_rows(name):
            if isinstance(row, BadRow):
                raise UserError(str(row))
            try:
                prompt, completions = _read(row.data)
            except RowError as error:
                raise UserError(f"{row.where}: {error}") from error
            single = _single(row)
            if single and gathering and found[-1].prompt == prompt:
                found[-1].completions.extend(completions)
            else:
                found.append(Answers(prompt, completions, row.where))
            gathering = single
    return found


def as_text(value: Prompt) -> str:
    """Prompt as it is; messages as lines `role: content`, an answer that is a single turn as its content."""
    if isinstance(value, str):
        return value
    turns = tools_as_text(value, None)
    if len(turns) == 1 and turns[0]["role"] == "assistant":
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _single(row: Row) -> bool:
    return "completion" in row.data and not {"completions", "completion_a"} & row.data.keys()


def _read(data: dict[str, Any]) -> tuple[Prompt, list[Prompt]]:
    if "prompt" not in data:
        raise RowError(expected("prompt", data))
    prompt = _text(data["prompt"], "prompt")
    if "completions" in data:
        values = data["completions"]
        if not isinstance(values, list):
            raise RowError(f'"completions" must be a list of answers, found {kind_of(values)}')
        return prompt, [_answer(value, f"completions[{i}]") for i, value in enumerate(values)]
    names = ["completion_a", "completion_b"] if {"completion_a", "completion_b"} & data.keys() else ["completion"]
    for name in names:
        if name not in data:
            raise RowError(
                expected("completions" if name == "completion" else name, [k for k in data if k != "prompt"])
            )
    return prompt, [_answer(data[name], name) for name in names]


def _answer(value: Any, column: str) -> Prompt:
    if isinstance(value, dict):
        if "completion" not in value:
            raise RowError(f"{column}: {expected('completion', value)}")
        value, column = value["completion"], f"{column}.completion"
    return _text(value, column)


def _text(value: Any, column: str) -> Prompt:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(f'"{column}" must be text or a list of turns, found {kind_of(value)}')
    return read_turns(value, column)
