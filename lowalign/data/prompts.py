"""The prompts of rows, whatever else the rows hold: answers and preferences are left out."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lowalign.data.chat import Chat
from lowalign.data.rows.preference_rows import PREFERENCE_ROWS
from lowalign.data.rows.read import BadRow, read_rows
from lowalign.data.rows.sft_rows import SFT_ROWS, with_system
from lowalign.data.rows.turns import Message, RowError, read_turns
from lowalign.data.template import Unrenderable
from lowalign.errors import UserError

Prompt = str | list[Message]  # plain text, or messages
COLUMNS = ("prompt", "messages", "conversations", "instruction", "chosen_messages", "chosen")


class PromptRow(NamedTuple):
    """A prompt, and where it stands (file:line)."""

    prompt: Prompt
    where: str


def read_prompts(files: Sequence[str]) -> Iterator[PromptRow]:
    """The prompt of each row: its `prompt` (text or messages), or its conversation up to the last answer.

    Raises UserError, with file:line, for a row that has none.
    """
    for file in files:
        for row in read_rows(file):
            if isinstance(row, BadRow):
                raise UserError(str(row))
            try:
                yield PromptRow(_prompt(row.data), row.where)
            except RowError as error:
                raise UserError(f"{row.where}: {error}") from error


def distinct_prompts(
    files: Sequence[str], chat: Chat, limit: int | None, longest: int, raw: bool = False
) -> tuple[list[tuple[PromptRow, list[int]]], int]:
    """Each prompt once with its ids, in the order of the rows (the first `limit` of them), and how many were left out
    because they have more than `longest` tokens. raw: as in prompt_ids."""
    first: dict[str, PromptRow] = {}
    for asked in read_prompts(files):
        first.setdefault(json.dumps(asked.prompt), asked)
    prompts = [(asked, prompt_ids(chat, asked, raw)) for asked in list(first.values())[:limit]]
    fitting = [prompt for prompt in prompts if len(prompt[1]) <= longest]
    return fitting, len(prompts) - len(fitting)


def prompt_ids(chat: Chat, asked: PromptRow, raw: bool) -> list[int]:
    """The ids that a completion continues. raw: text as it stands, without the chat template."""
    prompt, where = asked
    if raw and not isinstance(prompt, str):
        raise UserError(f"{where}: --raw takes prompts that are text; messages need a chat template")
    try:
        return chat.text_ids(prompt) if raw else chat.prompt_ids(as_messages(prompt))
    except (RowError, Unrenderable) as error:
        raise UserError(f"{where}: {error}") from error


def as_messages(prompt: Prompt) -> list[Message]:
    """A prompt as messages: text is what the user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _prompt(data: dict[str, Any]) -> Prompt:
    column = next((c for c in COLUMNS if data.get(c) is not None), None)
    if column is None:
        found = ", ".join(data) or "nothing"
        raise RowError(f'expected "prompt", "messages" or a row of answers or preferences, found {found}')
    value = data[column]
    if column == "prompt" and isinstance(value, str):
        return value
    if column == "instruction":
        asked = {key: data[key] for key in ("instruction", "input", "system", "history") if key in data}
        messages = SFT_ROWS.read(asked | {"output": "…"}, SFT_ROWS.of(asked | {"output": "…"})).messages
    elif column.startswith("chosen"):
        said = PREFERENCE_ROWS.read(data, PREFERENCE_ROWS.of(data))
        messages = [*said.prompt, *said.completions[0]]
    else:
        messages = read_turns(value, column)
    if column == "conversations":
        messages = with_system(data, messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise RowError(f'"{column}" holds no question')
    return messages
