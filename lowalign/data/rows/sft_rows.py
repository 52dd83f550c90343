"""The formats of rows for fine-tuning, and how each is read."""

from dataclasses import dataclass
from typing import Any

from lowalign.data.rows.formats import RowFormat, RowFormats
from lowalign.data.rows.turns import Message, Tools, as_messages, read_tools, read_turns, require_answer, unsupervised
from lowalign.data.rows.unused import SFT_MEANINGS
from lowalign.data.sources.row import RowError
from lowalign.data.sources.strict_json import json_type


@dataclass(frozen=True)
class Conversation:
    """Messages as in lowalign.data.rows.turns, and the functions that can be called."""

    messages: list[Message]
    tools: Tools = None


@dataclass(frozen=True)
class PromptCompletion:
    """Plain text and its continuation, without a chat template."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class PlainText:
    """A document, supervised as a whole."""

    text: str


def string(data: dict[str, Any], name: str, empty: bool = False) -> str:
    """The text in a column; "" where it is absent or null. Raises RowError when it is no string, or empty."""
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError(f'"{name}" must be a string, found {json_type(value)}')
    if not empty and not (value or "").strip():
        raise RowError(f'"{name}" is empty')
    return value or ""


def _conversation(messages: list[Message], tools: Any) -> Conversation:
    return Conversation(require_answer(messages), read_tools(tools))


def _messages(data: dict[str, Any]) -> Conversation:
    messages = read_turns(data["messages"], "messages")
    return _conversation(with_system(data, messages), data.get("tools"))


def _sharegpt(data: dict[str, Any]) -> Conversation:
    messages = read_turns(data["conversations"], "conversations")
    return _conversation(with_system(data, messages), data.get("tools"))


def with_system(data: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The messages, with the text of the column `system` first."""
    system = string(data, "system", empty=True)
    if system and messages[0] == {"role": "system", "content": system}:
        return messages
    if system and messages[0]["role"] == "system":
        return [messages[0] | {"content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages] if system else messages


def refuse_system(data: dict[str, Any]) -> None:
    """Raise RowError when a row of plain text has a system text."""
    if string(data, "system", empty=True):
        raise RowError(
            '"system" has no place in plain text; write the prompt as a list of turns, or leave it out with --data.ignore system'
        )


def _prompt_completion(data: dict[str, Any]) -> Conversation | PromptCompletion:
    if not isinstance(data["prompt"], list) and not isinstance(data["completion"], list):
        refuse_system(data)
        return PromptCompletion(string(data, "prompt", empty=True), string(data, "completion"))
    prompt = read_turns(as_messages(data["prompt"], "user"), "prompt")
    completion = read_turns(as_messages(data["completion"], "assistant"), "completion")
    return _conversation(unsupervised(with_system(data, prompt)) + completion, data.get("tools"))


def _alpaca(data: dict[str, Any]) -> Conversation:
    instruction = [string(data, "instruction", empty=True), string(data, "input", empty=True)]
    user = "\n".join(filter(None, instruction))
    if not user.strip():
        raise RowError('"instruction" is empty')
    messages = []
    history = data.get("history") or []
    if not isinstance(history, list):
        raise RowError(f'"history" must be a list of pairs, found {json_type(history)}')
    for i, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) and t.strip() for t in pair)):
            raise RowError(f"history[{i}] must be a pair of texts: what the user said and the answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages += [{"role": "user", "content": user}, {"role": "assistant", "content": string(data, "output")}]
    return _conversation(with_system(data, messages), None)


def _text(data: dict[str, Any]) -> PlainText:
    return PlainText(string(data, "text"))


def _other_command_columns(data: dict[str, Any]) -> tuple[str, ...]:
    return ("chosen", "rejected") if {"chosen", "rejected"} <= data.keys() else ()


# A row with the columns of several formats gets the first: the original Alpaca data also has `text`, UltraChat has
# `prompt` beside `messages`.
SFT_ROWS = RowFormats(
    [
        RowFormat("messages", ("messages",), ("system", "tools"), _messages),
        RowFormat("sharegpt", ("conversations",), ("system", "tools"), _sharegpt),
        RowFormat("prompt-completion", ("prompt", "completion"), ("system", "tools"), _prompt_completion),
        RowFormat("alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
        RowFormat("text", ("text",), (), _text),
    ],
    _other_command_columns,
    "a row of preferences; use lowalign dpo or lowalign reward",
    SFT_MEANINGS,
)
