"""Rows of preferences to Examples: every format and every rule."""

import json
from pathlib import Path

import pytest

from lowalign.config.sections import DataConfig
from lowalign.data import dataset
from lowalign.data.chat import Chat
from lowalign.data.dataset import load_examples
from lowalign.data.report import report_lines
from lowalign.errors import UserError
from tests.data import made
from tests.data.test_preferences_rules import judged, load, one, rendered, user, write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for files, with the cache inside it."""
    monkeypatch.setenv("LOWALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(made.chatml())


def assistant(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def parts(turn: dict, weight: float) -> dict:
    return turn | {"content": [{"type": "text", "value": turn["content"]}], "loss_weight": weight}


HI = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
HO, NO = "«ho<|im_end|>»", "«no<|im_end|>»"
TALK = [user("a"), assistant("b"), user("hi")]
LONG = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n" + HI
BOTH = {"chosen": "ho", "rejected": "no"}
ASKED = {"role": "system", "content": "s"}
# Each means prompt, completions and ranks as its rendering would be written by hand.
ROWS = {
    "plain text": ({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "2 + 2 =", ["« 4<|im_end|>»", "« 5<|im_end|>»"]),
    "messages": ({"prompt": [user("hi")], "chosen": [assistant("ho")], "rejected": [assistant("no")]}, HI, [HO, NO]),
    "message and text": ({"prompt": [user("hi")], **BOTH}, HI, [HO, NO]),
    "text and messages": ({"prompt": "hi", "chosen": [assistant("ho")], "rejected": [assistant("no")]}, HI, [HO, NO]),
    "one object each": ({"prompt": user("hi"), "chosen": assistant("ho"), "rejected": assistant("no")}, HI, [HO, NO]),
    "history is not supervised": ({"prompt": TALK, **BOTH}, LONG, [HO, NO]),
    "whole conversations": ({"chosen": [*TALK, assistant("ho")], "rejected": [*TALK, assistant("no")]}, LONG, [HO, NO]),
    "prompt null": ({"prompt": None, "chosen": [user("hi"), assistant("ho")], "rejected": [user("hi"), assistant("no")]}, HI, [HO, NO]),
    "prompt repeated": ({"prompt": "hi", "chosen": [user("hi"), assistant("ho")], "rejected": [user("hi"), assistant("no")]}, HI, [HO, NO]),
    "answers that begin alike": (
        {"prompt": "a", "chosen": [assistant("b"), user("hi"), assistant("ho")], "rejected": [assistant("b"), user("hi"), assistant("no")]},
        LONG, [HO, NO],
    ),
    "answers of several turns": (
        {"prompt": "hi", "chosen": [assistant("ho"), user("hi"), assistant("ho")], "rejected": [assistant("no")]},
        HI, [f"{HO}\n{HI}{HO}", NO],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "ho"}, "rejected": {"from": "gpt", "value": "no"}},
        HI, [HO, NO],
    ),
    "sharegpt with system": (
        {"conversations": [{"from": "human", "value": "hi"}], "system": "s", "chosen": {"from": "gpt", "value": "ho"}, "rejected": {"from": "gpt", "value": "no"}},
        f"<|im_start|>system\ns<|im_end|>\n{HI}", [HO, NO],
    ),
    "chosen_messages": (
        {f"{side}_messages": [parts(user("hi"), 0.0), parts(assistant(text), 1.0)] for side, text in BOTH.items()}, HI, [HO, NO],
    ),
    "transcripts": (
        {side: f"\n\nHuman: a\n\nAssistant: b\n\nHuman: hi\n\nAssistant: {text}" for side, text in BOTH.items()}, LONG, [HO, NO],
    ),
    "ranking": ({"prompt": "q", "completions": ["x", "y", "z"]}, "q", ["«x<|im_end|>»", "«y<|im_end|>»", "«z<|im_end|>»"]),
    "ranking of messages": ({"prompt": [user("hi")], "completions": ["ho", [assistant("no")]]}, HI, [HO, NO]),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_means(name: str, tmp_path: Path, chat: Chat) -> None:
    row, prompt, completions = ROWS[name]
    example = one(tmp_path, row, chat)
    assert rendered(example, chat) == (prompt, completions)
    assert example.rank == list(range(len(completions))) and example.source == f"{tmp_path}/rows.jsonl:1"
    assert (example.margin, example.label, example.weight) == (0.0, None, 1.0)


def test_the_same_prompt_as_in_sft_and_in_generation(tmp_path: Path) -> None:
    """With bos, and on a tokenizer that puts a space before every text: completions continue the ids that are sampled
    after, and each is what fine-tuning on it would see."""
    for make in made.FOUR.values():
        chat = Chat(make())
        turns = one(tmp_path, {"prompt": TALK, **BOTH}, chat)
        plain = one(tmp_path, {"prompt": "2 + 2 =", **BOTH}, chat)
        assert turns.prompt == chat.prompt_ids(TALK) and plain.prompt == chat.text_ids("2 + 2 =")
        for k, text in enumerate(BOTH.values()):
            rows = [{"prompt": TALK, "completion": text}, {"prompt": "2 + 2 =", "completion": text}]
            config = DataConfig(cache=False)
            loaded = load_examples([write(tmp_path / "sft.jsonl", rows)], chat, config)
            for example, pair in zip(loaded.examples, (turns, plain), strict=True):
                assert example.prompt == pair.prompt and example.completions == [pair.completions[k]]
                assert example.masks == [pair.masks[k]]


def test_margin_ranks_and_labels(tmp_path: Path, chat: Chat) -> None:
    assert one(tmp_path, {"prompt": "q", **BOTH, "margin": 2}, chat).margin == 2.0
    assert one(tmp_path, {"prompt": "q", **BOTH, "margin": None}, chat).margin == 0.0
    ranked = one(tmp_path, {"prompt": "q", "completions": ["x", "y", "z", "w"], "ranks": [2, 0.5, 2, 7]}, chat)
    assert ranked.rank == [1, 0, 1, 2]
    for label, expected in ((True, True), (False, False), (1, True), (0, False)):
        example = one(tmp_path, {"prompt": [user("hi")], "completion": "ho", "label": label}, chat)
        assert example.label is expected and example.rank is None and rendered(example, chat) == (HI, [HO])


def test_scores_of_a_ranking_tie_within_the_gap(tmp_path: Path, chat: Chat) -> None:
    row = {"prompt": "q", "completions": ["a", "b", "c"], "scores": [3, 5, 4.5]}
    assert one(tmp_path, row, chat).rank == [2, 0, 1]
    assert one(tmp_path, row, chat, gap=1).rank == [1, 0, 0]


def test_tools_stand_in_the_prompt(tmp_path: Path) -> None:
    chat = Chat(made.chatml(made.CHATML_TOOLS))
    calling = {"role": "assistant", "content": "", "tool_calls": [made.weather_call("Graz")]}
    row = {"prompt": [user("hi")], "tools": [made.WEATHER], "chosen": [calling], "rejected": "no"}
    prompt, (call, refusal) = rendered(one(tmp_path, row, chat), chat)
    assert "Weather of a city." in prompt and "weather" in call and '"city": "Graz"' in call and refusal == NO


def test_earlier_turns_that_a_template_rewrites(tmp_path: Path) -> None:
    """Qwen3's takes the thoughts out of them: fine as long as the answers differ in their last turn only."""
    chat = Chat(made.chatml(made.QWEN3))
    thought = assistant("<think>\nhm\n</think>\nb")
    first = {
        "prompt": "a",
        "chosen": [thought, user("hi"), assistant("ho")],
        "rejected": [thought, user("hi"), assistant("no")],
    }
    assert rendered(one(tmp_path, first, chat), chat) == (LONG, [HO, NO])
    second = first | {"rejected": [assistant("c"), user("hi"), assistant("no")]}
    with pytest.raises(
        UserError,
        match=r"rows.jsonl:1: its answers differ in several assistant turns, and the chat template rewrites earlier ones",
    ):
        one(tmp_path, second, chat)


