"""Transcripts to turns, and calls out of texts."""

import json

import pytest

from lowalign.data.rows.transcripts import function_calls, json_objects, transcript


def test_speakers_whose_names_begin_alike() -> None:
    speakers = {"Human": "user", "Human 2": "system", "Assistant": "assistant"}
    assert transcript("Human 2: s\n\nHuman: a: b\n\nAssistant: c", speakers) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a: b"},
        {"role": "assistant", "content": "c"},
    ]
    with pytest.raises(ValueError, match="it does not begin with one of Human, Human 2, Assistant: 'Humans: a'"):
        transcript("Humans: a", speakers)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "say", "arguments": \'{"text": "it\\\'s"}\'}', {"text": "it's"}),  # Glaive escapes quotes so
        ('{"name": "say",\n "arguments": \'{"text": "a",\n "n": 1}\'\n}', {"text": "a", "n": 1}),
        ('{"name": "say", "arguments": {"text": "a"}}', {"text": "a"}),
    ],
)
def test_arguments_of_calls(text: str, arguments: dict) -> None:
    """JSON in single quotes stays text, which the format reads."""

    (turn,) = function_calls([{"role": "assistant", "content": f"Well. <functioncall> {text}"}])
    (call,) = turn["tool_calls"]
    found = call["arguments"]
    assert (turn["content"], call["name"]) == ("Well.", "say")
    assert (json.loads(found) if isinstance(found, str) else found) == arguments


def test_json_among_words() -> None:
    assert json_objects('Use { "a": {"b": 1} } or\n{"c": "}"}.') == [{"a": {"b": 1}}, {"c": "}"}]
    with pytest.raises(ValueError):
        json_objects('{"a": ')
