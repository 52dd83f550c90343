"""Chat templates with the traits of published ones: nothing is lost without a word, and native formats are kept."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.data.rendering.lost import Lossy
from lowalign.data.rendering.renderer import KEPT_NOTE, TURNS_NOTE, ChatOptions
from lowalign.data.rendering.variants import DESCRIBED_NOTE, IDS_NOTE, TOOLS_NOTE
from lowalign.data.rows.turns import read_tools, read_turns
from lowalign.errors import UserError
from tests.data import made, traits
from tests.data.made import WEATHER, weather_call

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sun"}
CALL = '{"name": "weather", "arguments": {"city": "Graz"}}'


def said(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def calls(text: str | None = None, count: int = 1, **more: object) -> dict:
    cities = ("Graz", "Linz")[:count]
    return {"role": "assistant", "content": text, "tool_calls": [weather_call(city) for city in cities], **more}


def marked(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text, with the supervised stretches in «»."""
    text, before = tokenizer.decode(example.prompt), False
    spans: list[tuple[bool, list[int]]] = []
    for i, supervised in zip(example.completions[0], example.masks[0], strict=True):
        if not spans or supervised != before:
            spans.append((supervised, []))
        spans[-1][1].append(i)
        before = supervised
    for supervised, ids in spans:
        text += f"«{tokenizer.decode(ids)}»" if supervised else tokenizer.decode(ids)
    return text


def examples(
    tokenizer: PreTrainedTokenizerFast, turns: list[dict], tools: bool = False, **options: object
) -> tuple[list[str], Chat]:
    """-> the Examples of the conversation, marked, and the Chat."""
    chat = Chat(tokenizer, options=ChatOptions(**options))
    made_examples = chat.example(read_turns(turns, "messages"), read_tools([WEATHER]) if tools else None)
    return [marked(example, tokenizer) for example in made_examples], chat


# 1: what a template leaves out is named; an answer that loses its text is not learned


@pytest.mark.parametrize(
    "tokenizer, turns, tools, lost",
    [
        (
            made.llama3(),
            [USER, calls("Let me look."), RESULT, said("Sunny.")],
            True,
            "the text of an assistant turn with calls",
        ),
        (made.chatml(traits.ONE_CALL), [USER, calls(count=2), RESULT], True, "a second call of a turn"),
        (
            made.chatml(),
            [USER, said("Sunny.", reasoning_content="It is June.")],
            False,
            "the thoughts of an assistant turn",
        ),
        (
            made.chatml(traits.chatml("{{ m.content.split('</think>')[-1] }}")),
            [USER, said("<think>\nIt is June.\n</think>\nSunny.")],
            False,
            "the thoughts of an assistant turn",
        ),
    ],
)
def test_an_answer_that_a_template_cuts_is_dropped_or_noted(
    tokenizer: PreTrainedTokenizerFast, turns: list[dict], tools: bool, lost: str
) -> None:
    with pytest.raises(Lossy, match=f"the chat template leaves out {lost}, which is to be learned"):
        examples(tokenizer, turns, tools)
    _, chat = examples(tokenizer, turns, tools, lossy="keep")
    assert chat.notes[f"the chat template leaves out {lost}"] == 1
    assert TOOLS_NOTE not in chat.notes


def test_a_lost_system_turn_is_counted() -> None:
    later = {"role": "system", "content": "Now in verse."}
    (text,), chat = examples(made.chatml(traits.ONE_SYSTEM), [SYSTEM, USER, said("a"), later, USER, said("b")])
    assert "Be brief." in text and "verse" not in text
    assert chat.notes == {"the chat template leaves out the text of a system turn": 1}


def test_trimmed_and_quoted_texts_are_not_lost() -> None:
    template = traits.chatml(
        "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}" + traits.CALLS
    )
    result = RESULT | {"content": 'a "b"\n\tü'}
    _, chat = examples(made.chatml(template), [USER, calls(), result, said("  A line.\n\nMore \n")], True)
    assert not chat.notes


def test_thoughts_can_be_left_out() -> None:
    turns = [USER, said("Sunny.", reasoning_content="June."), USER, said("<think>\nJuly.\n</think>\n\nHot.")]
    (text,), _ = examples(made.chatml(), turns, thoughts="none")
    assert "«Sunny.<|im_end|>»" in text and text.endswith("«Hot.<|im_end|>»") and "Ju" not in text


# 2 and 3: native formats of calls


