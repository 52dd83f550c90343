"""The prompts of rows of any format, without their answers or preferences."""

import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from lowalign.config.sections import DataConfig, PromptFormat
from lowalign.data.chat import Chat
from lowalign.data.prompt_format import formatted
from lowalign.data.rendering.template import Unrenderable
from lowalign.data.rows.mapping import mappings_of, parse_rows
from lowalign.data.rows.preference_rows import PREFERENCE_ROWS
from lowalign.data.rows.sft_rows import SFT_ROWS, with_system
from lowalign.data.rows.turns import Prompt, as_messages, read_turns
from lowalign.data.sources.row import RowError
from lowalign.errors import UserError
from lowalign.log import log

COLUMNS = ("prompt", "messages", "conversations", "instruction", "chosen_messages", "chosen")

ANSWERS = ("completion", "chosen", "rejected", "completion_a", "completion_b")


class PromptRow(NamedTuple):
    """A prompt, file:line, and the columns of its row: those of the file, and those that options made of them."""

    prompt: Prompt
    where: str
    columns: Mapping[str, Any] = MappingProxyType({})


Prompts = list[tuple[PromptRow, list[int]]]  # with their token ids


def read_prompts(
    files: Sequence[str], prompt_format: PromptFormat | None = None, data: DataConfig | None = None
) -> Iterator[PromptRow]:
    """The prompt of each row: its `prompt` (text or messages), or its conversation before the last answer. prompt_format:
    the option, for a text. data: the options that say what the columns mean.

    Raises UserError, with file:line, for a row without a prompt.
    """
    for file, mapping in zip(files, mappings_of(data or DataConfig(), len(files)), strict=True):
        for row, prompt in parse_rows(file, lambda data: formatted(_prompt(data), prompt_format), mapping):
            yield PromptRow(prompt, row.where, {**(row.original or {}), **row.data})


def distinct_prompts(
    files: Sequence[str],
    chat: Chat,
    limit: int | None,
    max_tokens: int,
    prompt_format: PromptFormat | None = None,
    data: DataConfig | None = None,
) -> Prompts:
    """Each different prompt once, in the order of the rows (the first `limit`), without those of more than `max_tokens`
    tokens; logs the counts. prompt_format, data: as in read_prompts. Raises UserError when no prompt is left."""
    rows: dict[str, PromptRow] = {}
    for row in read_prompts(files, prompt_format, data):
        rows.setdefault(json.dumps(row.prompt), row)
    prompts = [(row, prompt_ids(chat, row)) for row in list(rows.values())[:limit]]
    if chat.positions is not None:  # one is left for the completion
        max_tokens = min(max_tokens, chat.positions - 1)
    fitting = [(row, ids) for row, ids in prompts if len(ids) <= max_tokens]
    too_long = f"{n:,} of them longer" if (n := len(prompts) - len(fitting)) else "none longer"
    counts = f"{len(prompts):,} prompts, {too_long} than {max_tokens:,} tokens{' and left out' if n else ''}"
    if not fitting:
        raise UserError(f"no prompt of {', '.join(files)} is left ({counts}); see --data.max-length")
    log(counts)
    return fitting


def prompt_ids(chat: Chat, row: PromptRow) -> list[int]:
    """The ids that a completion continues: of a text without the chat template, of messages with it. Raises UserError."""
    prompt, where, _ = row
    try:
        return chat.text_ids(prompt) if isinstance(prompt, str) else chat.prompt_ids(prompt)
    except (RowError, Unrenderable) as error:
        raise UserError(f"{where}: {error}") from error


def _prompt(data: dict[str, Any]) -> Prompt:
    column = next((c for c in COLUMNS if data.get(c) is not None), None)
    if column is None:
        columns = ", ".join(data) or "nothing"
        raise RowError(f'expected "prompt", "messages" or a row of answers or preferences, found {columns}')
    value = data[column]
    if column == "prompt" and isinstance(value, str):
        return as_messages(value) if any(map(_is_turns, _answers(data))) else value
    if column == "instruction":
        columns = {key: data[key] for key in ("instruction", "input", "system", "history") if key in data}
        messages = SFT_ROWS.parse(columns | {"output": "…"}).messages
    elif column.startswith("chosen"):
        preference = PREFERENCE_ROWS.parse(data)
        messages = [*preference.prompt, *preference.completions[0]]
    else:
        messages = read_turns(value, column)
    if column in ("conversations", "messages", "prompt"):
        messages = with_system(data, messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise RowError(f'"{column}" has no turn before the answer')
    return messages


def _answers(data: dict[str, Any]) -> list[Any]:
    several = data.get("completions")
    return [*map(data.get, ANSWERS), *(several if isinstance(several, list) else ())]


def _is_turns(answer: Any) -> bool:
    """Whether an answer is a turn or turns, not a text or a line of candidates.jsonl: a prompt beside it is a turn too."""
    return isinstance(answer, list) or (isinstance(answer, dict) and "completion" not in answer)