def test_a_note_counts_rows_not_answers(tmp_path: Path) -> None:
    chat = Chat(made.gemma())
    row = {"prompt": [ASKED, user("hi")], "completions": ["x", "y", "z"]}
    (report,) = load(write(tmp_path / "rows.jsonl", [row]), chat).report["files"]
    assert list(report["notes"].values()) == [1]


def test_long_rows_share_the_cut_prompt(tmp_path: Path) -> None:
    """The longest answer decides how much of the prompt stays; every answer ends within the limit."""
    chat = Chat(made.llama3())
    row = {"prompt": [user("the cat sat on the mat and said hello")], "chosen": "no", "rejected": "What is in the box?"}
    whole = one(tmp_path, row, chat)
    short, long = whole.completions
    assert len(short) < len(long) < len(whole.prompt) and whole.prompt[0] == chat.bos_ids[0]
    limit = len(whole.prompt) + len(long)
    assert one(tmp_path, row, chat, max_length=limit) == whole
    loaded = load(write(tmp_path / "rows.jsonl", [row]), chat, max_length=limit - 3)
    (cut,) = loaded.examples
    assert cut.prompt == chat.bos_ids + whole.prompt[4:] and cut.completions == whole.completions
    assert loaded.report["files"][0]["cut"] == {"prompt": 1}
    assert f"  1 of 1 rows cut in the prompt, longest {limit} > {limit - 3} tokens" in report_lines(loaded.report)
    loaded = load(write(tmp_path / "rows.jsonl", [row]), chat, max_length=len(long) - 1)
    (cut,) = loaded.examples
    assert cut.prompt == chat.bos_ids and cut.completions == [short, long[: len(long) - 2]]
    assert loaded.report["files"][0]["cut"] == {"completion": 1} and cut.rank == [0, 1]


