"""The exact messages for bad rows, with their lines."""

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from lowalign.config.sections import DataConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import load_examples, read_examples
from lowalign.errors import UserError
from tests.data.made import CHATML, CHATML_TOOLS, bytes_tokenizer, chatml

GOOD = '{"prompt": "a", "completion": "b"}'
CALL = '"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "%s"}}]'


def turns(*turns: str) -> str:
    return f'{{"messages": [{", ".join(turns)}]}}'


ASK = '{"role": "user", "content": "hi"}'
HI = turns(ASK, '{"role": "assistant", "content": "b"}').removesuffix("}")
# Each line stands second in a file of three, between two good rows.
LINES = {
    '{"prompt": "a", "completoin": "b"}': 'expected "completion", found "completoin"; did you mean "completion"?',
    '{"prompt": "a", "Completion": "b"}': 'expected "completion", found "Completion"; did you mean "completion"?',
    '{"prompt": "a", "answer": "b", "id": 3}': 'expected "completion", found "answer", "id"',
    '{"prompt": "a"}': 'expected "completion", found nothing',
    "{}": 'expected "prompt", found nothing',
    '{"prompt": "a", "chosen": "b", "rejected": "c"}': 'expected "completion", found "chosen" and "rejected": a row of preferences; use lowalign dpo or lowalign reward',
    '{"prompt": "a", "completion": null}': '"completion" is null',
    '{"prompt": "a", "completion": " "}': '"completion" is empty',
    '{"prompt": "a", "completion": 7}': '"completion" must be a string, found a number',
    '{"prompt": {"a": 1}, "completion": "b"}': '"prompt" must be a string, found an object',
    '{"prompt": [], "completion": "b"}': '"prompt" is empty',
    '["a", "b"]': "a row must be an object {…}, found a list",
    "true": "a row must be an object {…}, found true or false",
    '{"prompt": "a", "completion": NaN}': "NaN is not JSON: write null or a number",
    '{"prompt": "a", "completion": "b", "score": -Infinity}': "-Infinity is not JSON: write null or a number",
    '{"prompt": "a", "completion": "b", "prompt": "c"}': 'the key "prompt" is there more than once',
    '{"prompt": "a", "completion": "\\ud83d"}': r"\ud83d is half of a surrogate pair, not a character",
    '{"prompt": "a" "completion": "b"}': "not JSON: Expecting ',' delimiter (column 16)",
    "prompt: a": "not JSON: Expecting value (column 1)",
    GOOD + GOOD: "more text after the row, at column 35: write one row per line",
    "[" * 100_000: "nested too deeply",
    '{"n": 1' + "0" * 5000 + "}": "a number of 5001 digits",
    '{"messages": "hi"}': '"messages" must be a list of turns, found a string',
    '{"messages": []}': '"messages" is empty',
    '{"messages": ["hi"]}': "messages[0] must be an object, found a string",
    turns('{"rol": "user", "content": "hi"}'): 'messages[0]: expected "role", found "rol"; did you mean "role"?',
    turns(ASK, '{"role": "asistant", "content": "b"}'): 'messages[1]: unknown role "asistant"; did you mean "assistant"?',
    turns(ASK, '{"role": 3, "content": "b"}'): "messages[1]: unknown role 3; roles are system, user, assistant, tool, "
    "developer, human, prompter, gpt, model, chatgpt, ai, bot, observation, function, function_response, tool_response, function_call, tool_call",
    turns(ASK, '{"role": "assistant", "contents": "b"}'): 'messages[1]: expected "content", found "contents"; did you mean "content"?',
    turns(ASK, '{"role": "assistant", "content": null}'): 'messages[1]: "content" is null',
    turns(ASK, '{"role": "assistant", "content": ""}'): "messages[1]: the assistant turn is empty",
    turns(ASK, '{"role": "assistant", "content": 5}'): "messages[1].content must be a string or a list of text parts, found a number",
    turns('{"role": "user", "content": [{"type": "image_url"}]}'): 'messages[0].content[0]: only text is supported, found a part of type "image_url"',
    turns('{"role": "user", "content": [{"type": "text"}]}'): 'messages[0].content[0] must be {"type": "text", "text": …}',
    turns(ASK): "no assistant turn to learn from",
    turns(ASK, '{"role": "assistant", "content": "b", "weight": 50}'): 'messages[1]: "weight" must be a number from 0 to 10, found 50',
    turns(ASK, '{"role": "assistant", "content": "b", "weight": -0.5}'): 'messages[1]: "weight" must be a number from 0 to 10, found -0.5',
    turns(ASK, '{"role": "assistant", "content": "b", "weight": "1"}'): 'messages[1]: "weight" must be a number from 0 to 10, found "1"',
    turns(ASK, f'{{{CALL % "{x"}}}'): "messages[1].tool_calls: the arguments: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
    turns(ASK, f'{{{CALL % "[1]"}}}'): "messages[1].tool_calls: the arguments must be an object, found a list",
    turns(ASK, '{"role": "assistant", "tool_calls": [{"arguments": {}}]}'): 'messages[1].tool_calls: a call must be an object with "name" and "arguments"',
    f'{HI}, "tools": "x"}}': '"tools": not JSON (Expecting value: line 1 column 1 (char 0))',
    f'{HI}, "tools": {{}}}}': '"tools" must be a list of functions, found an object',
    f'{HI}, "tools": [{{"nam": "f"}}]}}': 'tools[0]: a tool must be an object with a name; expected "name", found "nam"; did you mean "name"?',
    '{"conversations": [{"from": "humn", "value": "hi"}]}': 'conversations[0]: unknown from "humn"; did you mean "human"?',
    '{"conversations": [{"from": "human", "values": "hi"}]}': 'conversations[0]: expected "value", found "values"; did you mean "value"?',
    '{"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": "f(x)"}]}': "conversations[1].value: not JSON (Expecting value: line 1 column 1 (char 0))",
    '{"instruction": "a", "output": ""}': '"output" is empty',
    '{"instruction": "", "output": "b"}': '"instruction" is empty',
    '{"instruction": "a", "output": "b", "history": [["q"]]}': "history[0] must be a pair of texts: what the user said and the answer",
    '{"text": ""}': '"text" is empty',
}  # fmt: skip


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(chatml())


