"""The formats of rows with preferences, and how each is read.

A prompt or an answer is text or a list of turns. A row with text only is plain text, without a chat template; otherwise a
text is a turn of the user (prompt) or of the assistant (answer).
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lowalign.data.rows.formats import RowFormat, RowFormats
from lowalign.data.rows.sft_rows import SFT_ROWS, refuse_system, string, with_system
from lowalign.data.rows.turns import (
    Message,
    Prompt,
    Tools,
    as_messages,
    closest,
    expected,
    read_tools,
    read_turns,
    require_answer,
)
from lowalign.data.rows.unused import PREFERENCE_MEANINGS
from lowalign.data.sources.row import RowError
from lowalign.data.sources.strict_json import json_type

TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class PromptAndCompletions:
    """A prompt and its completions: all texts, or all lists of messages."""

    prompt: Prompt
    completions: list[Prompt]
    tools: Tools = None


@dataclass(frozen=True)
class Preference(PromptAndCompletions):
    """Completions with ranks (lowest is best, equal ranks tie), or, with rank None, one completion with a label.

    scores: instead of ranks, the highest is best. margin: required lead of the better completion. weight: factor of the
    comparison in the loss.
    """

    rank: Sequence[float] | None = None
    scores: Sequence[float] | None = None
    margin: float = 0.0
    label: bool | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class ScoreRow(PromptAndCompletions):
    """One completion and its score."""

    score: float = 0.0


@dataclass(frozen=True)
class VerdictRow(PromptAndCompletions):
    """One annotator's verdict on two completions: "a" (the first is better), "b" or "tie"."""

    annotator: str = ""
    verdict: str = ""


def _pairs(data: dict[str, Any]) -> Preference:
    return Preference(**_prompt_and_completions(data, "chosen", "rejected"), rank=[0, 1], margin=_margin(data))


def _sharegpt(data: dict[str, Any]) -> Preference:
    prompt = with_system(data, read_turns(data["conversations"], "conversations"))
    return _pairs(data | {"prompt": prompt, "system": None})


def _whole(data: dict[str, Any], chosen: str = "chosen", rejected: str = "rejected") -> Preference:
    """Two whole conversations; the prompt is their common beginning, found later."""
    conversations = [with_system(data, _conversation(data, name)) for name in (chosen, rejected)]
    return Preference([], conversations, read_tools(data.get("tools")), rank=[0, 1], margin=_margin(data))


def _conversation(data: dict[str, Any], name: str) -> list[Message]:
    value = data[name]
    if not isinstance(value, str):
        return require_answer(read_turns(value, name), name)
    parts = TRANSCRIPT.split(value)
    if not parts[0].strip() and parts[1:2] == ["Human"]:
        roles = {"Human": "user", "Assistant": "assistant"}
        pairs = zip(parts[1::2], parts[2::2], strict=True)
        value = [{"role": roles[speaker], "content": text.strip()} for speaker, text in pairs]
        return require_answer(read_turns(value, name), name)
    others = [key for key in data if key not in ("chosen", "rejected")]
    if closest("prompt", others):
        raise RowError(expected("prompt", others))
    raise RowError(
        f'"{name}" is plain text, and there is no "prompt"; give one, or write whole conversations: lists of turns, or '
        r'texts of the form "\n\nHuman: …\n\nAssistant: …"'
    )


def _ranking(data: dict[str, Any]) -> Preference:
    values = data["completions"]
    if not isinstance(values, list):
        raise RowError(f'"completions" must be a list of answers, found {json_type(values)}')
    if len(values) < 2:
        raise RowError(f'"completions" has {len(values)} of the two or more answers that a ranking needs')
    named = {f"completions[{i}]": value for i, value in enumerate(values)}
    prompt_and_completions = _prompt_and_completions(data | named, *named)
    if data.get("ranks") is not None and data.get("scores") is not None:
        raise RowError('"ranks" and "scores" both say which completion is better; leave one out with --data.ignore')
    if data.get("scores") is not None:
        return Preference(**prompt_and_completions, scores=_numbers(data, "scores", "the best highest", len(values)))
    if data.get("ranks") is None:
        return Preference(**prompt_and_completions, rank=range(len(values)))
    ranks = _numbers(data, "ranks", "the best lowest", len(values))
    order = sorted(set(ranks))
    return Preference(**prompt_and_completions, rank=[order.index(rank) for rank in ranks])