GOOD = {"prompt": "q", **BOTH}


def test_files_may_mix_shapes_and_be_held_to_one(tmp_path: Path, chat: Chat) -> None:
    rows = [
        GOOD,
        {"prompt": "q", "completion": "a", "label": True, "score": 1},
        {"prompt": "q", "completions": ["a", "b"]},
    ]
    file = write(tmp_path / "rows.jsonl", [*rows[::2], rows[1]])
    assert load(file, chat).report["files"][0]["shapes"] == {"pairs": 1, "ranking": 1, "scores": 1}
    labels = load(write(tmp_path / "rows.jsonl", rows[1:2]), chat, shape="labels")
    assert labels.examples[0].label is True and labels.report["files"][0]["ignored_columns"] == {"score": 1}


def test_the_cache_gives_the_same(folder: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks, margins, labels, weights and agreement come back; gap, rule and ties are part of the name."""
    judged(folder / "a.jsonl")
    rows = [GOOD | {"margin": 0.25}, {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [1, 0, 1]}]
    rows += [{"prompt": "q", "completion": "a", "label": False}]
    rows += [{"prompt": "s", "completion": c, "score": s} for c, s in (("a", 1), ("b", 2))]
    with (folder / "a.jsonl").open("a") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))
    file, options = str(folder / "a.jsonl"), {"verdicts": "weight", "ties": "keep"}
    fresh = load(file, chat, **options)
    stored = load(file, chat, cache=True, **options)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_tokenize", None)
        recalled = load(file, chat, cache=True, **options)
    assert fresh.examples == stored.examples == recalled.examples and fresh.report == stored.report == recalled.report
    assert [e.rank for e in recalled.examples] == [[0, 1], [0, 0], [0, 1], [1, 0, 1], None, [1, 0]]
    assert [e.margin for e in recalled.examples] == [0, 0, 0.25, 0, 0, 0]
    assert [e.weight for e in recalled.examples] == [0.25, 1, 1, 1, 1, 1] and recalled.examples[4].label is False
    for other in ({"gap": 1.0}, {"verdicts": "majority"}, {"ties": "drop"}):
        assert load(file, chat, cache=True, **options | other).examples != fresh.examples
    rows = write(folder / "b.jsonl", [{"prompt": "q", "completion": "a", "label": True}])
    as_sft = load_examples([rows], chat, DataConfig())
    assert as_sft.examples[0].label is None and load(rows, chat, cache=True).examples[0].label is True


@pytest.mark.parametrize("kind", made.FOUR)
@pytest.mark.parametrize("name, rows", [("dpo_en_demo.json", 299), ("v1_dpo_demo.jsonl", 10)])
def test_real_rows(shared: Path, name: str, rows: int, kind: str) -> None:
    """Every row is used; the answers are in the loss with their end, the question is in the prompt."""
    tokenizer = made.FOUR[kind]()
    chat, file = Chat(tokenizer), shared / "data" / name
    text = file.read_text(encoding="utf-8")
    raw = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    raw = raw if file.suffix == ".jsonl" else raw[:40]
    loaded = load(str(file), chat, max_length=100_000, limit=len(raw))
    (report,) = loaded.report["files"]
    assert (report["used"], report["bad"], report["dropped"]) == (len(raw), 0, {}) and rows >= len(raw)
    assert report["end_of_turn"] == {"turns": 2 * len(raw), "ended": 2 * len(raw)}
    for example, row in zip(loaded.examples, raw, strict=True):
        prompt = tokenizer.decode(example.prompt)
        if "conversations" in row:
            question, answers = (
                row["conversations"][-1]["value"],
                [row[side]["value"] for side in ("chosen", "rejected")],
            )
        else:
            sides = [row[f"{side}_messages"] for side in ("chosen", "rejected")]
            question = sides[0][-2]["content"][0]["value"]
            answers = [side[-1]["content"][0]["value"] for side in sides]
        assert question.strip() in prompt and example.rank == [0, 1]
        for i, answer in enumerate(answers):
            supervised = [t for t, m in zip(example.completions[i], example.mask(i), strict=True) if m]
            assert answer.strip() in tokenizer.decode(supervised)
