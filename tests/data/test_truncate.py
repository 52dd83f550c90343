"""Rows that are too long: what is kept, to the token."""

import json
import random
from pathlib import Path

import pytest

from lowalign.config.sections import DataConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import SFT_ENCODER, Dataset, read_examples
from lowalign.data.pack import Example
from lowalign.data.report import FileStats
from lowalign.data.rows.sft_rows import Conversation
from lowalign.data.truncate import chunks, fit
from tests.data import made

BOS = 99


def example(prompt: int, completion: int, bos: bool = True) -> Example:
    """Prompt ids 0, 1, 2, … after bos; completion ids 1000, 1001, …, of which every third is not supervised."""
    ids = [1000 + i for i in range(completion)]
    return Example([BOS] * bos + list(range(prompt - bos)), [ids], [[i % 3 != 1 for i in range(completion)]])


@pytest.mark.parametrize("length", [19, 20])
def test_what_fits_is_left_alone(length: int) -> None:
    whole = example(length - 5, 5)
    assert fit(whole, 20, [BOS]) == (whole, None)


def test_the_prompt_is_cut_from_the_left() -> None:
    fitted, cut = fit(example(16, 5), 20, [BOS])
    assert cut == "prompt"
    assert fitted.prompt == [BOS, *range(1, 15)] and fitted.completions == example(16, 5).completions
    assert fitted.masks == example(16, 5).masks
    fitted, _ = fit(example(16, 5, bos=False), 20, [])
    assert fitted.prompt == list(range(1, 16))


@pytest.mark.parametrize("completion", [18, 19, 20, 21, 40])
@pytest.mark.parametrize("bos", [True, False])
def test_the_completion_is_kept_until_it_alone_is_too_long(completion: int, bos: bool) -> None:
    whole = example(30, completion, bos)
    fitted, cut = fit(whole, 20, [BOS] if bos else [])
    assert fitted.length == 20
    assert cut == ("completion" if completion > 20 else "prompt")
    kept = min(completion, 20 - bos if completion > 20 else 20)
    assert fitted.completions == [whole.completions[0][:kept]]
    room = 20 - kept
    assert fitted.prompt == ([BOS] * bos + whole.prompt[30 - (room - bos) :] if room else [])
    assert fitted.mask(0)[1:] == whole.mask(0)[1:kept]


def test_nothing_supervised_is_nothing() -> None:
    lonely = Example([1] * 10, [[5, 6, 7]], [[True, False, False]])
    assert fit(lonely, 3, []) == (None, "prompt")
    assert fit(lonely, 4, [])[0].supervised == 1


@pytest.mark.parametrize("bos_ids", [[], [BOS]])
def test_random_rows(bos_ids: list[int]) -> None:
    """Never longer than allowed; prompt and completion are ends and beginnings of what they were."""
    rng = random.Random(0)
    for _ in range(300):
        whole, limit = example(rng.randrange(1, 30), rng.randrange(1, 30), bool(bos_ids)), rng.randrange(3, 40)
        fitted, cut = fit(whole, limit, bos_ids)
        if whole.length <= limit:
            assert (fitted, cut) == (whole, None)
            continue
        assert fitted.length == limit and fitted.supervised
        tail = fitted.prompt[len(bos_ids) :] if fitted.prompt[:1] == [BOS] else fitted.prompt
        assert whole.prompt[len(whole.prompt) - len(tail) :] == tail
        assert whole.completions[0][: len(fitted.completions[0])] == fitted.completions[0]
        assert cut == "completion" or fitted.completions == whole.completions


@pytest.mark.parametrize("tokens", [9, 10, 11, 19, 20, 21, 57])
@pytest.mark.parametrize("bos_ids", [[], [BOS]])
def test_no_token_of_a_document_is_lost(tokens: int, bos_ids: list[int]) -> None:
    ids = list(range(tokens))
    pieces = chunks(Example(list(bos_ids), [ids]), 10)
    assert [i for piece in pieces for i in piece.completions[0]] == ids
    assert all(piece.length <= 10 for piece in pieces) and all(piece.length == 10 for piece in pieces[:-1])
    assert sum(piece.supervised for piece in pieces) == tokens - (not bos_ids)
    assert all(piece.prompt == bos_ids for piece in pieces) if bos_ids else pieces[0].prompt == []
    if not bos_ids:  # later stretches are predicted from the token before them
        assert all(piece.prompt == [piece.completions[0][0] - 1] for piece in pieces[1:])


def test_a_long_chat_keeps_its_system_turn_and_first_question(tmp_path: Path) -> None:
    """It loses whole turns at its end; its first answer is learned after the first question."""
    chat = Chat(made.chatml())
    turns = [{"role": "system", "content": "Be brief."}]
    for k in range(5):
        turns += [{"role": "user", "content": f"question {k}"}, {"role": "assistant", "content": f"answer {k}"}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": turns}))
    (whole,), (three,) = chat.example(turns), chat.example(turns[:7])

    def read(limit: int, **options: str) -> Dataset:
        return read_examples([str(file)], chat, DataConfig(max_length=limit, cache=False, **options))

    for limit in (three.length, three.length + 5):
        (example,) = read(limit).examples
        assert (example.prompt, example.completions, example.masks) == (three.prompt, three.completions, three.masks)
    dataset = read(three.length)
    assert dataset.report["files"][0]["cut"] == {"turns": 1}
    assert dataset.report["files"][0]["end_of_turn"] == {"turns": 3, "ended": 3}
    (cut,) = read(whole.length - 4, long="left").examples
    assert cut.completions == whole.completions and cut.prompt == whole.prompt[4:]
    dropped = read(whole.length - 1, long="drop")
    assert not dropped.examples and dropped.report["dropped"] == 1
    (first,) = chat.example(turns[:3])
    (short,) = read(first.length - 2).examples
    assert short.completions == first.completions and short.prompt == first.prompt[2:]


def test_a_long_chat_of_one_example_a_turn_loses_the_last_ones() -> None:
    chat, config = Chat(made.chatml(made.QWEN3)), DataConfig(max_length=100, cache=False)
    turns = []
    for k in range(5):
        turns += [
            {"role": "user", "content": f"q {k}"},
            {"role": "assistant", "content": f"<think>\nso\n</think>\na {k}"},
        ]
    examples = chat.example(turns)
    stats = FileStats("file")
    kept = SFT_ENCODER.encode([Conversation(turns)], chat, config, stats)
    assert 0 < len(kept) < 5 and stats.cut == {"turns": 1}
    assert [e.prompt for e in kept] == [e.prompt for e in examples[: len(kept)]]