def _numbers(data: dict[str, Any], name: str, meaning: str, count: int) -> list[float]:
    values = data[name]
    if not isinstance(values, list):
        raise RowError(f'"{name}" must be a list of numbers, {meaning}, found {json_type(values)}')
    if len(values) != count:
        raise RowError(f'"{name}" has {len(values)} numbers for {count} completions')
    return [_number(value, f"{name}[{i}]", -math.inf) for i, value in enumerate(values)]


def _score(data: dict[str, Any]) -> ScoreRow:
    return ScoreRow(**_prompt_and_completions(data, "completion"), score=_number(data["score"], '"score"', -math.inf))


def _label(data: dict[str, Any]) -> Preference:
    label = data["label"]
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise RowError(f'"label" must be true or false, found {json.dumps(label, ensure_ascii=False)}')
    return Preference(**_prompt_and_completions(data, "completion"), label=bool(label))


def _verdict(data: dict[str, Any]) -> VerdictRow:
    annotator, verdict = data["annotator"], data["verdict"]
    if isinstance(annotator, bool) or not isinstance(annotator, str | int) or not str(annotator).strip():
        raise RowError(f'"annotator" must be a name or a number, found {json.dumps(annotator, ensure_ascii=False)}')
    if verdict not in ("a", "b", "tie"):
        raise RowError(f'"verdict" must be "a", "b" or "tie", found {json.dumps(verdict, ensure_ascii=False)}')
    prompt_and_completions = _prompt_and_completions(data, "completion_a", "completion_b")
    return VerdictRow(**prompt_and_completions, annotator=str(annotator), verdict=verdict)


def _prompt_and_completions(data: dict[str, Any], *names: str) -> dict[str, Any]:
    """The fields of PromptAndCompletions: the column `prompt`, and completions in the columns `names`."""
    prompt, values = data["prompt"], [data[name] for name in names]
    if not isinstance(prompt, list | dict) and not any(isinstance(value, list | dict) for value in values):
        refuse_system(data)
        return {"prompt": string(data, "prompt", empty=True), "completions": [string(data, name) for name in names]}
    prompt = read_turns(_turns(prompt, "user"), "prompt")
    completions = []
    for name, value in zip(names, values, strict=True):
        turns = read_turns(_turns(value, "assistant"), name)
        if turns[: len(prompt)] == prompt:  # a whole conversation, with the prompt
            turns = turns[len(prompt) :]
        if turns and turns[0]["role"] != "assistant":
            raise RowError(f"{name} begins with a turn of the {turns[0]['role']}, not of the assistant")
        completions.append(require_answer(turns, name))
    prompt = with_system(data, prompt)
    return {"prompt": prompt, "completions": completions, "tools": read_tools(data.get("tools"))}


def _turns(value: Any, role: str) -> Any:
    return [value] if isinstance(value, dict) else as_messages(value, role)


def _margin(data: dict[str, Any]) -> float:
    return 0.0 if data.get("margin") is None else float(_number(data["margin"], '"margin"', 0))


def _number(value: Any, name: str, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"{name} must be a number, found {json_type(value)}")
    # 1e999 is read as infinite, and an integer may be larger than any float.
    if not least <= value < math.inf or abs(value) > 1e300:
        kind = "finite number of 0 or more" if least == 0 else "finite number"
        raise RowError(f"{name} must be a {kind}, found {str(value)[:20]}")
    return value


def _other_command_columns(data: dict[str, Any]) -> tuple[str, ...]:
    sft_format = SFT_ROWS.of(data)
    return sft_format.required if sft_format else ()


_whole_messages = partial(_whole, chosen="chosen_messages", rejected="rejected_messages")
# A row with the columns of several formats gets the first.
PREFERENCE_ROWS = RowFormats(
    [
        RowFormat("pairs", ("conversations", "chosen", "rejected"), ("system", "tools", "margin"), _sharegpt),
        RowFormat("pairs", ("prompt", "chosen", "rejected"), ("system", "tools", "margin"), _pairs),
        RowFormat("pairs", ("chosen_messages", "rejected_messages"), ("system", "tools", "margin"), _whole_messages),
        RowFormat("pairs", ("chosen", "rejected"), ("system", "tools", "margin"), _whole),
        RowFormat(
            "verdicts",
            ("prompt", "completion_a", "completion_b", "annotator", "verdict"),
            ("system", "tools"),
            _verdict,
        ),
        RowFormat("ranking", ("prompt", "completions"), ("ranks", "scores", "system", "tools"), _ranking),
        RowFormat("scores", ("prompt", "completion", "score"), ("system", "tools"), _score),
        RowFormat("labels", ("prompt", "completion", "label"), ("system", "tools"), _label),
    ],
    _other_command_columns,
    "a row without a preference; use lowalign sft",
    PREFERENCE_MEANINGS,
)
