"""Rows with several answers to one prompt and no preference.

prompt + completions              several in a row
prompt + completion_a, completion_b
prompt + completion               one per row, as `lowalign generate` writes them; consecutive rows of one prompt are
                                  gathered
A prompt is text or messages. An answer too, or an object with "completion".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowalign.data.rows.mapping import parse_rows
from lowalign.data.rows.rewrite import tools_as_text
from lowalign.data.rows.turns import Prompt, expected, read_turns
from lowalign.data.sources.row import RowError
from lowalign.data.sources.strict_json import json_type


@dataclass(frozen=True)
class Answers:
    """A prompt and its answers as in the file. source: file:line of the first row; columns: of that row."""

    prompt: Prompt
    completions: list[Prompt]
    source: str
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plain_text(self) -> bool:
        """Whether prompt and answers are texts, not turns of a chat."""
        return all(isinstance(part, str) for part in (self.prompt, *self.completions))


def read_answers(files: Sequence[str]) -> list[Answers]:
    """The prompts of the files with their answers. Raises UserError, with file:line, for a row without prompt or answers."""
    prompts: list[Answers] = []
    for name in files:
        gather = False  # whether the row before has a single answer, so that this one may belong to the same prompt
        for row, (prompt, completions) in parse_rows(name, _parse):
            single = "completion" in row.data and not {"completions", "completion_a"} & row.data.keys()
            if single and gather and prompts[-1].prompt == prompt:
                prompts[-1].completions.extend(completions)
            else:
                prompts.append(Answers(prompt, completions, row.where, row.data))
            gather = single
    return prompts


def as_text(value: Prompt) -> str:
    """Text as it is; a single assistant turn as its content; other messages as lines `role: content`."""
    if isinstance(value, str):
        return value
    turns = tools_as_text(value, None)
    if len(turns) == 1 and turns[0]["role"] == "assistant":
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _parse(data: dict[str, Any]) -> tuple[Prompt, list[Prompt]]:
    if "prompt" not in data:
        raise RowError(expected("prompt", data))
    prompt = _text(data["prompt"], "prompt")
    if "completions" in data:
        values = data["completions"]
        if not isinstance(values, list):
            raise RowError(f'"completions" must be a list of answers, found {json_type(values)}')
        return prompt, [_answer(value, f"completions[{i}]") for i, value in enumerate(values)]
    names = ["completion_a", "completion_b"] if {"completion_a", "completion_b"} & data.keys() else ["completion"]
    for name in names:
        if name not in data:
            column = "completions" if name == "completion" else name
            raise RowError(expected(column, [key for key in data if key != "prompt"]))
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
        raise RowError(f'"{column}" must be text or a list of turns, found {json_type(value)}')
    return read_turns(value, column)
