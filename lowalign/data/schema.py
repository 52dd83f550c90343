"""The shapes that rows come in, told apart by their columns, and what each means.

Columns a shape does not know are left alone: published data is full of ids, sources and scores. A column that is
missing is an error, with the one it may have been meant to be.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lowalign.data.read import kind_of
from lowalign.data.turns import Message, RowError, closest, expected, read_tools, read_turns

# Required columns, then optional ones. The order decides when a row has the columns of several: the original Alpaca
# data also has `text`, UltraChat has `prompt` beside `messages`.
COLUMNS = {
    "messages": (("messages",), ("tools",)),
    "sharegpt": (("conversations",), ("system", "tools")),
    "prompt-completion": (("prompt", "completion"), ("tools",)),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "text": (("text",), ()),
}


@dataclass(frozen=True)
class Conversation:
    """Messages as in lowalign.data.turns, and the functions that could be called."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class PromptCompletion:
    """Plain text and its continuation, without a chat template."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A document to learn as a whole."""

    text: str


def shape_of(data: dict[str, Any]) -> str | None:
    """The shape whose columns the row has; None when it has those of none."""
    filled = {name for name, value in data.items() if value is not None}
    for names in (filled, data.keys()):
        for shape, (required, _) in COLUMNS.items():
            if names >= set(required):
                return shape
    return None


def common_shape(rows: Iterable[dict[str, Any]]) -> str | None:
    """The shape of most rows: what the others in the file are measured against."""
    shapes = Counter(filter(None, map(shape_of, rows)))
    return shapes.most_common(1)[0][0] if shapes else None


def nearest_shape(data: dict[str, Any]) -> str | None:
    """The shape that the most columns of the row, allowing for misspelling, belong to."""
    likeness = {
        shape: sum(name in data or closest(name, data) is not None for name in required) / len(required)
        for shape, (required, _) in COLUMNS.items()
    }
    best = max(likeness, key=lambda shape: likeness[shape])
    return best if likeness[best] else None


def ignored_columns(data: dict[str, Any], shape: str) -> set[str]:
    """Columns of the row that its shape makes no use of."""
    required, optional = COLUMNS[shape]
    return data.keys() - {*required, *optional}


def interpret(data: dict[str, Any], shape: str | None) -> Conversation | PromptCompletion | Text:
    """What a row of that shape says (None: nothing in its file has a known shape). Raises RowError."""
    shape = shape or nearest_shape(data)
    if shape is None:
        known = ", ".join(" + ".join(required) for required, _ in COLUMNS.values())
        found = ", ".join(f'"{name}"' for name in data) or "none"
        raise RowError(f"expected the columns of one shape ({known}), found {found}")
    required, _ = COLUMNS[shape]
    for name in required:
        if name not in data:
            if {"chosen", "rejected"} <= data.keys():
                raise RowError(f'expected "{name}", found "chosen" and "rejected": a row of preferences')
            raise RowError(expected(name, [key for key in data if key not in required]))
        if data[name] is None:
            raise RowError(f'"{name}" is null')
    return _READERS[shape](data)


def _string(data: dict[str, Any], name: str, empty: bool = False) -> str:
    """The text in a column; "" where it is absent or null."""
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError(f'"{name}" must be a string, found {kind_of(value)}')
    if not empty and not (value or "").strip():
        raise RowError(f'"{name}" is empty')
    return value or ""


def _conversation(messages: list[Message], tools: Any) -> Conversation:
    if not any(m["role"] == "assistant" and m.get("weight") != 0 for m in messages):
        raise RowError("no assistant turn to learn from")
    return Conversation(messages, read_tools(tools))


def _messages(data: dict[str, Any]) -> Conversation:
    return _conversation(read_turns(data["messages"], "messages"), data.get("tools"))


def _sharegpt(data: dict[str, Any]) -> Conversation:
    messages = read_turns(data["conversations"], "conversations")
    return _conversation(_with_system(data, messages), data.get("tools"))


def _with_system(data: dict[str, Any], messages: list[Message]) -> list[Message]:
    system = _string(data, "system", empty=True)
    if system and messages[0]["role"] == "system":
        return [messages[0] | {"content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _prompt_completion(data: dict[str, Any]) -> Conversation | PromptCompletion:
    if not isinstance(data["prompt"], list) and not isinstance(data["completion"], list):
        return PromptCompletion(_string(data, "prompt", empty=True), _string(data, "completion"))
    turns = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = data[name]
        value = [{"role": role, "content": value}] if isinstance(value, str) else value
        turns.append(read_turns(value, name))
    prompt = [m | {"weight": 0} if m["role"] == "assistant" else m for m in turns[0]]
    return _conversation(prompt + turns[1], data.get("tools"))


def _alpaca(data: dict[str, Any]) -> Conversation:
    asked = [_string(data, "instruction", empty=True), _string(data, "input", empty=True)]
    user = "\n".join(text for text in asked if text)
    if not user.strip():
        raise RowError('"instruction" is empty')
    messages = []
    history = data.get("history") or []
    if not isinstance(history, list):
        raise RowError(f'"history" must be a list of pairs, found {kind_of(history)}')
    for i, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) and t.strip() for t in pair)):
            raise RowError(f"history[{i}] must be a pair of texts: what the user said and the answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages += [{"role": "user", "content": user}, {"role": "assistant", "content": _string(data, "output")}]
    return _conversation(_with_system(data, messages), None)


def _text(data: dict[str, Any]) -> Text:
    return Text(_string(data, "text"))


_READERS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _text,
}
