"""Columns that change what a row means are used, or the row is refused."""

import json
from pathlib import Path

import pytest

from lowalign.config.sections import DataConfig, PreferenceConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import Dataset, read_examples
from lowalign.data.preferences import PREFERENCE_ENCODER
from lowalign.errors import UserError
from tests.data import made

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHAREGPT = [
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "learned before"},
    {"from": "human", "value": "and?"},
]
PAIR = {"prompt": TALK[:1], "chosen": "a", "rejected": "b"}


def read(folder: Path, rows: list[dict], preferences: bool = False, **options: object) -> Dataset:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    config = (PreferenceConfig if preferences else DataConfig)(cache=False, **options)
    return read_examples([str(file)], Chat(made.chatml()), config, encoder=PREFERENCE_ENCODER if preferences else None)


@pytest.mark.parametrize(
    "row, column",
    [
        ({"messages": TALK, "system_prompt": "s"}, "system_prompt"),
        ({"messages": TALK, "functions": [{"name": "f"}]}, "functions"),
        ({"prompt": "a", "completion": "b", "label": False}, "label"),
        ({"prompt": "a", "completion": "b", "score": -1}, "score"),
        ({"messages": TALK, "kto_tag": False}, "kto_tag"),
        ({"conversations": SHAREGPT, "chosen": {"from": "gpt", "value": "a"}, "rejected": {}}, "chosen"),
        ({"text": "what?", "role": "prompter", "message_id": "1", "parent_id": None, "deleted": True}, "role"),
        ({"messages": TALK, "images": ["a.png"]}, "images"),
        ({"prompt": "a", "text": "b"}, "prompt"),
    ],
)
def test_a_column_that_matters_is_not_passed_over(tmp_path: Path, row: dict, column: str) -> None:
    ((bad,), examples) = (lambda d: (d.bad, d.examples))(read(tmp_path, [row]))
    assert not examples
    assert f'"{column}" would not be used' in bad.message and f"--data.ignore {column}" in bad.message
    ignored = (column, "message_id", "rejected")
    assert read(tmp_path, [row], ignore=ignored).examples


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "label": True, "score": 2, "id": 7},
        {"messages": TALK, "images": [], "functions": None, "system_prompt": ""},
        {"text": "a document", "label": 0, "score": -1.5},
    ],
)
def test_columns_that_change_nothing_are_listed(tmp_path: Path, row: dict) -> None:
    dataset = read(tmp_path, [row])
    assert dataset.examples and not dataset.bad
    assert set(dataset.report["files"][0]["ignored_columns"]) == row.keys() - {
        "prompt",
        "completion",
        "messages",
        "text",
    }


def test_a_system_column_is_used(tmp_path: Path) -> None:
    rows = [{"messages": TALK, "system": "Be brief."}, {"prompt": TALK[:1], "completion": "ho", "system": "Be brief."}]
    turns = {"messages": [{"role": "system", "content": "Be brief."}, *TALK]}
    one, two, expected = read(tmp_path, [*rows, turns]).examples
    assert one.prompt == two.prompt == expected.prompt and one.completions == two.completions == expected.completions
    pair = read(tmp_path, [PAIR | {"system": "Be brief."}], preferences=True).examples[0]
    assert pair.prompt == expected.prompt
    for row, preferences in (
        ({"prompt": "a", "completion": "b"}, False),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, True),
    ):
        (bad,) = read(tmp_path, [row | {"system": "s"}], preferences).bad
        assert '"system" has no place in plain text' in bad.message


def test_columns_are_renamed(tmp_path: Path) -> None:
    tools = [{"name": "find", "description": "finds"}]
    call = {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": "{}"}}
    turns = [TALK[0], call]
    one = read(
        tmp_path,
        [{"messages": turns, "functions": tools, "system_prompt": "s"}],
        rename=("functions=tools", "system_prompt=system"),
    )
    (expected,) = read(tmp_path, [{"messages": turns, "tools": tools, "system": "s"}]).examples
    assert one.examples[0].prompt == expected.prompt and not one.bad
    (bad,) = read(tmp_path, [{"messages": TALK, "a": 1, "b": 2}], rename=("a=b",)).bad
    assert 'two columns are called "b"' in bad.message
    with pytest.raises(UserError, match=r"--data\.rename functions: write OLD=NEW"):
        read(tmp_path, [{"messages": TALK}], rename=("functions",))


def test_arguments_that_parquet_filled_with_null_are_not_learned(tmp_path: Path) -> None:
    arguments = {"city": "Graz", "count": None, "inner": {"a": None, "b": [1, {"c": None}]}}
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "find", "arguments": arguments}}],
    }
    (example,) = read(tmp_path, [{"messages": [TALK[0], call]}]).examples
    learned = made.chatml().decode(example.completions[0])
    assert learned == '{"name": "find", "arguments": {"city": "Graz", "inner": {"b": [1, {}]}}}<|im_end|>'


def test_a_users_turn_with_calls_is_refused(tmp_path: Path) -> None:
    turn = {"role": "user", "content": None, "tool_calls": [{"function": {"name": "find", "arguments": {}}}]}
    (bad,) = read(tmp_path, [{"messages": [turn, TALK[1]]}]).bad
    assert "messages[0]: only a turn of the assistant can have calls" in bad.message


def test_no_hint_that_misleads(tmp_path: Path) -> None:
    (bad,) = read(tmp_path, [{"text": "a"}, {"context": "b"}]).bad
    assert bad.message == 'expected "text", found "context"'
