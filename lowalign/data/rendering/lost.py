"""What a chat template leaves out of a conversation: texts, calls and thoughts that are not in what it rendered.

Compared without white space, which templates trim, and as JSON, which they write results and arguments in.
"""

import json
from collections.abc import Iterator
from typing import Any

from lowalign.data.rendering.turns import Piece
from lowalign.data.rows.thoughts import text_of, thoughts_of
from lowalign.data.rows.turns import Message, is_supervised
from lowalign.data.sources.row import RowDropped


class Lossy(RowDropped):
    """The chat template leaves out something that is to be learned."""


def lost_parts(messages: list[Message], examples: list[list[Piece]]) -> tuple[list[str], list[str]]:
    """-> what the rendered pieces of a conversation lack: of its supervised turns, and of the rest. Each as words such as
    "the text of an assistant turn with calls"; empty: nothing is lost."""
    everything = _Searched("".join(piece.text for pieces in examples for piece in pieces))
    turns: dict[int, str] = {}
    for piece in (piece for pieces in examples for piece in pieces):
        if piece.message is not None and piece.supervised:
            turns[piece.message] = turns.get(piece.message, "") + piece.text
    supervised, rest = [], []
    for i, message in enumerate(messages):
        learned = is_supervised(message) and i in turns
        where = _Searched(turns[i]) if learned else everything
        missing = [name for name, values in _parts(message) if not all(value in where for value in values)]
        (supervised if learned else rest).extend(missing)
    return list(dict.fromkeys(supervised)), list(dict.fromkeys(rest))


def kept_all(messages: list[Message], pieces: list[Piece]) -> bool:
    """Whether all texts of a conversation without calls and thoughts are there as they are. False: look closer."""
    turns = {piece.message: piece.text for piece in pieces if piece.message is not None}
    context = "".join(piece.text for piece in pieces if piece.message is None)
    return all(message["content"].strip() in turns.get(i, context) for i, message in enumerate(messages))


class _Searched:
    """A text in which parts are looked for."""

    def __init__(self, text: str):
        self._text = text
        self._dense: str | None = None

    def __contains__(self, part: str) -> bool:
        if part.strip() in self._text:
            return True
        if self._dense is None:
            self._dense = _dense(self._text)
        return any(_dense(form) in self._dense for form in (part, _quoted(part), json.dumps(part)[1:-1]))


def _dense(text: str) -> str:
    return "".join(text.split())


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _parts(message: Message) -> Iterator[tuple[str, list[str]]]:
    """The parts of a message: a name for each, and the texts that must be there."""
    role, calls = message["role"], message.get("tool_calls") or []
    whose = {"system": "a system turn", "user": "a user turn", "tool": "a tool's result"}.get(role)
    whose = whose or ("an assistant turn with calls" if calls else "an assistant turn")
    if text := text_of(message).strip():
        yield f"the text of {whose}", [text]
    if role == "assistant" and (thoughts := thoughts_of(message)):
        yield f"the thoughts of {whose}", [thoughts]
    if calls:
        first, *more = [call["function"] for call in calls]
        yield "a call", [first["name"], *_leaves(first["arguments"])]
        if more:
            values = [value for function in more for value in (function["name"], *_leaves(function["arguments"]))]
            yield "a second call of a turn", values


def _leaves(value: Any) -> Iterator[str]:
    """The texts and numbers in the arguments of a call."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif not isinstance(value, bool | None):
        yield json.dumps(value)
