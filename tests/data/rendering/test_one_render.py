"""One rendering a row, and tokenizing many rows at once: the same Examples as row by row, with a rendering for each turn."""

import gc
import random

import pytest
from transformers import PreTrainedTokenizerFast

from lowalign.config.sections import DataConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import read_examples
from lowalign.data.pack import Example
from lowalign.data.rendering.one_render import OneRender
from lowalign.data.rendering.template import Template
from lowalign.errors import UserError
from tests.data import made, traits
from tests.data.made import FOUR

TOKENIZERS = FOUR | {
    "phi3": made.phi3,
    "open": lambda: made.chatml(made.OPEN),
    "qwen3": lambda: made.chatml(made.QWEN3),
    "system last": traits.system_last,
    "opens thoughts": lambda: made.chatml(traits.OPENS_THOUGHTS),
    "next ends": traits.next_ends,
    "one system": lambda: made.chatml(traits.ONE_SYSTEM),
    "tagged": lambda: made.chatml(traits.TAGGED),
}
TEXTS = [
    "the cat",
    " sat\n",
    "\n\nA dog.",
    "<|im_end|>",
    "</s>",
    "é💡",
    "<think>so</think> no",
    "[INST] x",
    "assistant\n",
    "1 2",
]


def conversations(count: int) -> list[list[dict]]:
    draw = random.Random(0)
    made_talks = []
    for _ in range(count):
        text = lambda: "A" + "".join(draw.choices(TEXTS, k=draw.randrange(1, 5)))  # noqa: E731
        talk = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
        for _ in range(draw.randrange(1, 4)):
            weight = {"weight": 0} if draw.random() < 0.2 else {}
            talk += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()} | weight]
        made_talks.append(talk)
    return made_talks


def results(chat: Chat, talks: list[list[dict]]) -> list[list[Example] | str]:
    examples = []
    for talk in talks:
        try:
            examples.append(chat.example(talk))
        except UserError as error:
            examples.append(str(error))
    return examples


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_same_as_row_by_row(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, talks = TOKENIZERS[kind](), conversations(60)
    chat = Chat(tokenizer)
    with chat.prepared([(talk, None) for talk in talks], []):
        together = results(chat, talks)
    monkeypatch.setattr(OneRender, "pieces", lambda self, messages: None)
    slow = Chat(tokenizer)
    assert together == results(slow, talks)
    assert chat.notes == slow.notes


def _renders(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> float:
    """Renderings a row of conversations of four turns, once the template is known."""
    chat = Chat(tokenizer)
    talk = [{"role": role, "content": f"{role} {k}"} for k in range(4) for role in ("user", "assistant")]
    chat.example(talk)
    count, render = [], Template.render
    monkeypatch.setattr(Template, "render", lambda *args, **more: count.append(1) or render(*args, **more))
    for k in range(5):
        chat.example([*talk[:-1], {"role": "assistant", "content": f"{k}"}])
    return len(count) / 5


def test_one_rendering_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _renders(made.chatml(), monkeypatch) == 1


def test_not_where_the_template_rewrites_earlier_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thoughts were taken out of earlier turns: found when the template was tried."""
    rewriting = made.CHATML.replace("m.content +", "(m.content if loop.last else '(' + m.content + ')') +")
    assert _renders(made.chatml(rewriting), monkeypatch) > 1


def test_texts_are_tokenized_together() -> None:
    tokenizer = FOUR["llama2"]()
    chat, texts = Chat(tokenizer), ["The cat", " sat </s>", "é"]
    alone = [chat.completion(texts[0], text) for text in texts] + [chat.document(text) for text in texts]
    with chat.prepared([], texts):
        together = [chat.completion(texts[0], text) for text in texts] + [chat.document(text) for text in texts]
    assert together == alone


def test_the_garbage_collector_is_on_again() -> None:
    with pytest.raises(UserError):
        read_examples(["no such file.jsonl"], Chat(made.chatml()), DataConfig(cache=False))
    assert gc.isenabled()


def test_equal_ids_are_one_object() -> None:
    """So a list of ids takes 8 bytes a token, not 36."""
    big = made.bytes_tokenizer([f"<{k}>" for k in range(400)] + ["<|im_end|>"], made.CHATML, eos_token="<|im_end|>")
    chat = Chat(big)
    first, second = (chat.completion("q", text).completions[0] for text in ("the cat", "the cat sat"))
    assert first[0] > 256 and first[0] is second[0]
