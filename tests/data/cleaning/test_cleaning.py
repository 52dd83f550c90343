"""What should be cleaned: planted repetitions, leaks, empty answers and refusals are counted and named; nothing else is."""

import json
import random
import string

import numpy as np
import pytest

from lowalign.cli import main
from lowalign.data.cleaning.near import THRESHOLD, near_duplicates, shingle
from lowalign.data.cleaning.words import language_of, refuses
from lowalign.durable import write_jsonl
from tests.commands.tiny_runs import FP32
from tests.data import made
from tests.report.page_check import Page
from tests.tiny import tiny_folder

TEXTS = {
    "en": "The quick brown fox jumps over the lazy dog, and it is not the first time that this has happened to them.",
    "de": "Der schnelle braune Fuchs springt über den faulen Hund, und das ist nicht das erste Mal, dass es so ist.",
    "fr": "Le renard brun saute par-dessus le chien paresseux, et ce n'est pas la première fois que cela arrive dans la rue.",
    "es": "El zorro marrón salta sobre el perro perezoso, y no es la primera vez que esto pasa en la calle con los perros.",
    "it": "La volpe marrone salta sopra il cane pigro, e non è la prima volta che questo succede nella strada con il cane.",
    "pt": "A raposa marrom pula sobre o cão preguiçoso, e não é a primeira vez que isso acontece na rua com os cães.",
    "nl": "De snelle bruine vos springt over de luie hond, en het is niet de eerste keer dat dit in de straat gebeurt.",
    "pl": "Szybki brązowy lis skacze nad leniwym psem i to nie jest pierwszy raz, że się tak dzieje na ulicy od lat.",
    "sv": "Den snabba bruna räven hoppar över den lata hunden, och det är inte första gången som det händer på gatan.",
    "tr": "Hızlı kahverengi tilki tembel köpeğin üzerinden atlar ve bu ilk kez olan bir şey değil, çok sonra da olur.",
    "Cyrillic": "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "zh": "敏捷的棕色狐狸跳过懒狗。",
    "ja": "素早い茶色の狐がのろまな犬を飛び越える。",
    "ko": "빠른 갈색 여우가 게으른 개를 뛰어넘는다.",
    "Arabic": "الثعلب البني السريع يقفز فوق الكلب الكسول",
    "unknown": "Lorem ipsum dolor sit amet, consectetur adipiscing elit.",
    "code": "for i in range(10): x[i] += y[i] * z[i]; return foo(bar, baz)",
}


def edited(row: list[int], share: float, rng: random.Random) -> list[int]:
    """The row with this share of its tokens replaced."""
    return [rng.randrange(30_000, 60_000) if rng.random() < share else token for token in row]


