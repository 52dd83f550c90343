"""Mutated rows and recipes: rows, a message with its place, or UserError; never a traceback, never longer than 5 seconds.

LOWALIGN_FUZZ multiplies the number of both (2,000 rows and 300 recipes: 10).
"""

import copy
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from lowalign.config import recipe
from lowalign.config.sections import DataConfig, PreferenceConfig
from lowalign.config.training import DPOConfig, PPOConfig, SFTConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import SFT_ENCODER, read_examples
from lowalign.data.preferences import PREFERENCE_ENCODER
from lowalign.errors import UserError
from tests.data import made

TIMES = int(os.environ.get("LOWALIGN_FUZZ", "1"))
TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "tool_calls": [made.weather_call("Rome")], "reasoning_content": "r"},
    {"role": "tool", "content": "{}", "tool_call_id": "call_1"},
    {"role": "assistant", "content": "c", "weight": 1},
]
ROWS: list[dict[str, Any]] = [
    {"messages": TALK, "tools": [made.WEATHER]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"text": "a document"},
    {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5},
    {"prompt": TALK[:2], "completions": ["a", "b", "c"], "ranks": [1, 2, 2]},
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": "a", "completion": "b", "score": 0.5},
    {"prompt": "a", "completion_a": "b", "completion_b": "c", "annotator": "x", "verdict": "a"},
    {"question": "a", "answer": "b"},
]
ODD: list[Any] = [
    None, True, 0, -1, 10**30, 1e308, "", " ", "\0", "\ud800", "<|im_end|>", "{{ 7 * 7 }}", "a" * 20_000, "\u202e\u2028", "🏴" * 9,
    [], [[]], {}, {"a": {"b": [None]}}, [None], "[1, 2", '{"a":', {"role": "assistant"}, ["x"] * 300, {"k" * 70_000: 1},
]  # fmt: skip
RAW = [
    b"\xff",
    b"NaN",
    b"\x00",
    b'"',
    b"{",
    b"]",
    b"\r",
    b"\\ud800",
    b"Infinity",
    b"\xed\xa0\x80",
    b'"a":1,"a":2,',
    b"9" * 5000,
]


def mutated(value: Any, draw: random.Random) -> Any:
    """The value with one thing in it changed: replaced, left out, doubled, or under another name."""
    place = value
    while isinstance(place, dict | list) and place:
        key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
        if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.3:
            break
        place = place[key]
    kind = draw.randrange(4)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[draw.choice(["", "rolle", "prompt", "messages", "weight", key * 2])] = place.pop(key)
    elif kind == 2 and isinstance(place, list):
        place.insert(key, copy.deepcopy(place[key]))
    else:
        place[key] = draw.choice(ODD)
    return value


@pytest.mark.parametrize("preset", [(), ("gsm8k",), ("glaive-v2",), ("oasst",)], ids=str)
def test_mutated_rows(tmp_path: Path, preset: tuple[str, ...]) -> None:
    draw, chat, longest, read = random.Random(f"{preset}"), Chat(made.chatml(made.CHATML_TOOLS)), 0.0, 0
    for k in range(5 * TIMES):
        lines = []
        for _ in range(10):
            row = copy.deepcopy(draw.choice(ROWS))
            for _ in range(draw.randrange(1, 4)):
                row = mutated(row, draw) if row else row
            line = bytearray(json.dumps(row).encode())
            if draw.random() < 0.2:
                at = draw.randrange(len(line))
                line[at : at + draw.randrange(3)] = draw.choice(RAW)
            lines.append(bytes(line))
        file = tmp_path / f"rows{k}.jsonl"
        file.write_bytes(b"\n".join(lines))
        started = time.monotonic()
        for encoder, config in ((SFT_ENCODER, DataConfig), (PREFERENCE_ENCODER, PreferenceConfig)):
            try:
                data = read_examples(
                    [str(file)], chat, config(cache=False, preset=preset, max_length=64), encoder=encoder
                )
            except UserError as error:
                assert str(error).isprintable() or "\n" in str(error)
                continue
            read += len(data.examples) + len(data.bad)
            for bad in data.bad:
                f"{bad} {bad.raw}".encode()
                assert bad.where.startswith(f"{file}:")
        longest = max(longest, time.monotonic() - started)
    assert read and longest < 5


def test_mutated_recipes(tmp_path: Path) -> None:
    draw, file = random.Random(0), tmp_path / "recipe.yaml"
    texts = [path.read_text() for path in recipe.packaged().values()]
    pieces = [
        "&a",
        "*a",
        "!!python/object:os.system",
        "[",
        "{",
        ":",
        "\t",
        "\x00",
        "nan",
        ".inf",
        "1e999",
        "-",
        "data:",
        "'",
        "\ud7ff",
        "? ",
    ]
    outcomes = {"parsed": 0, "refused": 0}
    for _ in range(30 * TIMES):
        text = draw.choice(texts)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(pieces) + text[at + draw.randrange(4) :]
        file.write_text(text)
        started = time.monotonic()
        try:
            recipe.parse(draw.choice([SFTConfig, DPOConfig, PPOConfig]), ["--model", "m", "--out", "o"], file)
            outcomes["parsed"] += 1
        except UserError as error:
            outcomes["refused"] += 1
            assert str(error)
        assert time.monotonic() - started < 5
    assert all(outcomes.values()), outcomes
