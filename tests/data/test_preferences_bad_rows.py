"""The exact messages for bad rows of preferences, with their lines."""

import json
import random
from copy import deepcopy
from pathlib import Path

import pytest

from lowalign.config.sections import DataConfig, PreferenceConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import load_examples, read_examples
from lowalign.data.preferences import PREFERENCE_ENCODER, load_preferences
from lowalign.errors import UserError
from tests.data import made
from tests.data.test_bad_rows import places


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(made.chatml())


GOOD = {"prompt": "q", "chosen": "ho", "rejected": "no"}
TURNS = '[{"role": "user", "content": "hi"}, %s]'
# Each stands second in a file, after a good pair.
BAD = {
    '{"prompt": "q", "chosen": "a", "rejcted": "b"}': 'expected "rejected", found "rejcted"; did you mean "rejected"?',
    '{"promt": "q", "chosen": "a", "rejected": "b"}': 'expected "prompt", found "promt"; did you mean "prompt"?',
    '{"prompt": "q", "chosen": "a", "rejected": " "}': '"rejected" is empty',
    '{"prompt": "q", "chosen": "a", "rejected": null}': '"rejected" is null',
    '{"prompt": "q", "chosen": "a", "rejected": 7}': '"rejected" must be a string, found a number',
    '{"prompt": 7, "chosen": "a", "rejected": "b"}': '"prompt" must be a string, found a number',
    '{"prompt": [], "chosen": "a", "rejected": "b"}': '"prompt" is empty',
    '{"prompt": "q", "chosen": [], "rejected": "b"}': '"chosen" is empty',
    '{"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": ""}': "rejected[0]: the assistant turn is empty",
    '{"prompt": "q", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}': "chosen begins with a turn of the user, not of the assistant",
    '{"prompt": "q", "chosen": [{"role": "assistnt", "content": "a"}], "rejected": "b"}': 'chosen[0]: unknown role "assistnt"; did you mean "assistant"?',
    '{"prompt": "q", "chosen": "a", "rejected": "b", "margin": -1}': '"margin" must be a finite number of 0 or more, found -1',
    '{"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1e999}': '"margin" must be a finite number of 0 or more, found inf',
    '{"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1"}': '"margin" must be a number, found a string',
    '{"prompt": "q", "completion": "b"}': 'expected "chosen", found "prompt" and "completion": a row without a preference; use lowalign sft',
    '{"messages": []}': 'expected "prompt", found "messages": a row without a preference; use lowalign sft',
    '{"chosen": "a", "rejected": "b"}': '"chosen" is plain text, and there is no "prompt"; give one, or write whole conversations: lists of turns, '
    r'or texts of the form "\n\nHuman: …\n\nAssistant: …"',
    r'{"chosen": "\n\nHuman: q\n\nAssistant: ", "rejected": "\n\nHuman: q\n\nAssistant: a"}': "chosen[1]: the assistant turn is empty",
    f'{{"chosen": {TURNS % "{}"}, "rejected": []}}': 'chosen[1]: expected "role", found nothing',
    r'{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"}': "its answers differ at a turn of the user; they must answer the same prompt",
    r'{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: p\n\nAssistant: b"}': "one of its answers is the beginning of another",
    '{"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}': "there is no turn before its answers",
    '{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}': "chosen: no assistant turn to learn from",
    '{"prompt": "q", "completions": "a"}': '"completions" must be a list of answers, found a string',
    '{"prompt": "q", "completions": ["a"]}': '"completions" has 1 of the two or more answers that a ranking needs',
    '{"prompt": "q", "completions": ["a", ""]}': '"completions[1]" is empty',
    '{"prompt": "q", "completions": ["a", "b"], "ranks": 1}': '"ranks" must be a list of numbers, the best lowest, found a number',
    '{"prompt": "q", "completions": ["a", "b"], "ranks": [1]}': '"ranks" has 1 numbers for 2 completions',
    '{"prompt": "q", "completions": ["a", "b"], "ranks": [1, true]}': "ranks[1] must be a number, found true or false",
    '{"prompt": "q", "completions": ["a", "b"], "ranks": [1, 1e999]}': "ranks[1] must be a finite number, found inf",
    '{"prompt": "q", "completion": "a", "score": "5"}': '"score" must be a number, found a string',
    '{"prompt": "q", "completion": "a", "score": 1%s}' % ("0" * 400): '"score" must be a finite number, found 10000000000000000000',
    '{"prompt": "q", "completion": "a", "label": "good"}': '"label" must be true or false, found "good"',
    '{"prompt": "q", "completion": "a", "label": 2}': '"label" must be true or false, found 2',
    '{"prompt": "q", "completion": "", "label": 1}': '"completion" is empty',
    '{"prompt": "q", "completion_a": "a", "completion_b": "b", "annotator": "x", "verdict": "c"}': '"verdict" must be "a", "b" or "tie", found "c"',
    '{"prompt": "q", "completion_a": "a", "completion_b": "b", "annotator": "", "verdict": "a"}': '"annotator" must be a name or a number, found ""',
    f'{{"prompt": "q", "chosen": {TURNS % "5"}, "rejected": "b"}}': "chosen[1] must be an object, found a number",
    '{"prompt": [{"role": "user", "content": "q"}], "tools": "x", "chosen": "a", "rejected": "b"}': '"tools": not JSON (Expecting value: line 1 column 1 (char 0))',
    '{"prompt": "q", "chosen": [{"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "c"}], "rejected": "b"}':
        'the first turn in which its answers differ has a "weight" of 0',
}  # fmt: skip


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:70])
def test_a_bad_line_gets_its_message(line: str, tmp_path: Path, chat: Chat) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    config = PreferenceConfig(cache=False)
    dataset = read_examples([str(path)], chat, config, encoder=PREFERENCE_ENCODER)
    assert [str(row) for row in dataset.bad] == [f"{path}:2: {BAD[line]}"]
    assert [example.source for example in dataset.examples] == [f"{path}:1"]


