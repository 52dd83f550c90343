"""Seed rows of `lowalign synth`: a prompt as text, and its answer where the row has one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowalign.data.rows.answers import as_text
from lowalign.data.rows.mapping import parse_rows
from lowalign.data.rows.sft_rows import SFT_ROWS, PromptCompletion
from lowalign.data.rows.turns import Message, read_turns
from lowalign.data.sources.row import RowError
from lowalign.errors import UserError


@dataclass(frozen=True)
class Seed:
    """completion: "" where there is none. source: file:line."""

    prompt: str
    completion: str = ""
    source: str = ""


def read_seeds(files: Sequence[str]) -> list[Seed]:
    """The rows of the files: those of sft, of a conversation the first question and its answer; or rows with a prompt alone.

    Raises UserError, with file:line, for a row without a prompt.
    """
    seeds = [
        Seed(prompt, completion, row.where) for file in files for row, (prompt, completion) in parse_rows(file, _parse)
    ]
    if files and not seeds:
        raise UserError(f"{', '.join(files)}: no rows; leave --data out to begin with the guidelines alone")
    return seeds


def _parse(data: dict[str, Any]) -> tuple[str, str]:
    if SFT_ROWS.of(data) is None and data.get("prompt") is not None:
        prompt = data["prompt"]
        turns = None if isinstance(prompt, str) else read_turns(prompt, "prompt")
        return _not_empty(prompt if turns is None else _first(turns, "user")), ""
    row = SFT_ROWS.parse(data)
    if isinstance(row, PromptCompletion):
        return _not_empty(row.prompt), row.completion.strip()
    messages = getattr(row, "messages", None)
    if messages is None:
        raise RowError("a document has no prompt; a seed is a prompt with its answer")
    return _not_empty(_first(messages, "user")), _first(messages, "assistant")


def _first(messages: list[Message], role: str) -> str:
    return next(
        (as_text([m]) if role == "assistant" else m["content"] for m in messages if m["role"] == role), ""
    ).strip()


def _not_empty(prompt: str) -> str:
    if not prompt.strip():
        raise RowError("its prompt is empty; a seed is a prompt with its answer")
    return prompt.strip()
