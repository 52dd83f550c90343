"""What becomes of scores, verdicts and ties, and which rows of preferences are left out."""

import json
from pathlib import Path

import pytest

from lowalign.config.sections import PreferenceConfig
from lowalign.data import dataset
from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.data.preferences import load_preferences
from lowalign.data.report import report_lines
from tests.data import made


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(made.chatml())


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(file: str, chat: Chat, **options: object) -> dataset.Dataset:
    return load_preferences([file], chat, PreferenceConfig(**{"cache": False} | options))


def one(tmp_path: Path, row: dict, chat: Chat, **options: object) -> Example:
    (example,) = load(write(tmp_path / "rows.jsonl", [row]), chat, **options).examples
    return example


def rendered(example: Example, chat: Chat) -> tuple[str, list[str]]:
    """The prompt and, of each completion, the text with its supervised part in «…»."""
    decode, answers = chat.tokenizer.decode, []
    for i, ids in enumerate(example.completions):
        text, inside = "", False
        for token, supervised in zip(ids, example.mask(i), strict=True):
            text, inside = (
                text + ("«" if supervised and not inside else "»" if inside and not supervised else ""),
                supervised,
            )
            text += decode([token])
        answers.append(text + ("»" if inside else ""))
    return decode(example.prompt), answers


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def test_scores_are_gathered_over_the_file(tmp_path: Path, chat: Chat) -> None:
    """By prompt, whatever stands between; ties by the gap, measured from the best of a rank."""
    scores = {"x": 0.4, "y": 0.9, "z": 0.3, "w": 0.2}
    rows = [{"prompt": "q", "completion": c, "score": s} for c, s in scores.items()]
    rows.insert(2, {"prompt": "other", "completion": "x", "score": 3})
    rows.insert(4, {"prompt": "lonely", "completion": "x", "score": 1})
    rows += [{"prompt": "other", "completion": "y", "score": 4}]
    rows += [{"prompt": "even", "completion": c, "score": 5} for c in "xy"]
    file = write(tmp_path / "rows.jsonl", rows)
    for gap, ranks in ((0.0, [1, 0, 2, 3]), (0.1, [1, 0, 1, 2]), (0.2, [1, 0, 1, 1]), (0.5, [0, 0, 1, 1])):
        loaded = load(file, chat, gap=gap)
        first, second = loaded.examples
        assert (first.rank, second.rank) == (ranks, [1, 0])
        assert rendered(first, chat)[1] == [f"«{c}<|im_end|>»" for c in scores]
        assert (first.source, second.source) == (f"{file}:1", f"{file}:3")
        (report,) = loaded.report["files"]
        assert report["dropped"] == {
            "the only answer to its prompt": {"rows": 1, "first": [f"{file}:5"]},
            "none of its answers is better than another": {"rows": 2, "first": [f"{file}:8", f"{file}:9"]},
        }
        assert (report["rows"], report["used"], report["examples"], report["shapes"]) == (9, 6, 2, {"scores": 9})
    assert [e.rank for e in load(file, chat, ties="keep").examples][2] == [0, 0]


VOTES = [("x", "y", "ann", "a"), ("y", "x", "bob", "b"), ("x", "y", "cec", "b"), ("y", "x", "dan", "tie"), ("x", "z", "ann", "a"),
         ("z", "x", "bob", "a")]  # fmt: skip


def judged(path: Path) -> str:
    names = ("completion_a", "completion_b", "annotator", "verdict")
    return write(path, [{"prompt": "q", **dict(zip(names, vote, strict=True))} for vote in VOTES])