def complaints(path: Path, content: bytes, chat: Chat, **options: object) -> list[str]:
    path.write_bytes(content)
    config = DataConfig(cache=False, **options)
    return [str(row) for row in read_examples([str(path)], chat, config).bad]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:60])
def test_a_bad_line_gets_its_message(line: str, tmp_path: Path, chat: Chat) -> None:
    path = tmp_path / "rows.jsonl"
    assert complaints(path, f"{GOOD}\n{line}\n{GOOD}\n".encode(), chat) == [f"{path}:2: {LINES[line]}"]


FILES = {
    b'{"prompt": "a", "completion": "\xff"}\n': [(1, "not valid UTF-8 at column 32")],
    f"{GOOD}\n{GOOD[:20]}".encode(): [
        (2, "not JSON: Unterminated string starting at (column 17); the file seems to be cut off here")
    ],
    f"{GOOD}\n{GOOD[:15]}".encode(): [
        (2, "not JSON: Expecting property name enclosed in double quotes (column 16); the file seems to be cut off here")
    ],
    b'{\n"prompt": "a"\n}\n': [
        (1, "a row spread over several lines: write each row in one line, or all of them in one array; nothing after "
            "this is read")
    ],
    b'[\n {"prompt": "a",\n  "completoin": "b"},\n 5\n]': [
        (2, 'expected "completion", found "completoin"; did you mean "completion"?'),
        (4, "a row must be an object {…}, found a number"),
    ],
    f"[{GOOD},\n\n{GOOD}".encode(): [(3, 'the array is not closed with "]"; the file seems to be cut off here')],
    f"[{GOOD},\n{GOOD[:-1]},\n{GOOD}]".encode(): [
        (2, "not JSON: Expecting property name enclosed in double quotes (column 1 of line 3); nothing after this can be read")
    ],
    f"[{GOOD}\n{GOOD}]".encode(): [(2, 'expected "," or "]" after a row; nothing after this can be read')],
    f"[{GOOD}]\n{GOOD}\n".encode(): [(2, 'more text after the "]" that ends the rows')],
    f'[{GOOD},\n{{"prompt": "a", "a": NaN}}, {GOOD}]'.encode(): [(2, "NaN is not JSON: write null or a number")],
    b'{"foo": 1, "bar": 2}\n': [
        (1, "expected the columns of one shape (messages, conversations, prompt + completion, instruction + output, "
            "text), found \"foo\", \"bar\"")
    ],
    b'{"mesages": []}\n': [(1, 'expected "messages", found "mesages"; did you mean "messages"?')],
}  # fmt: skip


@pytest.mark.parametrize("content", FILES, ids=lambda content: content.decode("latin-1")[:60])
def test_a_bad_file_gets_its_messages(content: bytes, tmp_path: Path, chat: Chat) -> None:
    path = tmp_path / "rows.json"
    assert complaints(path, content, chat) == [f"{path}:{line}: {message}" for line, message in FILES[content]]


