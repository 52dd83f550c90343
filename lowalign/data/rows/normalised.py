"""Parsed rows back to columns: one way to write each meaning."""

from functools import singledispatch
from typing import Any

from lowalign.data.rows.preference_rows import Preference, ScoreRow, VerdictRow
from lowalign.data.rows.sft_rows import Conversation, PlainText, PromptCompletion
from lowalign.data.rows.turns import Tools


@singledispatch
def normalised(row: Any) -> dict[str, Any]:
    """The row in the columns of a format; reading it gives an equal row."""
    raise TypeError(type(row))


@normalised.register
def _(row: Conversation) -> dict[str, Any]:
    return {"messages": row.messages} | _tools(row.tools)


@normalised.register
def _(row: PromptCompletion) -> dict[str, Any]:
    return {"prompt": row.prompt, "completion": row.completion}


@normalised.register
def _(row: PlainText) -> dict[str, Any]:
    return {"text": row.text}


@normalised.register
def _(row: Preference) -> dict[str, Any]:
    common = {"margin": row.margin} if row.margin else {}
    common |= _tools(row.tools)
    if row.label is not None:
        return {"prompt": row.prompt, "completion": row.completions[0], "label": row.label} | common
    if row.scores is None and list(row.rank) == [0, 1]:
        prompt = {"prompt": row.prompt} if row.prompt else {}  # two whole conversations have none
        return prompt | {"chosen": row.completions[0], "rejected": row.completions[1]} | common
    order = {"scores": list(row.scores)} if row.scores is not None else {"ranks": list(row.rank)}
    return {"prompt": row.prompt, "completions": row.completions} | order | common


@normalised.register
def _(row: ScoreRow) -> dict[str, Any]:
    return {"prompt": row.prompt, "completion": row.completions[0], "score": row.score} | _tools(row.tools)


@normalised.register
def _(row: VerdictRow) -> dict[str, Any]:
    answers = {"completion_a": row.completions[0], "completion_b": row.completions[1]}
    return {"prompt": row.prompt} | answers | {"annotator": row.annotator, "verdict": row.verdict} | _tools(row.tools)


def _tools(tools: Tools) -> dict[str, Any]:
    return {"tools": tools} if tools else {}
