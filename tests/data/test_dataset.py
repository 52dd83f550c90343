"""Files to Examples: order, report, cache, held-out rows; and the real rows."""

import datetime
import json
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowalign.config.sections import DataConfig
from lowalign.data import cache, dataset
from lowalign.data.chat import Chat
from lowalign.data.dataset import heldout_count, load_examples, split_heldout
from lowalign.data.pack import Example
from lowalign.data.rendering.variants import TOOLS_NOTE
from lowalign.data.report import report_lines, spread
from lowalign.data.store import open_store
from lowalign.errors import UserError
from tests.data import made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for files, with the cache inside it."""
    monkeypatch.setenv("LOWALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answer(text: str, question: str = "q") -> dict:
    return {"prompt": question, "completion": text}


def load(files: list[str], chat: Chat, **options: object) -> dataset.Dataset:
    return load_examples(files, chat, DataConfig(**options))


def test_order_sources_and_report(folder: Path) -> None:
    tokenizer = made.chatml()
    chat = Chat(tokenizer)
    size = lambda text: len(tokenizer(text)["input_ids"])  # noqa: E731
    texts = ["a", "the cat sat", "a", "What is in the box? " * 9, "no"]
    first = write(folder / "b.jsonl", [answer(text) | {"id": 1} for text in texts])
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    second = write(folder / "a.jsonl", [{"messages": talk}, {"text": "a cat"}])
    limit = size(texts[3]) + 1  # with its eos the long answer has just room for no prompt
    loaded = load([first, second], chat, max_length=limit)
    assert [e.source for e in loaded.examples] == [f"{first}:{n}" for n in range(1, 6)] + [f"{second}:1", f"{second}:2"]
    one, two = loaded.report["files"]
    lengths = sorted(size(text) + 1 for text in texts)
    expected = {"min": lengths[0], "median": statistics.median(lengths), "p95": lengths[-1], "max": lengths[-1]}
    assert one["lengths"]["completion"] == expected
    assert one["lengths"]["prompt"] == {"min": 1, "median": 1, "p95": 1, "max": 1}
    assert one["lengths"]["total"]["max"] == limit + 1
    assert (one["rows"], one["used"], one["examples"], one["bad"], one["duplicates"]) == (5, 5, 5, 0, 1)
    assert (
        one["cut"] == {"prompt": 1}
        and one["shapes"] == {"prompt-completion": 5}
        and one["ignored_columns"] == {"id": 5}
    )
    assert one["tokens"] == sum(lengths) + 4 and one["supervised_tokens"] == sum(lengths) - 1
    assert one["end_of_turn"] == {"turns": 5, "ended": 5}
    assert two["shapes"] == {"messages": 1, "text": 1} and two["end_of_turn"] == {"turns": 3, "ended": 3}
    assert loaded.report["rows"] == 7 and loaded.report["cut"] == 1 and loaded.report["end_of_turn"]["turns"] == 8
    assert f"  1 of 5 rows cut in the prompt, longest {limit + 1} > {limit} tokens" in report_lines(loaded.report)
    assert json.loads(json.dumps(loaded.report)) == loaded.report


def test_a_cut_answer_has_no_end_and_a_split_text_has_one(folder: Path) -> None:
    chat = Chat(made.chatml())
    long = "the cat sat " * 20
    loaded = load([write(folder / "a.jsonl", [answer(long), {"text": long}])], chat, max_length=20)
    (report,) = loaded.report["files"]
    assert report["cut"] == {"completion": 1, "chunked": 1} and report["used"] == 2
    assert report["end_of_turn"] == {"turns": 2, "ended": 1}
    assert all(e.length <= 20 and e.supervised for e in loaded.examples)
    assert report["examples"] == len(loaded.examples) > 3


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_lengths_at_the_edge(folder: Path, extra: int) -> None:
    """A conversation of max - 1, max and max + 1 tokens: cut only when it must be, the answer never."""
    chat = Chat(made.chatml())
    talk = {"messages": [{"role": "user", "content": "a b c d"}, {"role": "assistant", "content": "the cat"}]}
    file = write(folder / "a.jsonl", [talk])
    (whole,) = load([file], chat).examples
    (example,) = load([file], chat, max_length=whole.length - extra).examples
    assert example.length == whole.length - max(extra, 0)
    assert example.completions == whole.completions and example.supervised == whole.supervised
    assert example.prompt == whole.prompt[max(extra, 0) :]


def test_when_nothing_is_left_it_says_why(folder: Path) -> None:
    silent = Chat(made.chatml(), made.CHATML.replace("m.content +", "(m.content if loop.first else m.content[:12]) +"))
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a long, long answer"}]}
    with pytest.raises(
        UserError, match=r"no row of .*a\.jsonl can be used: the chat template leaves out the text of an"
    ):
        load([write(folder / "a.jsonl", [talk])], silent)
    chat = Chat(made.chatml())
    with pytest.raises(UserError, match="the files are empty"):
        load([write(folder / "a.jsonl", [])], chat)
    with pytest.raises(UserError, match="all are bad"):
        load([write(folder / "a.jsonl", [{"prompt": "a"}])], chat, on_error="skip")
    with pytest.raises(UserError, match="no data"):
        load([], chat)
    with pytest.raises(UserError, match="max-length 1 leaves no room"):
        load([write(folder / "a.jsonl", [answer("a")])], chat, max_length=1)


def test_dropped_rows_are_counted_with_their_places(folder: Path) -> None:
    only_user_first = made.CHATML.replace(
        "{% for m", "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}{% for m"
    )
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    system = {"role": "system", "content": "s"}
    rows = [{"messages": talk}, {"messages": [system, talk[1]]}]
    loaded = load([write(folder / "a.jsonl", rows)], Chat(made.chatml(), only_user_first))
    (report,) = loaded.report["files"]
    why = "the chat template cannot render it: user first"
    assert report["dropped"] == {why: {"rows": 1, "first": [f"{folder}/a.jsonl:2"]}}
    assert (report["rows"], report["used"], loaded.report["dropped"]) == (2, 1, 1)


def test_the_cache_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal Examples and report, without tokenizing again; a damaged file is made anew."""
    chat = Chat(made.chatml())
    talk = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}] * 2
    rows = [answer("a"), {"messages": talk}, {"text": "the cat " * 40}, answer("a"), {"text": "a"}]
    file = write(folder / "rows é.jsonl", rows)
    fresh = load([file], chat, cache=False, max_length=60)
    assert not (folder / "cache").exists()
    stored = load([file], chat, max_length=60)
    (path,) = (folder / "cache" / "data").iterdir()
    whole = path.read_bytes()

    def never(*_: object) -> None:
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_tokenize", never)
        recalled = load([file], chat, max_length=60)
    assert fresh.examples == stored.examples == recalled.examples
    assert fresh.report == stored.report == recalled.report
    assert any(False in e.masks[0] for e in recalled.examples)

    flipped = load_file(path)
    flipped["records"][20] += 1
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1]), None):
        save_file(flipped, path) if damaged is None else path.write_bytes(damaged)
        again = load([file], chat, max_length=60)
        assert (again.examples, again.report) == (fresh.examples, fresh.report)
        assert open_store(path) is not None
    assert len(list(path.parent.iterdir())) == 1


