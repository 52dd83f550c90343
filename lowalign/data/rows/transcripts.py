"""Conversations that are one text, as `\\n\\nHuman: …\\n\\nAssistant: …`, to turns."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lowalign.data.sources.strict_json import half_surrogate, json_value

HUMAN = {"Human": "user", "Assistant": "assistant"}
CALL = re.compile(r"<functioncall>\s*(?P<call>\{.*\})\s*$", re.DOTALL)
QUOTED = re.compile(r"""("arguments"\s*:\s*)'(?P<inner>.*)'(\s*\}\s*)$""", re.DOTALL)


def transcript(text: str, speakers: Mapping[str, str] | None = None, before: str = "\n\n", end: str = "") -> list[dict]:
    """The turns of a text in which each begins with `before` and a speaker and a colon. Empty turns are left out.

    speakers: the role of each speaker; Human and Assistant if None. end: a marker that ends turns, left out. Raises ValueError
    for a text that begins with something else.
    """
    speakers = HUMAN if speakers is None else speakers
    names = "|".join(map(re.escape, speakers))
    parts = re.split(rf"(?:\A|{re.escape(before)})\s*({names}):", text.strip())
    if parts[0].strip() or len(parts) < 3:
        raise ValueError(f"it does not begin with one of {', '.join(speakers)}: {text.strip()[:40]!r}")
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    turns = [(speakers[name], (content.replace(end, "") if end else content).strip()) for name, content in pairs]
    return [{"role": role, "content": content} for role, content in turns if content]


def alternating(texts: Iterable[str]) -> list[dict[str, str]]:
    """Turns of texts of the user and of the assistant, one after the other."""
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def function_calls(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns, with calls out of texts that end in `<functioncall> {"name": …, "arguments": '{…}'}`, as Glaive writes them.
    Raises ValueError where such a call is not JSON."""
    return [_with_call(turn) for turn in turns]


def _with_call(turn: dict[str, Any]) -> dict[str, Any]:
    match = CALL.search(turn["content"]) if turn["role"] == "assistant" else None
    if match is None:
        return turn
    text = match["call"]
    # The arguments are JSON in single quotes: as a JSON string they are valid.
    if quoted := QUOTED.search(text):
        text = text[: quoted.start()] + quoted[1] + json.dumps(quoted["inner"].replace("\\'", "'")) + quoted[3]
    return {"role": "assistant", "content": turn["content"][: match.start()].strip(), "tool_calls": [json_value(text)]}


def json_objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects in a text, such as descriptions of functions after a sentence. Raises ValueError for one that is cut."""
    decoder, objects, at = json.JSONDecoder(), [], text.find("{")
    while at >= 0:
        value, end = decoder.raw_decode(text, at)
        objects.append(value)
        at = text.find("{", end)
    if problem := half_surrogate(objects, text):
        raise ValueError(problem)
    return objects