def test_an_annotator_speaks_once_of_a_pair(tmp_path: Path, chat: Chat) -> None:
    """All rows of the pair are bad, in the order of the file, and the rest can still be used."""
    row = {"prompt": "q", "completion_a": "x", "completion_b": "y", "annotator": 1, "verdict": "a"}
    swapped = row | {"completion_a": "y", "completion_b": "x", "annotator": "1"}
    file = str(tmp_path / "rows.jsonl")
    Path(file).write_text("\n".join(map(json.dumps, [row, {"prompt": "q"}, swapped, GOOD])))
    with pytest.raises(UserError) as caught:
        load_preferences([file], chat, PreferenceConfig(cache=False))
    message = "the annotator 1 judges the same two answers more than once"
    lines = [line.strip() for line in str(caught.value).split("\n")]
    assert lines[0] == "3 of 4 rows cannot be used:"
    assert (lines[1], lines[3]) == (f"{file}:1: {message}", f"{file}:3: {message}") and lines[2].startswith(
        f"{file}:2: "
    )
    rejected = tmp_path / "rejected.jsonl"
    config = PreferenceConfig(cache=False, on_error="skip")
    dataset = load_preferences([file], chat, config, rejected=rejected)
    assert len(dataset.examples) == 1 and [json.loads(line)["where"] for line in rejected.open()] == [
        f"{file}:{n}" for n in (1, 2, 3)
    ]


def test_rows_of_the_other_kind_are_sent_there(tmp_path: Path, chat: Chat) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}))
    with pytest.raises(UserError, match='found "messages": a row without a preference; use lowalign sft'):
        load_preferences([str(path)], chat, PreferenceConfig(cache=False))
    path.write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match='"rejected": a row of preferences; use lowalign dpo or lowalign reward'):
        load_examples([str(path)], chat, DataConfig(cache=False))


LONE = {
    '{"prompt": "q", "completion_a": "a", "completion_b": "b", "anotator": "x", "verdict": "a"}':
        'expected "annotator", found "anotator"; did you mean "annotator"?',
    '{"chosen_messages": [], "rejected_mesages": []}':
        'expected "rejected_messages", found "rejected_mesages"; did you mean "rejected_messages"?',
    '{"foo": 1}': "expected the columns of one shape (conversations + chosen + rejected, prompt + chosen + rejected, "
        "chosen_messages + rejected_messages, chosen + rejected, prompt + completion_a + completion_b + annotator + verdict, "
        'prompt + completions, prompt + completion + score, prompt + completion + label), found "foo"',
}  # fmt: skip


@pytest.mark.parametrize("line", LONE)
def test_a_file_of_one_bad_line(line: str, tmp_path: Path, chat: Chat) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    config = PreferenceConfig(cache=False)
    dataset = read_examples([str(path)], chat, config, encoder=PREFERENCE_ENCODER)
    assert [str(row) for row in dataset.bad] == [f"{path}:1: {LONE[line]}"]


def test_no_row_makes_it_fall_over(tmp_path: Path) -> None:
    """Good rows of every shape with a value somewhere in them replaced: used, bad or dropped, and every row is one."""
    ask, ho, no = ({"role": "user", "content": "hi"}, *({"role": "assistant", "content": t} for t in ("ho", "no")))
    call = {"role": "assistant", "tool_calls": [{"id": "call_1", "function": {"name": "f", "arguments": '{"a": 1}'}}]}
    good = [
        {"prompt": [ask], "chosen": [call], "rejected": no, "tools": [{"name": "f"}], "margin": 1},
        {"conversations": [{"from": "human", "value": "hi"}], "system": "s", "chosen": ho, "rejected": no},
        {"chosen_messages": [ask, ho], "rejected_messages": [ask, no]},
        {"chosen": "\n\nHuman: hi\n\nAssistant: ho", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        {"prompt": "q", "completions": ["a", [ho], no, "b"], "ranks": [0, 1, 1, 3]},
        {"prompt": "q", "completion": "a", "score": 1},
        {"prompt": [ask], "completion": ho, "label": True},
        {"prompt": "q", "completion_a": "a", "completion_b": "b", "annotator": "x", "verdict": "a"},
    ]
    odd = [
        None,
        0,
        1.5,
        True,
        "",
        "user",
        "a",
        "<|im_end|>",
        "\n\nHuman: ",
        "{",
        [],
        {},
        [[]],
        [None],
        [0, 0],
        {"name": 1},
    ]
    rng, rows = random.Random(0), []
    for number in range(1500):
        row = json.loads(json.dumps(rng.choice(good)))
        row |= {"annotator": number} if "annotator" in row else {}
        for _ in range(rng.randrange(3)):
            place, key = rng.choice(list(places(row)))
            place[key] = deepcopy(rng.choice(odd))
        rows.append(row)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for template in (made.CHATML, made.QWEN3):
        chat = Chat(made.chatml(template))
        config = PreferenceConfig(cache=False, ties="keep", max_length=25)
        dataset = read_examples([str(path)], chat, config, encoder=PREFERENCE_ENCODER)
        report = dataset.report
        assert report["used"] + len(dataset.bad) + report["dropped"] == len(rows) and report["used"] > 200
        for e in dataset.examples:
            assert len(e.prompt) + max(map(len, e.completions)) <= 25 and all(
                any(e.mask(i)) for i in range(len(e.masks))
            )
            assert e.rank is None if len(e.completions) == 1 else len(set(map(tuple, e.completions))) == len(e.rank)
