"""What a string means as a prompt: the same for all verbs."""

import json

import pytest

from lowalign.config.sections import DataConfig, PreferenceConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import load_examples
from lowalign.data.preferences import load_preferences
from lowalign.data.prompt_format import check_prompt_format, formats_of
from lowalign.data.prompts import distinct_prompts
from lowalign.errors import UserError
from tests.tiny import tiny_tokenizer

ROWS = {
    "sft": {"prompt": "Who jumps?", "completion": "The fox."},
    "pairs": {"prompt": "Who jumps?", "chosen": "The fox.", "rejected": "The dog."},
    "ranking": {"prompt": "Who jumps?", "completions": ["The fox.", "The dog."]},
    "labels": {"prompt": "Who jumps?", "completion": "The fox.", "label": True},
    "verdicts": {"prompt": "Who jumps?", "completion_a": "The fox.", "completion_b": "The dog.", "annotator": 1, "verdict": "a"},
}  # fmt: skip


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("prompt_format", [None, "text", "chat"])
def test_a_string_prompt_is_the_same_tokens_for_every_verb(tmp_path, prompt_format):
    """PPO and best-of-n read it as a turn of the user where sft, reward and dpo had trained on plain text."""
    chat = Chat(tiny_tokenizer())
    turns = [{"role": "user", "content": "Who jumps?"}, {"role": "assistant", "content": "The fox."}]
    (as_chat,) = chat.example(turns)
    as_text = chat.completion("Who jumps?", "The fox.")
    want = as_chat if prompt_format == "chat" else as_text
    assert as_chat.prompt != as_text.prompt
    for name, row in ROWS.items():
        file = write(tmp_path / f"{name}.jsonl", row)
        load, config = (load_examples, DataConfig) if name == "sft" else (load_preferences, PreferenceConfig)
        data = load([file], chat, config(cache=False, prompt_format=prompt_format))
        (example,) = data.examples
        assert (example.prompt, example.completions[0]) == (want.prompt, want.completions[0]), name
        assert data.report["prompt_formats"] == {prompt_format or "text": 1}
        (prompt,) = distinct_prompts([file], chat, None, 100, prompt_format)
        assert prompt[1] == want.prompt, name
        assert formats_of([prompt[0].prompt]) == {prompt_format or "text"}


@pytest.mark.parametrize("prompt_format", ["text", "chat"])
def test_messages_are_turns_in_any_case(tmp_path, prompt_format):
    chat = Chat(tiny_tokenizer())
    turns = [{"role": "user", "content": "Who jumps?"}, {"role": "assistant", "content": "The fox."}]
    file = write(tmp_path / "rows.jsonl", {"messages": turns}, {"text": "A document."})
    data = load_examples([file], chat, DataConfig(cache=False, prompt_format=prompt_format))
    assert data.examples[0].prompt == chat.example(turns)[0].prompt
    assert data.report["prompt_formats"] == {"chat": 1}  # a document has no prompt


def test_an_empty_prompt_is_no_turn(tmp_path):
    chat = Chat(tiny_tokenizer())
    file = write(tmp_path / "rows.jsonl", {"prompt": "", "completion": "The fox."})
    assert load_examples([file], chat, DataConfig(cache=False)).examples
    with pytest.raises(UserError, match=r'rows.jsonl:1: "prompt" is empty; as a turn of the user it needs a text'):
        load_examples([file], chat, DataConfig(cache=False, prompt_format="chat"))


@pytest.mark.parametrize(
    ("trained", "formats", "message"),
    [
        ("chat", {"chat"}, None),
        ("chat", set(), None),
        (None, {"text"}, None),
        ("mixed", {"text", "chat"}, None),
        ("chat", {"text"}, "runs/a was trained on turns of a chat, and these prompts are plain text. A string is plain text; --data.prompt-format chat makes it a turn"),
        ("text", {"chat", "text"}, "runs/a was trained on plain text, and these prompts are turns of a chat. Write prompts and answers as strings, without --data.prompt-format chat"),
    ],
)  # fmt: skip
def test_what_an_adapter_was_trained_on(trained, formats, message):
    if message is None:
        return check_prompt_format("runs/a", trained, formats)
    with pytest.raises(UserError) as error:
        check_prompt_format("runs/a", trained, formats)
    assert str(error.value) == message