def test_a_call_without_tools_column_is_not_an_empty_answer() -> None:
    """`default` knows no calls; the row has calls and no tools: `tool_use` writes it."""
    tool_use = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + traits.chatml("{{ m.content }}" + traits.CALLS)
    tokenizer = made.chatml({"default": made.CHATML, "tool_use": tool_use})
    turns = [USER, calls(), RESULT, said("Sunny.")]
    (text,), chat = examples(tokenizer, turns)
    assert f"«<tool_call>{CALL}</tool_call><|im_end|>»" in text and not chat.notes
    stock = tokenizer.apply_chat_template(_with_dicts(turns), tools=[], tokenize=False)
    assert stock.startswith(text.replace("«", "").replace("»", ""))


def _with_dicts(turns: list[dict]) -> list[dict]:
    return read_turns(turns, "messages")


@pytest.mark.parametrize("template", [traits.TEXT_ARGUMENTS, traits.ADDED_ARGUMENTS])
def test_arguments_as_text_where_the_template_wants_text(template: str) -> None:
    tokenizer = made.chatml(template)
    (text,), chat = examples(tokenizer, [USER, calls(), RESULT, said("Sunny.")], True)
    assert '«<tool_call>weather={"city": "Graz"}</tool_call><|im_end|>»' in text and not chat.notes


def test_ids_of_calls_are_rewritten_where_the_template_wants_nine_letters() -> None:
    (text,), chat = examples(made.chatml(traits.NINE), [USER, calls(), RESULT, said("Sunny.")], True)
    assert f"«<tool_call>call00001{CALL}</tool_call><|im_end|>»" in text
    assert chat.notes == {IDS_NOTE: 1}


def test_a_turn_rendered_otherwise_before_an_answer_keeps_native_calls() -> None:
    """Hermes-3's newline, and gpt-oss, which drops the text beside a call once it is answered."""
    first, second = examples(made.chatml(traits.NEWLINE), [USER, calls(), RESULT, said("Sunny.")], True)[0]
    assert first.endswith(f"«<tool_call>{CALL}</tool_call><|im_end|>»")
    assert second.endswith("<|im_start|>tool\nsun<|im_end|>\n<|im_start|>assistant\n«Sunny.<|im_end|>»")
    texts, chat = examples(made.chatml(traits.ONE_CALL), [USER, calls("Look."), RESULT, said("Sunny.")], True)
    assert texts[0].endswith(f"«[analysis]Look.{CALL}<|im_end|>»") and texts[1].endswith("«Sunny.<|im_end|>»")
    assert chat.notes == {TURNS_NOTE: 1}


def test_functions_are_described_where_the_template_only_writes_calls() -> None:
    tokenizer = made.chatml(traits.chatml("{{ m.content }}" + traits.CALLS).removeprefix(traits.TOOLS))
    (text,), chat = examples(tokenizer, [USER, calls(), RESULT, said("Sunny.")], True)
    assert "Weather of a city." in text and f"«<tool_call>{CALL}</tool_call><|im_end|>»" in text
    assert chat.notes == {DESCRIBED_NOTE: 1}


# 4: the system text in the last user turn


def test_a_system_text_in_the_last_user_turn() -> None:
    tokenizer = traits.system_last()
    (text,), chat = examples(tokenizer, [SYSTEM, USER, said("x")])
    assert text == "<s>[INST] Be brief.\n\nhi[/INST]«x</s>»" and not chat.notes
    turns = [SYSTEM, USER, said("x"), {"role": "user", "content": "and?"}, said("y")]
    first, second = chat.example(turns)
    assert marked(second, tokenizer) == "<s>[INST] hi[/INST]x</s>[INST] Be brief.\n\nand?[/INST]«y</s>»"
    for example, before in ((first, turns[:2]), (second, turns[:4])):
        assert example.prompt == chat.prompt_ids(before) == tokenizer.apply_chat_template(before, return_dict=False)


# 5: thinking models


def test_thoughts_opened_in_the_generation_prompt_are_closed() -> None:
    tokenizer = made.chatml(traits.OPENS_THOUGHTS)
    begin = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    for answer, learned in (
        (said("Sunny."), "\n</think>\n\nSunny."),
        (said("Sunny.", reasoning_content="June."), "June.\n</think>\n\nSunny."),
        (said("<think>\nJune.\n</think>\n\nSunny."), "June.\n</think>\n\nSunny."),
    ):
        (example,) = Chat(tokenizer).example(read_turns([USER, answer], "messages"))
        assert marked(example, tokenizer) == f"{begin}«{learned}<|im_end|>»"
        assert example.prompt == tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)


