"""Which tokens of a conversation are supervised, against stock rendering and the words of the conversation itself."""

import json
import random
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lowalign.config.sections import DataConfig
from lowalign.data.chat import Chat, load_chat
from lowalign.data.dataset import load_examples
from lowalign.data.pack import Example
from lowalign.data.rendering.renderer import TURNS_NOTE
from lowalign.data.rendering.variants import CALLS_NOTE, JOINED_NOTE, SYSTEM_NOTE, TOOLS_NOTE
from lowalign.data.rows.sft_rows import SFT_ROWS
from lowalign.data.rows.time_limit import time_limit
from lowalign.data.rows.turns import read_tools, read_turns
from lowalign.errors import UserError
from tests.data import made
from tests.data.made import FOUR, WEATHER, weather_call

END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": "</s>", "gemma": "<end_of_turn>"}


def turn(role: str, content: str, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def spans(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The supervised stretches, decoded."""
    spans_ids, ids = [[]], example.completions[0]
    for i, supervised in zip(ids, example.mask(0), strict=True):
        if supervised:
            spans_ids[-1].append(i)
        elif spans_ids[-1]:
            spans_ids.append([])
    return [tokenizer.decode(span) for span in spans_ids if span]


def all_ids(example: Example) -> list[int]:
    return example.prompt + example.completions[0]


TALK = [
    turn("user", "What is in the box?"),
    turn("assistant", "Nothing."),
    turn("user", "And now?"),
    turn("assistant", "A cat: the cat"),
]


@pytest.mark.parametrize("kind", FOUR)
def test_several_turns(kind: str) -> None:
    """Spans are the answers with their end; the ids are those of the stock tokenizer on the stock rendering."""
    tokenizer = FOUR[kind]()
    chat = Chat(tokenizer)
    (example,) = chat.example(TALK)
    space = " " if kind == "llama2" else ""
    expected = [f"{m['content']}{space}{END[kind]}" for m in TALK[1::2]]
    assert [span.removeprefix(space) for span in spans(example, tokenizer)] == expected
    stock = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    while stock[-1] != chat.end_of_turn:  # the "\n" after the last turn
        stock.pop()
    assert all_ids(example) == stock
    assert example.prompt == tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode([chat.end_of_turn]) == END[kind]
    assert not chat.notes


@pytest.mark.parametrize("kind", FOUR)
def test_training_and_generation_see_the_same_tokens(kind: str) -> None:
    """prompt_ids of the messages before each answer are the ids before that answer in training."""
    tokenizer = FOUR[kind]()
    chat = Chat(tokenizer)
    (example,) = chat.example(TALK)
    ids, supervised = all_ids(example), [False] * len(example.prompt) + example.mask(0)
    begins = [i for i in range(1, len(ids)) if supervised[i] and not supervised[i - 1]]
    assert [chat.prompt_ids(TALK[:1]), chat.prompt_ids(TALK[:3])] == [ids[:i] for i in begins]


def test_the_default_is_chatml() -> None:
    """It reads as stock ChatML, ends turns with a token there is, and leaves the vocabulary as it was."""
    with_token, without = made.chatml(None), made.bytes_tokenizer(["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    for tokenizer, end in ((with_token, "<|im_end|>"), (without, "</s>")):
        before = dict(tokenizer.get_vocab())
        chat = Chat(tokenizer)
        (example,) = chat.example(TALK)
        expected = made.chatml().apply_chat_template(TALK, tokenize=False).replace("<|im_end|>", end)
        assert tokenizer.decode(all_ids(example)) == expected.removesuffix("\n")
        assert spans(example, tokenizer) == [m["content"] + end for m in TALK[1::2]]
        assert tokenizer.get_vocab() == before and tokenizer.chat_template is None
        # What is written beside an adapter renders the same in stock transformers.
        assert tokenizer.apply_chat_template(TALK, tokenize=False, chat_template=chat.template) == expected


@pytest.mark.parametrize("template", [None, made.CHATML, made.LLAMA3, "{{ bos_token }}" + made.LLAMA3])
@pytest.mark.parametrize("bos_first", [True, False])
def test_bos_stands_once_where_it_is_asked_for(template: str | None, bos_first: bool) -> None:
    special = ["<s>", "</s>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = made.bytes_tokenizer(special, template, bos_first=bos_first, bos_token="<s>", eos_token="</s>")
    chat = Chat(tokenizer)
    # As apply_chat_template: bos only where the template writes it; the default one does if the tokenizer has one in front.
    expected = (bos_first and template is None) or made.LLAMA3 in (template or "")
    for ids in (all_ids(chat.example(TALK)[0]), chat.prompt_ids(TALK[:1])):
        assert ids.count(tokenizer.bos_token_id) == expected
        assert (ids[0] == tokenizer.bos_token_id) == expected
    for example in (chat.completion("the cat", " sat"), chat.document("the cat sat")):
        assert all_ids(example).count(tokenizer.bos_token_id) == bos_first
        assert all_ids(example) == [*tokenizer("the cat sat")["input_ids"], tokenizer.eos_token_id]


def test_plain_text_goes_without_template() -> None:
    tokenizer = FOUR["llama2"]()
    chat = Chat(tokenizer)
    example = chat.completion("The cat", " sat on the mat")
    assert example.prompt == tokenizer("The cat")["input_ids"] == chat.text_ids("The cat")
    assert all_ids(example) == [*tokenizer("The cat sat on the mat")["input_ids"], tokenizer.eos_token_id]
    assert spans(example, tokenizer) == [" sat on the mat</s>"]
    without = made.bytes_tokenizer(["</s>"], eos_token="</s>")
    assert Chat(without).document("a cat").prompt == []


def test_weights_and_opening_turns() -> None:
    tokenizer = made.chatml()
    chat = Chat(tokenizer)
    skipped = [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:], turn("user", "bye"), turn("assistant", "no", weight=0)]
    (example,) = chat.example(skipped)
    assert spans(example, tokenizer) == ["A cat: the cat<|im_end|>"]
    assert example.prompt == chat.prompt_ids(TALK[:3]) and len(example.completions[0]) == example.supervised
    opening = [turn("assistant", "hello"), *TALK[:2], turn("assistant", "No, wait."), turn("user", "what?")]
    (example,) = chat.example(opening)
    assert spans(example, tokenizer) == ["Nothing.<|im_end|>", "No, wait.<|im_end|>"]
    assert "hello" in tokenizer.decode(example.prompt)
    assert tokenizer.decode(example.completions[0]).endswith("No, wait.<|im_end|>")
    with pytest.raises(UserError, match="its only assistant turn is the first turn"):
        chat.example([turn("assistant", "hello")])


def test_strict_templates_get_turns_in_turn() -> None:
    tokenizer = FOUR["gemma"]()
    chat = Chat(tokenizer)
    (example,) = chat.example(
        [
            turn("assistant", "hello"),
            turn("user", "a"),
            turn("user", "b"),
            turn("assistant", "c"),
            turn("assistant", "d"),
        ]
    )
    assert tokenizer.decode(all_ids(example)) == (
        "<bos><start_of_turn>user\na\n\nb<end_of_turn>\n<start_of_turn>model\nc\n\nd<end_of_turn>"
    )
    (example,) = chat.example([turn("system", "s"), turn("user", "a"), turn("assistant", "b")])
    assert tokenizer.decode(example.prompt) == "<bos><start_of_turn>user\ns\n\na<end_of_turn>\n<start_of_turn>model\n"
    assert chat.notes == {JOINED_NOTE: 1, SYSTEM_NOTE: 1}


def test_rewritten_history_gives_an_example_for_each_turn() -> None:
    """Qwen3 takes the thoughts out of earlier turns: each answer is supervised after the history as it will be seen."""
    tokenizer = made.chatml(made.QWEN3)
    chat = Chat(tokenizer)
    talk = [
        turn("user", "a"),
        turn("assistant", "<think>\nhm\n</think>\nb"),
        turn("user", "c"),
        turn("assistant", "<think>\nso\n</think>\nd"),
    ]
    first, second = chat.example(talk)
    assert spans(first, tokenizer) == ["<think>\nhm\n</think>\nb<|im_end|>"]
    assert spans(second, tokenizer) == ["<think>\nso\n</think>\nd<|im_end|>"]
    assert first.prompt == chat.prompt_ids(talk[:1]) and second.prompt == chat.prompt_ids(talk[:3])
    assert "hm" not in tokenizer.decode(second.prompt) and chat.notes == {TURNS_NOTE: 1}
    (example,) = chat.example([talk[0], turn("assistant", "b"), talk[2], turn("assistant", "d")])
    assert spans(example, tokenizer) == ["b<|im_end|>", "d<|im_end|>"]


def test_what_follows_the_last_turn_is_left_out() -> None:
    """Phi-3 puts eos behind the conversation; a turn ends with <|end|> all the same."""
    tokenizer = made.phi3()
    chat = Chat(tokenizer)
    (example,) = chat.example(TALK)
    assert tokenizer.decode([chat.end_of_turn]) == "<|end|>"
    assert spans(example, tokenizer) == ["Nothing.<|end|>", "A cat: the cat<|end|>"]
    assert tokenizer.eos_token_id not in all_ids(example)


def test_a_template_that_closes_no_turn_gets_eos() -> None:
    tokenizer = made.chatml(made.OPEN, eos_token="<|endoftext|>")
    chat = Chat(tokenizer)
    (example,) = chat.example(TALK)
    assert chat.end_of_turn == tokenizer.eos_token_id
    assert spans(example, tokenizer) == ["Nothing.<|endoftext|>", "A cat: the cat<|endoftext|>"]
    assert tokenizer.decode(example.prompt) == "### user:\nWhat is in the box?\n\n### assistant:\n"


TOOL_TALK = [
    {"role": "user", "content": "Weather in Graz?"},
    {"role": "assistant", "content": None, "tool_calls": [weather_call("Graz")]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    {"role": "assistant", "content": "It is sunny."},
]


@pytest.mark.parametrize("kind", ["tools", "llama3", "chatml", "gemma", "llama2"])
def test_tools(kind: str) -> None:
    """The call and the answer are supervised, the result is not; templates without tools get them as text."""
    tokenizer = made.chatml(made.CHATML_TOOLS) if kind == "tools" else FOUR[kind]()
    chat = Chat(tokenizer)
    messages, tools = read_turns(TOOL_TALK, "messages"), read_tools([WEATHER])
    (example,) = chat.example(messages, tools)
    call = '{"name": "weather", "arguments": {"city": "Graz"}}'
    expected = {
        "tools": [f"<tool_call>\n{call}\n</tool_call><|im_end|>", "It is sunny.<|im_end|>"],
        "llama3": [f"{call}<|eom_id|>", "It is sunny.<|eot_id|>"],
        "chatml": [f"{call}<|im_end|>", "It is sunny.<|im_end|>"],
        "gemma": [f"{call}<end_of_turn>", "It is sunny.<end_of_turn>"],
        "llama2": [f"{call} </s>", "It is sunny. </s>"],
    }
    assert [span.lstrip(" ") for span in spans(example, tokenizer)] == expected[kind]
    text = tokenizer.decode(all_ids(example))
    assert "Weather of a city." in tokenizer.decode(example.prompt) and "sun" in text
    assert (TOOLS_NOTE in chat.notes) == (kind not in ("tools", "llama3"))
    assert chat.prompt_ids(messages[:3], tools) == all_ids(example)[: len(chat.prompt_ids(messages[:3], tools))]


def test_calls_a_template_refuses_become_text() -> None:
    """Llama 3.1 takes one call at a time."""
    tokenizer = FOUR["llama3"]()
    chat = Chat(tokenizer)
    talk = [TOOL_TALK[0], TOOL_TALK[1] | {"tool_calls": [weather_call("Graz"), weather_call("Linz")]}, *TOOL_TALK[2:]]
    (example,) = chat.example(read_turns(talk, "messages"), read_tools([WEATHER]))
    call = '{{"name": "weather", "arguments": {{"city": "{}"}}}}'
    assert spans(example, tokenizer)[0] == "\n".join(map(call.format, ("Graz", "Linz"))) + "<|eot_id|>"
    assert chat.notes == {CALLS_NOTE: 1}


TOKENIZERS = {
    "pad is eos": lambda: made.chatml(pad_token="<|im_end|>"),
    "no pad": lambda: made.bytes_tokenizer(["<|im_start|>", "<|im_end|>"], made.CHATML, eos_token="<|im_end|>"),
    "eos is not the end of turn": lambda: made.chatml(eos_token="<|endoftext|>", pad_token="<|endoftext|>"),
    "no template, no chat tokens": lambda: made.bytes_tokenizer(["</s>"], eos_token="</s>", pad_token="</s>"),
    "several eos": FOUR["llama3"],
    "sentencepiece": FOUR["llama2"],
    "gemma": FOUR["gemma"],
    "phi3": made.phi3,
    "not closed": lambda: made.chatml(made.OPEN),
    "one turn each": lambda: made.chatml(made.QWEN3),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_supervised_turn_ends_in_one_end_of_turn(kind: str) -> None:
    """Whatever pad and eos are, and whatever the texts say: one end of turn each, in last place, never masked."""
    tokenizer = TOKENIZERS[kind]()
    chat = Chat(tokenizer)
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    rng = random.Random(0)
    words = ["the cat", "\n", "  ", "é", "💡", "</s>", "<|im_end|>", "<|endoftext|>", "<eos>", "<think>x</think>", "."]
    for _ in range(40):
        text = lambda: "A" + "".join(rng.choices(words, k=rng.randrange(6)))  # noqa: E731
        talk = [turn(role, text()) for _ in range(rng.randrange(1, 4)) for role in ("user", "assistant")]
        examples = chat.example(talk)
        ends = 0
        for example in examples:
            ids, mask = example.completions[0], example.mask(0)
            assert mask[-1] and ids[-1] == chat.end_of_turn
            for i, supervised in enumerate(mask):
                if supervised and ids[i] in special:
                    ends += 1
                    assert ids[i] == chat.end_of_turn and not (i + 1 < len(mask) and mask[i + 1])
        assert ends == len(talk) // 2
    for example in (chat.completion("the cat", " sat"), chat.document("the cat")):
        assert example.completions[0][-1] == tokenizer.eos_token_id and example.mask(0)[-1]
        assert sum(i in special for i in example.completions[0]) == 1


def test_templates_that_cannot_be_used(tmp_path: Path) -> None:
    tokenizer = made.chatml()
    for template, message in (
        ("{% for m in messages %}", "the chat template cannot render it: Unexpected end of template"),
        ("{{ messages[0].content }}", "the chat template does not render the text of the user or of the assistant"),
        ("{{ raise_exception('not today') }}", "the chat template cannot render it: not today"),
        ("{{ ''.__class__.__mro__ }}", "the chat template cannot render it: access to attribute '__class__'"),
    ):
        with pytest.raises(UserError) as caught:
            Chat(tokenizer, template)
        assert message in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        load_chat(tokenizer, DataConfig(template=tmp_path / "none.jinja"))
    (tmp_path / "open.jinja").write_text(made.OPEN)
    assert load_chat(tokenizer, DataConfig(template=tmp_path / "open.jinja")).template == made.OPEN
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Chat(made.bytes_tokenizer(["<s>"], bos_token="<s>"))


def test_templates_by_name() -> None:
    """Of several templates the default is used, and `tool_use` for rows with tools."""
    tokenizer = made.chatml({"default": made.CHATML, "tool_use": made.CHATML_TOOLS})
    chat = Chat(tokenizer)
    assert chat.template == made.CHATML
    (example,) = chat.example(read_turns(TOOL_TALK, "messages"), read_tools([WEATHER]))
    assert "# Tools" in tokenizer.decode(example.prompt) and not chat.notes
    with pytest.raises(UserError, match="several chat templates"):
        Chat(made.chatml({"rag": made.CHATML}))


def test_a_written_date_is_always_the_same() -> None:
    dated = "{{ date_string }}\n" + made.CHATML
    assert "26 Jul 2024" in made.chatml().decode(Chat(made.chatml(), dated).prompt_ids(TALK[:1]))


def test_conversational_prompts_are_not_supervised() -> None:
    tokenizer = made.chatml()
    columns = {"prompt": TALK[:3], "completion": TALK[3:]}
    row = SFT_ROWS.parse(columns)
    (example,) = Chat(tokenizer).example(row.messages, row.tools)
    assert spans(example, tokenizer) == ["A cat: the cat<|im_end|>"]


def test_only_the_last_turn_is_learned(tmp_path: Path) -> None:
    turns = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    turns += [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f", "weight": 0}]
    file, tokenizer = tmp_path / "rows.jsonl", made.chatml()
    file.write_text(json.dumps({"messages": turns}))
    texts = {}
    for option in ("all", "last"):
        data = load_examples([str(file)], Chat(tokenizer), DataConfig(turns=option, cache=False))
        (example,) = data.examples
        learned = [i for i, own in zip(example.completions[0], example.mask(0), strict=True) if own]
        texts[option] = tokenizer.decode(learned)
    assert texts == {"all": "b<|im_end|>d<|im_end|>", "last": "d<|im_end|>"}


def test_a_template_that_loops_for_ever_is_stopped() -> None:
    endless = "{% for i in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(UserError, match="the chat template does not end: it ran for more than 2 seconds"):
        Chat(made.chatml(endless))
    assert time.monotonic() - started < 5


def test_a_template_that_loops_on_a_row_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after the same time for each of a million rows."""
    monkeypatch.setattr("lowalign.data.rendering.template.time_limit", lambda: time_limit(0.2))
    endless = "{% for i in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
    chat = Chat(made.chatml("{% if 'loop' in messages[0].content %}" + endless + "{% endif %}" + made.CHATML))
    file, started = tmp_path / "rows.jsonl", time.monotonic()
    turns = [turn("user", "loop"), turn("assistant", "b")]
    file.write_text((json.dumps({"messages": turns}) + "\n") * 500)
    with pytest.raises(UserError, match="the chat template does not end"):
        load_examples([str(file)], chat, DataConfig(cache=False))
    assert time.monotonic() - started < 5