def test_verdicts_of_one_pair_are_gathered(tmp_path: Path, chat: Chat) -> None:
    """x against y: two for x, one for y, one tie, in either order of the columns. x against z: one each."""
    file = judged(tmp_path / "rows.jsonl")
    for rule, weight in (("majority", 1.0), ("weight", (2 - 1) / 4)):
        loaded = load(file, chat, verdicts=rule)
        (example,) = loaded.examples
        assert rendered(example, chat)[1] == ["«x<|im_end|>»", "«y<|im_end|>»"]
        assert (example.rank, example.weight, example.source) == ([0, 1], weight, f"{file}:1")
        (report,) = loaded.report["files"]
        assert report["dropped"]["none of its answers is better than another"]["rows"] == 2
        example, tie = load(file, chat, verdicts=rule, ties="keep").examples
        assert (tie.rank, tie.weight, tie.source) == ([0, 0], 1.0, f"{file}:5")
    # Of the 6 pairs of verdicts on x and y one agrees (a with a), of the one on x and z none. Coincidences: x against y
    # has a 2, b 1, tie 1, so 16 - 6 = 10 unequal over 4 - 1; x against z has 2 unequal over 1; all six are 3 a, 2 b,
    # 1 tie, so 36 - 14 = 22 are expected: 1 - 5 (10/3 + 2)/22.
    agreement = report["agreement"]
    assert {k: agreement[k] for k in ("pairs", "verdicts", "annotators")} == {
        "pairs": 2,
        "verdicts": 6,
        "annotators": 4,
    }
    assert agreement["agreement"] == pytest.approx(1 / 7)
    assert agreement["alpha"] == pytest.approx(1 - 5 * (10 / 3 + 2) / 22)
    text = report_lines(loaded.report)
    assert "  6 verdicts of 4 annotators on 2 pairs" in text and "  two annotators of a pair agree: 14.3%" in text
    assert "  Krippendorff's alpha: -0.212 (1: always agreed, 0: as by chance)" in text


# Left out with a count; each row, the options, and the reason.
DROPPED = [
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, {}, "its answers are the same"),
    ({"prompt": "q", "completions": ["a", "a"], "ranks": [0, 0]}, {"ties": "keep"}, "its answers are the same"),
    ({"prompt": "q", "completions": ["a", "b", "a"]}, {}, "one answer has two ranks"),
    ({"prompt": "q", "completions": ["a", "b"], "ranks": [1, 1]}, {}, "none of its answers is better than another"),
    ({"prompt": "q", "chosen": "the cat sat on the mat", "rejected": "the cat sat on the box"}, {"max_length": 3},
     "its answers are the same once they are cut to 3 tokens"),
    ({"prompt": "q", "completions": ["the cat sat on the mat", "the cat sat on the box", "no"]}, {"max_length": 3},
     "one answer has two ranks once they are cut to 3 tokens"),
]  # fmt: skip


@pytest.mark.parametrize("row, options, reason", DROPPED, ids=lambda value: value if isinstance(value, str) else "")
def test_rows_that_teach_nothing_are_counted(row: dict, options: dict, reason: str, tmp_path: Path, chat: Chat) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}, row])
    loaded = load(file, chat, **options)
    assert [e.source for e in loaded.examples] == [f"{file}:1"] and loaded.bad == []
    assert loaded.report["files"][0]["dropped"] == {reason: {"rows": 1, "first": [f"{file}:2"]}}


def test_what_a_template_makes_equal_is_dropped(tmp_path: Path) -> None:
    """Gemma's template trims answers: the texts differ, the ids do not."""
    chat = Chat(made.gemma())
    rows = [{"prompt": [user("hi")], "chosen": "ho", "rejected": text} for text in (" ho\n", "no")]
    loaded = load(write(tmp_path / "rows.jsonl", rows), chat)
    assert list(loaded.report["files"][0]["dropped"]) == ["its answers are the same"] and len(loaded.examples) == 1


def test_an_answer_that_stands_twice_at_one_rank_is_kept_once(tmp_path: Path, chat: Chat) -> None:
    row = {"prompt": "q", "completions": ["a", "b", "a", "c"], "ranks": [1, 0, 1, 2]}
    loaded = load(write(tmp_path / "rows.jsonl", [row]), chat)
    (example,) = loaded.examples
    assert rendered(example, chat)[1] == ["«a<|im_end|>»", "«b<|im_end|>»", "«c<|im_end|>»"] and example.rank == [
        1,
        0,
        2,
    ]
    assert loaded.report["files"][0]["notes"] == {"repeated answers of one rank kept once": 1}
