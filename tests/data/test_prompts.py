"""Prompts out of rows of any shape."""

import json

import pytest

from lowalign.data.chat import Chat
from lowalign.data.prompts import PromptRow, prompt_ids, read_prompts
from lowalign.errors import UserError
from tests.tiny import tiny_tokenizer

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
HISTORY = [USER, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q"}, "q"),
        ({"prompt": "q", "completion": "a"}, "q"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, [USER]),
        ({"prompt": "q", "chosen": [ANSWER], "rejected": [ANSWER]}, [USER]),  # turns, as for dpo
        ({"prompt": "q", "completions": ["a", [ANSWER]]}, [USER]),
        ({"prompt": "q", "completions": [{"completion": "a", "score": 1}]}, "q"),
        ({"messages": [*HISTORY, {"role": "assistant", "content": "s"}]}, HISTORY),
        ({"messages": HISTORY}, HISTORY),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [USER]),
        (
            {"conversations": [{"from": "human", "value": "q"}], "system": "s"},
            [{"role": "system", "content": "s"}, USER],
        ),
        ({"instruction": "q", "input": "", "output": "a"}, [USER]),
        ({"instruction": "q", "input": "r"}, [{"role": "user", "content": "q\nr"}]),
        ({"instruction": "r", "history": [["q", "a"]]}, HISTORY),
        (
            {
                side: [*HISTORY, {"role": "assistant", "content": side}]
                for side in ("chosen_messages", "rejected_messages")
            },
            HISTORY,
        ),
        ({side: [USER, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}, [USER]),
        ({side: f"\n\nHuman: q\n\nAssistant: {side}" for side in ("chosen", "rejected")}, [USER]),
    ],
)
def test_the_prompt_of_a_row(row, prompt, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    strip = lambda turns: [{k: v for k, v in t.items() if k != "weight"} for t in turns]  # noqa: E731
    ((read_prompt, where, _),) = read_prompts([str(file)])
    assert (read_prompt if isinstance(prompt, str) else strip(read_prompt)) == prompt
    assert where == f"{file}:1"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, 'expected "prompt", "messages" or a row of answers or preferences, found question'),
        ({"messages": [{"role": "assistant", "content": "a"}]}, '"messages" has no turn before the answer'),
        ({"messages": [{"role": "usr", "content": "a"}]}, 'did you mean "user"?'),
        ({"prompt": 7}, '"prompt" must be a list of turns, found a number'),
        ({"prompt": None}, "found prompt"),
    ],
)
def test_a_row_without_one(row, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError) as error:
        list(read_prompts([str(file)]))
    assert str(error.value).startswith(f"{file}:2: ") and message in str(error.value)


REFUSING = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_ids():
    tokenizer = tiny_tokenizer()
    chat = Chat(tokenizer)
    assert prompt_ids(chat, PromptRow("q", "f:1")) == tokenizer("q")["input_ids"]
    assert prompt_ids(chat, PromptRow([USER], "f:1")) == chat.prompt_ids([USER])
    with pytest.raises(UserError, match="f:1: the chat template cannot render it"):
        prompt_ids(Chat(tokenizer, REFUSING), PromptRow([{"role": "user", "content": "no"}], "f:1"))