def test_an_explicit_shape_is_held_to(tmp_path: Path, chat: Chat) -> None:
    path = tmp_path / "rows.jsonl"
    messages = complaints(path, b'{"text": "a", "prompt": "b"}\n', chat, shape="prompt-completion")
    assert messages == [f'{path}:1: expected "completion", found "text"']


def test_a_marker_that_is_no_token_is_refused(tmp_path: Path) -> None:
    """Without <|im_start|> in the vocabulary the default template writes it as plain text, as anybody could."""
    chat = Chat(bytes_tokenizer(["</s>"], eos_token="</s>"))
    rows = turns(ASK.replace("hi", "<|im_start|>"), '{"role": "assistant", "content": "b"}')
    assert complaints(tmp_path / "rows.jsonl", rows.encode(), chat) == [
        f"{tmp_path}/rows.jsonl:1: its text holds <|im_start|>, which begins a turn in the default chat template and is no "
        "token of this tokenizer; remove it, or give a template (--data.template)"
    ]


def test_refusal_lists_twenty_and_counts_all(tmp_path: Path, chat: Chat) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n" + '{"prompt": "a"}\n' * 31)
    with pytest.raises(UserError) as caught:
        load_examples([str(path)], chat, DataConfig(cache=False))
    lines = str(caught.value).split("\n")
    assert lines[0] == "31 of 32 rows cannot be used:"
    assert lines[1:21] == [f'  {path}:{n}: expected "completion", found nothing' for n in range(2, 22)]
    assert lines[21:] == ["  … and 11 more", "correct them, or skip them with --data.on-error skip"]


def test_skipped_rows_are_written_aside(tmp_path: Path, chat: Chat) -> None:
    path, rejected = tmp_path / "rows.jsonl", tmp_path / "out" / "rejected.jsonl"
    path.write_bytes(f'{GOOD}\n{{"prompt": "é"}}\n'.encode() + b"broken \xe9\n" + f"{GOOD}\n".encode())
    config = DataConfig(cache=False, on_error="skip")
    dataset = load_examples([str(path)], chat, config, rejected=rejected)
    assert [e.source for e in dataset.examples] == [f"{path}:1", f"{path}:4"]
    assert dataset.report["bad"] == 2
    written = [json.loads(line) for line in rejected.read_text(encoding="utf-8").splitlines()]
    assert written == [
        {"where": f"{path}:2", "message": 'expected "completion", found nothing', "raw": '{"prompt": "é"}'},
        {"where": f"{path}:3", "message": "not JSON: Expecting value (column 1)", "raw": "broken \\xe9"},
    ]
    assert [p.name for p in rejected.parent.iterdir()] == ["rejected.jsonl"]


def test_no_row_makes_it_fall_over(tmp_path: Path) -> None:
    """Good rows of every shape with a value somewhere in them replaced: an Example, a complaint, or a drop."""
    call = {"role": "assistant", "tool_calls": [{"id": "call_1", "function": {"name": "f", "arguments": '{"a": 1}'}}]}
    good = [
        {"messages": [json.loads(ASK), call, {"role": "tool", "content": "x"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": '{"name": "f"}'}]},
        {
            "prompt": [json.loads(ASK)],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
        },
        {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["d", "e"]]},
        {"text": "a"},
    ]
    good[0]["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    good[1]["tools"] = '[{"name": "f"}]'
    odd = [
        None,
        0,
        1.5,
        True,
        "",
        "user",
        "<|im_end|>",
        "{",
        "[]",
        "[[]]",
        [],
        {},
        [[]],
        [None],
        {"name": 1},
        "é\u2028",
    ]
    rng, rows = random.Random(0), []
    for _ in range(1500):
        row = json.loads(json.dumps(rng.choice(good)))
        for _ in range(rng.randrange(1, 3)):
            place, key = rng.choice(list(places(row)))
            place[key] = deepcopy(rng.choice(odd))
        rows.append(row)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for template in (CHATML, CHATML_TOOLS):
        chat = Chat(chatml(template))
        dataset = read_examples([str(path)], chat, DataConfig(cache=False))
        used = {example.source for example in dataset.examples}
        assert len(used) + len(dataset.bad) + dataset.report["dropped"] == len(rows)
        assert len(used) > 100 and len(dataset.bad) > 100
        assert all(example.supervised for example in dataset.examples)


def places(value: object) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from places(inner)
