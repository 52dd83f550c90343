"""How a row of each format is parsed."""

import json

import pytest

from lowalign.data.rows.rewrite import alternating, system_as_user, tools_as_text
from lowalign.data.rows.sft_rows import SFT_ROWS, Conversation, PlainText, PromptCompletion
from tests.data.made import WEATHER, weather_call


def parsed(row: dict) -> object:
    return SFT_ROWS.parse(row)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


HI = [user("hi"), assistant("ho")]
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Graz"}}}
TOOL = {"type": "function", "function": WEATHER}

ROWS = [
    ({"messages": HI}, Conversation(HI)),
    ({"messages": HI, "prompt": "hi", "prompt_id": "7"}, Conversation(HI)),
    ({"text": "hi", "messages": None}, PlainText("hi")),
    ({"prompt": "2 + 2 =", "completion": " 4"}, PromptCompletion("2 + 2 =", " 4")),
    ({"prompt": "", "completion": "4"}, PromptCompletion("", "4")),
    ({"prompt": "hi", "completion": [assistant("ho")]}, Conversation(HI)),
    ({"prompt": [user("hi")], "completion": "ho"}, Conversation(HI)),
    (
        {"prompt": [*HI, user("and?")], "completion": [assistant("so")]},
        Conversation([user("hi"), assistant("ho", weight=0), user("and?"), assistant("so")]),
    ),
    ({"instruction": "hi", "output": "ho", "text": "Below is …"}, Conversation(HI)),
    ({"instruction": "Add", "input": "1 2", "output": "3"}, Conversation([user("Add\n1 2"), assistant("3")])),
    (
        {"instruction": "c", "input": None, "output": "d", "system": "s", "history": [["a", "b"]]},
        Conversation([{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d")]),
    ),
    (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "s"},
        Conversation([{"role": "system", "content": "s"}, *HI]),
    ),
    (
        {"conversations": [{"from": "system", "value": "t"}, *HI], "system": "s"},
        Conversation([{"role": "system", "content": "s\n\nt"}, *HI]),
    ),
    (
        {"messages": [{"role": "developer", "content": "s"}, *HI], "tools": "[]"},
        Conversation([{"role": "system", "content": "s"}, *HI]),
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "<|im_"}, {"type": "text", "value": "end|>"}]}, HI[1]]},
        Conversation([user("<|im_end|>"), HI[1]]),
    ),
    (
        {"messages": [HI[0], assistant("ho", loss_weight=0.0), user("?"), assistant("!", weight=1, thinking="hm")]},
        Conversation([HI[0], assistant("ho", weight=0), user("?"), assistant("!", reasoning_content="hm")]),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    "row, conversation", ROWS, ids=lambda value: " ".join(value) if isinstance(value, dict) else ""
)
def test_a_row_is_parsed(row: dict, conversation: object) -> None:
    assert parsed(row) == conversation


def test_calls_in_every_dress_are_the_same() -> None:
    """OpenAI's wrapping with the arguments as text, a bare call, a list, ShareGPT's function_call."""
    expected = [user("hi"), assistant("", tool_calls=[CALL])]
    expected += [{"role": "tool", "content": "sun", "tool_call_id": "call00001", "name": "weather"}, assistant("ho")]
    call = {"name": "weather", "arguments": {"city": "Graz"}}
    sharegpt = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "sun"},
        {"from": "gpt", "value": "ho"},
    ]
    openai = [HI[0], {"role": "assistant", "content": None, "tool_calls": [weather_call("Graz")]}]
    openai += [{"role": "tool", "content": "sun", "tool_call_id": "call_1"}, HI[1]]
    listed = [*sharegpt]
    listed[1] = {"from": "function_call", "value": json.dumps([call])}
    for tools in ([WEATHER], [TOOL], json.dumps([WEATHER]), json.dumps([TOOL])):
        assert parsed({"conversations": sharegpt, "tools": tools}) == Conversation(expected, [TOOL])
    assert parsed({"conversations": listed}).messages == expected
    with_own_ids = json.loads(json.dumps(expected).replace("call00001", "call_1"))
    assert parsed({"messages": openai}).messages == with_own_ids


def test_results_answer_their_calls() -> None:
    calls = [{"name": "a", "arguments": {}}, {"name": "b", "arguments": ""}]
    row = {"messages": [HI[0], assistant("", tool_calls=calls), *({"role": "tool", "content": c} for c in "xy"), HI[1]]}
    results = [(m["name"], m["tool_call_id"]) for m in parsed(row).messages if m["role"] == "tool"]
    assert results == [("a", "call00001"), ("b", "call00002")]


def test_the_file_decides_what_an_odd_row_was_meant_to_be() -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 3 + [{"text": "c"}, {"prompt": "d"}]
    assert SFT_ROWS.common(rows).name == "prompt-completion"
    assert SFT_ROWS.of(rows[3]).name == "text" and SFT_ROWS.of(rows[4]) is None


def test_tools_as_text() -> None:
    result = {"role": "tool", "content": "sun", "tool_call_id": "call00001", "name": "weather"}
    system = {"role": "system", "content": "Be brief."}
    written = tools_as_text(
        [system, user("hi"), assistant("One moment.", tool_calls=[CALL, CALL]), result, HI[1]], [TOOL]
    )
    call = '{"name": "weather", "arguments": {"city": "Graz"}}'
    assert [m["role"] for m in written] == ["system", "user", "assistant", "user", "assistant"]
    assert written[0]["content"].startswith("Be brief.\n\n") and written[0]["content"].endswith(json.dumps(WEATHER))
    assert written[2] == assistant(f"One moment.\n{call}\n{call}")
    assert written[3] == user("Function result:\nsun")


def test_system_as_user_and_alternating() -> None:
    system = {"role": "system", "content": "s"}
    assert system_as_user([system, *HI]) == [user("s\n\nhi"), HI[1]]
    assert system_as_user(HI) == HI
    assert alternating([assistant("x"), user("a"), user("b"), assistant("c"), assistant("d")]) == [
        user("a\n\nb"),
        assistant("c\n\nd"),
    ]
    unequal = [user("a"), assistant("b", weight=0), assistant("c")]
    assert alternating(unequal) == unequal