def test_near_duplicates_are_those_above_the_threshold():
    """Against the similarity of all pairs, computed with sets: every pair above the threshold by some margin is found (a miss at
    0.75 has a probability of 2e-3), none below it is."""
    rng = random.Random(0)
    rows = [[rng.randrange(30_000) for _ in range(rng.randrange(20, 120))] for _ in range(300)]
    copies = [edited(rows[i], share, rng) for i in range(300) for share in (0.01, 0.04, 0.1)]
    ids = [np.array(row, np.uint32) for row in (*rows, *copies)]
    sets = [{tuple([*row, -1, -1][k : k + 3]) for k in range(len(row))} for row in (*rows, *copies)]
    exact = lambda i, j: len(sets[i] & sets[j]) / len(sets[i] | sets[j])  # noqa: E731
    within, across = near_duplicates(ids, len(ids))
    assert not across
    sure = {300 + k for k in range(900) if exact(300 + k, k // 3) >= 0.75}
    assert len(sure) > 400 and len(sure - within.keys()) <= 2
    for i, (j, similarity) in within.items():
        assert j < i and similarity == exact(i, j) >= THRESHOLD
    held_within, held_across = near_duplicates([*ids[300:], *ids[:300]], 900)
    assert len({i - 300 for i in sure} - held_across.keys()) <= 2
    assert all(j >= 900 for j, _ in held_across.values()) and all(j < i < 900 for i, (j, _) in held_within.items())


def test_the_most_similar_row_is_named():
    """The third row is the first with one other token, the second is the first with some."""
    first = list(range(100))
    rows = [first, [token + 1000 * (token % 25 == 0) for token in first], [*first[:50], 5000, *first[51:]]]
    within, _ = near_duplicates([np.array(row, np.uint32) for row in rows], 3)
    assert within[2][0] == 0 and within[2][1] > within[1][1]


def test_a_system_text_of_all_rows_makes_none_of_them_alike():
    """And short, empty and equal rows are no error."""
    rng = random.Random(0)
    system = list(range(40_000, 40_200))
    rows = [np.array(system + [rng.randrange(30_000) for _ in range(15)], np.uint32) for _ in range(100)]
    assert near_duplicates(rows, 100) == ({}, {})
    assert near_duplicates([*rows, rows[3]], 101)[0] == {100: (3, 1.0)}
    assert near_duplicates([], 0) == ({}, {})
    few = [np.array(ids, np.uint32) for ids in ([], [5], [5], [5, 6])]
    assert near_duplicates(few, 4)[0] == {2: (1, 1.0)} and shingle(few).signatures.shape == (4, 120)


@pytest.mark.parametrize("language", TEXTS)
def test_languages(language):
    assert language_of(TEXTS[language]) == language


def test_refusals():
    for text in (
        "I'm sorry, but I can't help with that.",
        "I cannot assist with this request.",
        "As an AI language model, I cannot give legal advice.",
        "Sorry, I can't do that.",
        "I am unable to provide that information.",
        "Es tut mir leid, aber dabei kann ich nicht helfen.",
    ):
        assert refuses(text), text
    for text in (
        "Sorry for the delay! The meeting is at ten.",
        "You cannot divide by zero.",
        "The AI cannot see.",
        "I can help with that: first, I cannot stress enough to back up.",
        "Sure. " + "x " * 200 + "I can't help with that.",
        "",
    ):
        assert not refuses(text), text


def rows_with_faults() -> tuple[list[dict], list[dict]]:
    """200 rows of random words, of which: 3 repeated, 4 nearly, 2 held out, 1 nearly held out, 1 with a held-out prompt, 2 empty
    answers, 5 refusals. -> rows, held-out rows."""
    rng = random.Random(1)
    word = lambda: "".join(rng.choices(string.ascii_lowercase, k=6))  # noqa: E731
    text = lambda n: " ".join(word() for _ in range(n))  # noqa: E731
    rows = [{"prompt": text(6), "completion": text(40)} for _ in range(183)]
    heldout = [{"prompt": text(6), "completion": text(40)} for _ in range(20)]
    nearly = lambda row: {"prompt": row["prompt"], "completion": row["completion"].rpartition(" ")[0] + " end"}  # noqa: E731
    rows += rows[:3] + [nearly(row) for row in rows[10:14]]
    rows += [*heldout[:2], {"prompt": "x" + heldout[5]["prompt"], "completion": heldout[5]["completion"]}]
    rows += [{"prompt": heldout[6]["prompt"], "completion": text(40)}]
    rows += [{"prompt": text(6), "completion": answer} for answer in ("…", " - ")]
    rows += [{"prompt": text(6), "completion": f"I'm sorry, but I can't help with that. {text(9)}"} for _ in range(5)]
    return rows, heldout


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    made.chatml().save_pretrained(tmp_path / "model")
    rows, heldout = rows_with_faults()
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "heldout.jsonl", heldout)
    return tmp_path


def test_data_check_counts_what_was_planted(folder, capsys):
    check = ["data", "check", "rows.jsonl", "--model", "model", "--data.eval", "heldout.jsonl"]
    assert main([*check, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    source = found["cleaning"]["sources"]["rows.jsonl"]
    counts = {
        "exact": 3,
        "near": 4,
        "in_heldout": 2,
        "near_heldout": 1,
        "prompt_in_heldout": 1,
        "empty": 2,
        "truncated": 0,
    }
    assert {kind: source[kind] for kind in counts} == counts
    assert (source["rows"], source["share"], source["refusals"]) == (201, 1.0, round(5 / 201, 4))
    places = found["cleaning"]["places"]
    assert places["exact"] == [[f"rows.jsonl:{184 + k}", f"rows.jsonl:{1 + k}"] for k in range(3)]
    assert [place[:2] for place in places["near"]] == [
        [f"rows.jsonl:{187 + k}", f"rows.jsonl:{11 + k}"] for k in range(4)
    ]
    assert places["in_heldout"] == [["rows.jsonl:191", "heldout.jsonl:1"], ["rows.jsonl:192", "heldout.jsonl:2"]]
    assert places["near_heldout"][0][:2] == ["rows.jsonl:193", "heldout.jsonl:6"]
    assert places["prompt_in_heldout"] == [["rows.jsonl:194", "heldout.jsonl:7"]]
    assert places["empty"] == [["rows.jsonl:195"], ["rows.jsonl:196"]]
    lengths = found["train"]["files"][0]["histogram"]
    assert (
        sum(count for _, count in lengths) == 201
        and found["cleaning"]["longest"][0][1] == found["train"]["files"][0]["lengths"]["total"]["max"]
    )
    assert main(check) == 0
    out = capsys.readouterr().out
    assert "3 rows repeat an earlier row (first: rows.jsonl:184 = :1, " in out
    assert "2 rows are held out too (first: rows.jsonl:191 = heldout.jsonl:1, " in out and "longest: rows.jsonl:" in out


def test_a_folder_is_one_source(folder, capsys):
    """Its rows are counted under the name that was given; places name the file."""
    (folder / "parts").mkdir()
    for part in "ab":
        write_jsonl(
            folder / "parts" / f"{part}.jsonl",
            [{"prompt": "What?", "completion": f"{i} times {i * i} is known"} for i in range(4)],
        )
    assert main(["data", "check", "parts", "rows.jsonl", "--model", "model", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cleaning"]
    assert [(name, own["rows"]) for name, own in found["sources"].items()] == [("parts", 8), ("rows.jsonl", 201)]
    assert found["sources"]["parts"]["exact"] == 4 and found["places"]["exact"][0] == [
        "parts/b.jsonl:1",
        "parts/a.jsonl:1",
    ]


def test_documents_have_no_prompt_in_common(folder, capsys):
    """The prompt of each is bos, or nothing."""
    for name, first in (("docs", 0), ("more", 10)):
        write_jsonl(
            folder / f"{name}.jsonl", [{"text": f"{i} times {i * i} is known"} for i in range(first, first + 4)]
        )
    check = ["data", "check", "docs.jsonl", "--model", "model", "--data.eval", "more.jsonl", "--json"]
    assert main(check) == 0
    assert json.loads(capsys.readouterr().out)["cleaning"]["sources"]["docs.jsonl"]["prompt_in_heldout"] == 0


def test_exit_code_is_that_of_training(folder, capsys):
    """1 exactly where sft would refuse: bad rows, unless they are skipped; no row left; bad held-out rows."""
    write_jsonl(folder / "bad.jsonl", [{"prompt": "q", "completion": "a b c"}, {"prompt": "q"}])
    write_jsonl(folder / "none.jsonl", [{"prompt": "q"}])
    check = lambda *words: main(["data", "check", *words, "--model", "model", "--rows", "0"])  # noqa: E731
    assert check("bad.jsonl") == 1
    assert (
        "training would refuse: 1 rows of bad.jsonl cannot be used; --data.on-error skip leaves them out"
        in capsys.readouterr().out
    )
    assert check("bad.jsonl", "--data.on-error", "skip") == 0
    assert check("none.jsonl", "--data.on-error", "skip") == 1
    assert "training would refuse: no row of none.jsonl can be used" in capsys.readouterr().out
    assert check("rows.jsonl", "--data.eval", "bad.jsonl") == 1
    assert check("bad.jsonl", "--json") == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["refused"]


def test_the_report_of_a_run_shows_it(folder, capsys):
    """data_report.json of a run has the same counts, and the page a table, a histogram and the places."""
    tiny_folder(folder / "base")
    words = ["--model", "base", "--data", "rows.jsonl", "--data.eval", "heldout.jsonl", "--out", "run"]
    words += ["--train.steps", "1", "--train.batch-size", "1", "--data.max-length", "512", *FP32]
    assert main(["sft", *words, "--train.optimizer", "adamw"]) == 0
    assert "rows are held out too (first: rows.jsonl:191 = heldout.jsonl:1" in capsys.readouterr().err
    report = json.loads((folder / "run" / "data_report.json").read_text())["cleaning"]["sources"]["rows.jsonl"]
    assert report["exact"] == 3 and report["in_heldout"] == 2 and report["truncated"] == 0
    assert main(["report", "run", "--out", "page.html"]) == 0
    page = Page((folder / "page.html").read_text(encoding="utf-8"))
    (row,) = [row for row in page.cells if row and row[0] == "rows.jsonl"]
    assert row[1:4] == ["201", "100.0%", "3"]
    (svg,) = [svg for svg in page.svgs if svg.get("aria-label") == "rows of rows.jsonl by tokens"]
    assert len(list(svg.iter("rect"))) == len(report["lengths"]) > 1
    assert "repeat an earlier row, first: rows.jsonl:184 = :1, " in page.text
    for broken in ({"sources": {"<b>": {"rows": "x", "lengths": [[1], 2, ["<i>", 1]], "languages": 3}}, "places": {"exact": [3, []]}, "longest": 7}, {"sources": 3}, 4):  # fmt: skip
        (folder / "run" / "data_report.json").write_text(json.dumps({"cleaning": broken}))
        assert main(["report", "run", "--out", "page.html"]) == 0
        Page((folder / "page.html").read_text(encoding="utf-8"))