def test_what_the_cache_depends_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, name, template, tokenizer, shape, lengths and, where the template writes it, the date."""
    chat = Chat(made.chatml())
    file = write(folder / "a.jsonl", [answer("a"), answer("b")])

    def stored() -> int:
        return len(list((folder / "cache" / "data").iterdir()))

    load([file], chat)
    load([file], Chat(made.chatml()))
    assert stored() == 1
    other = made.chatml()
    other.add_tokens(["cat"])
    dated = Chat(made.chatml(), made.CHATML + "{# {{ strftime_now('%d') }} #}")
    load([file], chat, max_length=99)
    load([file], chat, limit=1)
    load([file], chat, shape="prompt-completion")
    load([file], Chat(made.chatml(), made.CHATML + " "))
    load([file], Chat(other))
    load([file], dated)
    assert stored() == 7
    write(folder / "a.jsonl", [answer("a"), answer("c")])
    assert [len(e.completions) for e in load([file], chat).examples] == [1, 1] and stored() == 8
    load([write(folder / "c.jsonl", [answer("a"), answer("c")])], chat)
    load([file], dated)
    load([file], dated)
    assert stored() == 10

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2999, 1, 1)

    monkeypatch.setattr(cache.datetime, "date", Tomorrow)
    load([file], chat)
    assert stored() == 10
    load([file], dated)
    assert stored() == 11


def test_files_with_bad_rows_are_read_anew(folder: Path) -> None:
    file = write(folder / "a.jsonl", [answer("a"), {"prompt": "b"}])
    for _ in range(2):
        loaded = load([file], Chat(made.chatml()), on_error="skip")
        assert len(loaded.bad) == 1 and loaded.report["bad"] == 1
    assert not (folder / "cache").exists()


def test_a_disk_that_takes_nothing_is_no_error(folder: Path) -> None:
    (folder / "cache").write_text("a file where the folder should be")
    assert len(load([write(folder / "a.jsonl", [answer("a")])], Chat(made.chatml())).examples) == 1


def test_heldout_rows_stay_whole() -> None:
    """No row on both sides, all of them on one, in order, the same ones for the same seed."""
    examples = [Example([1], [[k]], source=f"f:{k // 2}") for k in range(40)]
    train, heldout = split_heldout(examples, 5, seed=1)
    assert {e.source for e in train} & {e.source for e in heldout} == set()
    assert len({e.source for e in heldout}) == 5 and len(heldout) == 10 and len(train) == 30
    assert sorted(train + heldout, key=lambda e: e.completions) == examples
    assert [e.completions for e in train] == sorted(e.completions for e in train)
    assert split_heldout(examples, 5, seed=1) == (train, heldout)
    assert split_heldout(examples, 5, seed=2)[1] != heldout
    assert [heldout_count(*case) for case in ((0.1, 24), (0.1, 6), (0.1, 50_000), (7, 8), (0, 3))] == [2, 0, 200, 7, 0]
    with pytest.raises(UserError, match=r"--data.eval-rows 8 of 8 rows leaves none to train on; hold out fewer"):
        heldout_count(8, 8)
    with pytest.raises(UserError, match="20 of 20 rows leaves none"):
        split_heldout(examples, 20, seed=1)


def test_spread_by_nearest_rank() -> None:
    assert spread(range(1, 101)) == {"min": 1, "median": 50, "p95": 95, "max": 100}
    assert spread([7]) == {"min": 7, "median": 7, "p95": 7, "max": 7}
    assert spread([]) == {}


@pytest.mark.parametrize(
    "name, rows, shape",
    [
        ("alpaca_en_demo.json", 999, "alpaca"),
        ("glaive_toolcall_en_demo.json", 300, "sharegpt"),
        ("c4_demo.jsonl", 300, "text"),
    ],
)
@pytest.mark.parametrize("kind", ["chatml", "tools", "llama2"])
def test_real_rows(shared: Path, name: str, rows: int, shape: str, kind: str) -> None:
    """Every row is used, every turn's end is in the loss, and the supervised text is the row's own."""
    tokenizer = {"chatml": made.chatml, "tools": lambda: made.chatml(made.CHATML_TOOLS), "llama2": made.FOUR["llama2"]}[
        kind
    ]()
    chat, file = Chat(tokenizer), shared / "data" / name
    loaded = load([str(file)], chat, cache=False, max_length=100_000)
    (report,) = loaded.report["files"]
    assert (report["rows"], report["used"], report["bad"], report["dropped"]) == (rows, rows, 0, {})
    assert (
        report["shapes"] == {shape: rows}
        and report["cut"] == {}
        and report["end_of_turn"]["ended"] == report["end_of_turn"]["turns"]
    )
    raw = json.loads(file.read_text()) if file.suffix == ".json" else [json.loads(line) for line in file.open()]
    answers = {
        "alpaca": lambda row: [row["output"]],
        "text": lambda row: [row["text"]],
        "sharegpt": lambda row: [t["value"] for t in row["conversations"] if t["from"] == "gpt"],
    }[shape]
    assert report["end_of_turn"]["turns"] == sum(
        len([t for t in row["conversations"] if t["from"] in ("gpt", "function_call")]) if shape == "sharegpt" else 1
        for row in raw
    )
    for example, row in zip(loaded.examples[::17], raw[::17], strict=True):
        ids, mask = torch.tensor(example.completions[0]), torch.tensor(example.masks[0])
        supervised, rest = tokenizer.decode(ids[mask]), tokenizer.decode(example.prompt) + tokenizer.decode(ids[~mask])
        for answer_text in answers(row):
            assert answer_text.strip() in supervised
        for turn in row.get("conversations", []):
            if turn["from"] in ("human", "observation"):
                assert turn["value"].strip() in rest
    without_tools = shape == "sharegpt" and kind != "tools"
    assert (TOOLS_NOTE in report["notes"]) == without_tools