def test_arguments_of_a_template_are_part_of_it() -> None:
    tokenizer = traits.next_ends()
    (text,), chat = examples(tokenizer, [USER, said("Sunny.")], template_args=("enable_thinking=false",))
    assert text == "<|user|>hi<|assistant|></think>«Sunny.<|user|>»"
    stock = {"add_generation_prompt": True, "return_dict": False}
    expected = tokenizer.apply_chat_template([USER], enable_thinking=False, **stock)
    assert chat.prompt_ids([USER]) == expected
    assert tokenizer.apply_chat_template([USER], chat_template=chat.template, **stock) == expected
    (text,), _ = examples(tokenizer, [USER, said("Sunny.")])
    assert text == "<|user|>hi<|assistant|><think>«</think>Sunny.<|user|>»"
    written = Chat(
        made.chatml("{{ a }}|{{ b }}|{{ c }}|{{ d }}" + made.CHATML),
        options=ChatOptions(('a=x "y"', "b=3", "c=null", "d=a=b")),
    )
    assert made.chatml().decode(written.prompt_ids([USER])).startswith('x "y"|3|None|a=b<|im_start|>')
    for wrong in ("enable_thinking", "a-b=1", 'a={"b": 1}'):
        with pytest.raises(UserError, match=r"--data\.template-args"):
            Chat(tokenizer, options=ChatOptions((wrong,)))


def test_generation_tags_are_the_mask() -> None:
    tokenizer = made.chatml(traits.TAGGED)
    turns = [SYSTEM, USER, said("a"), USER, said("b", weight=0), USER, said("c")]
    (text,), chat = examples(tokenizer, turns)
    assert text.count("«") == 2 and "«a<|im_end|>»" in text and text.endswith("«c<|im_end|>»")
    stock = tokenizer.apply_chat_template(
        [SYSTEM, USER, said("a")], return_dict=True, return_assistant_tokens_mask=True
    )
    (example,) = chat.example([SYSTEM, USER, said("a")])
    ids = example.prompt + example.completions[0]
    assert ids == stock["input_ids"][: len(ids)]
    mask = [False] * len(example.prompt) + example.masks[0]
    assert mask == [bool(m) for m in stock["assistant_masks"]][: len(ids)]


# 6: ends of turns, tags in a default system text, opening answers


def test_a_tag_named_in_a_default_system_text_stays_a_token_in_answers() -> None:
    tokenizer = made.chatml(traits.ONE_SYSTEM)
    turns = [USER, said("<think>\nhm\n</think>\na")]
    (example,) = Chat(tokenizer).example(turns)
    ids = example.prompt + example.completions[0]
    assert ids == tokenizer.apply_chat_template(turns, return_dict=False)[: len(ids)]
    assert tokenizer.convert_tokens_to_ids("<think>") in example.completions[0]


def test_the_marker_of_the_next_turn_ends_a_turn_that_nothing_ends() -> None:
    tokenizer = traits.next_ends()
    turns = [USER, calls(), RESULT, said("Sunny."), USER, said("Hot.")]
    (text,), chat = examples(tokenizer, turns, template_args=("enable_thinking=false",))
    assert text == (
        f"<|user|>hi<|assistant|></think>«<tool_call>{CALL}</tool_call><|observation|>»sun<|assistant|></think>"
        "«Sunny.<|user|>»hi<|assistant|></think>«Hot.<|user|>»"
    )
    assert tokenizer.decode([chat.end_of_turn]) == "<|user|>"
    (text,), _ = examples(tokenizer, [USER, calls()], template_args=("enable_thinking=false",))
    assert text.endswith("</tool_call><|observation|>»")


def test_an_opening_answer_is_not_learned() -> None:
    (text,), _ = examples(made.chatml(), [SYSTEM, said("Welcome."), USER, said("a")])
    assert "Welcome." in text and text.count("«") == 1 and text.endswith("«a<|im_end|>»")


# 8: templates that rewrite earlier turns


@pytest.mark.parametrize("template", [made.QWEN3, traits.OPENS_THOUGHTS])
def test_thoughts_of_all_turns_in_one_example(template: str) -> None:
    tokenizer = made.chatml(template)
    turns = [turn for k in range(4) for turn in (USER, said(f"<think>\nso {k}\n</think>\n\na{k}"))]
    (text,), chat = examples(tokenizer, turns, thoughts="all")
    opened = "<think>\n" if template == traits.OPENS_THOUGHTS else ""
    learned = "«" if opened else "«<think>\n"
    expected = [
        f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{opened}{learned}so {k}\n</think>\n\na{k}<|im_end|>»"
        for k in range(4)
    ]
    assert text == "\n".join(expected) and chat.notes == {KEPT_NOTE: 1}
    several, chat = examples(tokenizer, turns)
    assert len(several) == 4 and chat.notes == {TURNS_NOTE: 1} and json.dumps(several).count("so 0") == 1
