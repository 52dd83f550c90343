"""The tiny world: the score against values worked out by hand, the rows, and the base that is shipped."""

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowalign.demo
from lowalign.demo import grammar, world

BASE = Path(lowalign.demo.__file__).parent / "base"
INSTRUCTION = "Write a postcard from Lisbon."


def card(body: str) -> str:
    return f"Dear Anna,\nGreetings from Lisbon. {body}\nLove, Tom"


@pytest.mark.parametrize(
    ("text", "cheerful", "place"),
    [
        # (1 + 0.75 + 0.5) / 3
        (card("The harbour is wonderful. The tea is nice. Our room was plain."), 0.75, 1.0),
        # (0.25 + 0 + 1 + 1) / 4
        (
            card("The tea is dull. Our day was miserable. Lisbon is glorious this spring. The river is splendid."),
            0.5625,
            1,
        ),
        # one sentence three times: it counts once, (1 + 0 + 0) / 3
        (card("The harbour is wonderful. The harbour is wonderful. The harbour is wonderful."), 1 / 3, 1.0),
        # two sentences are divided by three
        (card("The harbour is wonderful. The tea is wonderful."), 2 / 3, 1.0),
        # the seventh and eighth count 0: 6 / 8
        (card(" ".join(f"The {sight} is splendid." for sight in grammar.SIGHTS[:8])), 0.75, 1.0),
        # not of the grammar: "tea are", three moods in a row, cut off in the middle; (1 + 0 + 0 + 0) / 4
        (card("The tea is good good. The tea are nice. The view is glorious. The bread is wonder"), 0.25, 1.0),
        # another place besides
        (card("We find Oslo wonderful so far. The tea is wonderful. Our day was wonderful."), 1.0, 0.5),
        # only another place
        ("Dear Ben,\nHello from Oslo. The tea is fine. Our day was fine. The view is fine.\nYours, Ida", 0.75, 0.0),
        # a second greeting and opening are repeats: (1 + 1 + 0 + 0 + 1) / 5
        (
            card(
                "The tea is wonderful. Our day was wonderful.\nDear Anna,\nGreetings from Lisbon. The view is wonderful."
            ),
            0.6,
            1,
        ),
        # the name of a place inside another word does not name it
        ("The Lisboners are wonderful company.", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_score_by_hand(text, cheerful, place):
    score = world.score(INSTRUCTION, text, stopped=True)
    assert score.cheerful == pytest.approx(cheerful, abs=1e-12)
    assert (score.place, score.stopped) == (place, 1.0)
    assert score.total == pytest.approx(cheerful / 2 + place / 4 + 1 / 4, abs=1e-12)
    assert world.score(INSTRUCTION, text, stopped=False).total == pytest.approx(cheerful / 2 + place / 4, abs=1e-12)


def test_score_takes_messages_and_refuses_other_prompts():
    text = card("The harbour is wonderful. The tea is nice. Our room was plain.")
    assert world.score([{"role": "user", "content": INSTRUCTION}], text, True) == world.score(INSTRUCTION, text, True)
    for wrong in ("Write a postcard.", "Write a postcard from Lisbon or Oslo."):
        with pytest.raises(ValueError, match="exactly one place"):
            world.score(wrong, text, True)


def test_held_out_prompts_are_new_in_place_and_in_phrasing():
    def parts(split):
        contents = [messages[-1]["content"] for messages in world.prompts(1000, 0, split)]
        places = {place for content in contents for place in world.PLACES if place in re.findall(r"\w+", content)}
        return set(contents), places, {re.sub("|".join(world.PLACES), "{}", content) for content in contents}

    train, held_out = parts("train"), parts("held_out")
    assert [len(part) for part in train] == [384, 48, 8]  # 48 places in 8 phrasings
    assert [len(part) for part in held_out] == [64, 16, 4]
    assert all(seen.isdisjoint(new) for seen, new in zip(train, held_out, strict=True))


def test_no_prompt_comes_twice_before_all_came_once():
    counts = Counter(messages[-1]["content"] for messages in world.prompts(128, 3, "held_out"))
    assert set(counts.values()) == {2}


@pytest.mark.parametrize("rows", [world.prompts, world.sft_rows, world.ranking_rows])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_rows_are_a_function_of_the_seed(rows, split):
    assert rows(20, 5, split) == rows(20, 5, split)
    assert rows(20, 5, split) != rows(20, 6, split)


def test_pages_are_a_function_of_the_seed_without_chat_format():
    pages = world.pretraining_text(300, 1)
    assert pages == world.pretraining_text(300, 1) != world.pretraining_text(300, 2)
    instructions = {
        messages[-1]["content"] for split in ("train", "held_out") for messages in world.prompts(999, 0, split)
    }
    assert not [page for page in pages if "<|" in page or any(text in page for text in instructions)]


def test_sft_answers_are_postcards_from_the_place_in_every_mood():
    scores = [world.score(row["messages"][:1], row["messages"][1]["content"], True) for row in world.sft_rows(800, 0)]
    assert {(score.place, score.stopped) for score in scores} == {(1.0, 1.0)}
    # Moods are drawn evenly from five, 0 to 1, and their neighbours: mean 0.5, standard error about 0.01.
    assert sum(score.cheerful for score in scores) / len(scores) == pytest.approx(0.5, abs=0.05)
    fifths = Counter(min(int(score.cheerful * 5), 4) for score in scores)
    assert min(fifths[fifth] for fifth in range(5)) > 80


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_rankings_are_ordered_by_the_score(split):
    for row in world.ranking_rows(200, 0, split):
        totals = [world.score(row["prompt"], text, stopped=True).total for text in row["completions"]]
        assert len(totals) == 4 and all(world.requested_place(row["prompt"]) in text for text in row["completions"])
        assert all(better >= worse + world.MIN_GAP - 1e-9 for better, worse in itertools.pairwise(totals))


def test_shipped_base_is_small_and_loads():
    files = {file.name: file.stat().st_size for file in BASE.iterdir()}
    assert set(files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    assert sum(files.values()) <= 4_000_000
    model, report = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert linears and not [m for m in linears if m.in_features % 64 or m.out_features % 64]


def test_shipped_base_has_learned_the_pages():
    """Its loss per token on new pages is far below log(1024) = 6.9, that of a model that knows nothing."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    losses = []
    for page in world.pretraining_text(20, 99):
        ids = tokenizer(page, return_tensors="pt").input_ids[:, :128]
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert sum(losses) / len(losses) < 1.5


def test_shipped_tokenizer_keeps_every_character():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    contents = [m["content"] for split in ("train", "held_out") for ms in world.prompts(999, 0, split) for m in ms]
    for text in (*world.pretraining_text(300, 2), *contents, *grammar.CHEERFULNESS, "Grüße aus Zürich 🙂\t\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_shipped_special_tokens_are_distinct_and_end_the_turn():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ends = AutoModelForCausalLM.from_pretrained(BASE).generation_config.eos_token_id
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, end_of_turn}) == 4
    assert set(ends) == {tokenizer.eos_token_id, end_of_turn}


def test_chat_template_renders():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    messages = [{"role": "user", "content": INSTRUCTION}, {"role": "assistant", "content": "Dear Anna,"}]
    prompt = f"<|bos|><|im_start|>user\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == prompt
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt + "Dear Anna,<|im_end|>\n"
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in ("<|bos|>", "<|im_start|>")] == [1, 2]
