"""Rows in a file that is mapped: equal to rows in memory, never all of them in memory, whole or not there."""

import json
import os
import random
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from lowalign.config.sections import TrainConfig
from lowalign.data import blocks, store
from lowalign.data.chat import Chat
from lowalign.data.dataset import split_heldout
from lowalign.data.example import Example
from lowalign.data.examples import Examples
from lowalign.data.record import FACTS, example_at, record_of
from lowalign.data.store import Store, StoreWriter, open_store
from lowalign.errors import UserError
from lowalign.methods.fixed_data import FixedDataMethod
from tests.data.test_dataset import answer, folder, load, made, write  # noqa: F401

EXAMPLES = [
    Example([1, 2, 3], [[4, 5]], [[True, True]], source="é.jsonl:1"),
    Example([], [[7, 8, 9]], [[True, False, True]], source="é.jsonl:2"),
    Example(list(range(9)), [[4], [5, 6]], [[True], [False, True]], rank=[1, 0], margin=0.5, weight=0.25, source="b:1"),
    Example(list(range(9)), [[4]], [[True]], label=False, source="b:2"),
]


def stored(examples: list[Example], path: Path | None = None, each: int = 1) -> Store:
    """The Store of these Examples, written `each` at a time."""
    writer = StoreWriter((path or Path("none")).parent)
    for start in range(0, len(examples), each):
        made = [record_of(example) for example in examples[start : start + each]]
        facts = np.array([own for _, own in made], FACTS)
        facts["at"] = np.cumsum([0, *(len(record) for record, _ in made)])[: len(made)]
        writer.add(b"".join(record for record, _ in made), facts, range(start, start + len(made)))
    return writer.finish({"rows": len(examples)}, path)


def test_an_example_comes_back_and_its_facts_are_its_own() -> None:
    for example in EXAMPLES:
        record, facts = record_of(example)
        named = dict(zip(FACTS.names, facts, strict=True))
        assert len(record) % 4 == 0 and example_at(b"xxxx" + record, 4) == example
        supervised = [sum(example.mask(i)) for i in range(len(example.completions))]
        assert (
            (named["tokens"], named["supervised"])
            == (example.length, sum(supervised))
            == (example.length, example.supervised)
        )
        assert named["shortest"] == min(supervised) and named["completions"] == len(example.completions)
        assert named["longest"] == len(example.prompt) + max(map(len, example.completions))
        assert named["ranked"] == (example.rank is not None) and (named["prompt"] == 0) == (len(example.prompt) < 8)
    hashes = [dict(zip(FACTS.names, record_of(e)[1], strict=True)) for e in EXAMPLES]
    same = record_of(replace(EXAMPLES[3], source="elsewhere"))[1]
    assert hashes[2]["prompt"] == hashes[3]["prompt"] and len({h["content"] for h in hashes}) == 4
    assert same[2] == hashes[3]["content"] and same[1] != hashes[3]["source"]
    assert record_of(replace(EXAMPLES[3], label=True))[1][2] != hashes[3]["content"]


@pytest.mark.parametrize("spool", [2**20, 0])
def test_what_is_written_in_any_order_is_read_in_the_order_of_the_rows(
    spool: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SPOOL", spool)
    monkeypatch.setattr(store, "MAPPED", 3 * store.TOUCHED)  # a new map every few rows
    examples = [Example([i], [[i, i + 1] * (i % 5 + 1)], None, source=f"f:{i}") for i in range(50)]
    order = random.Random(0).sample(range(50), 50)
    writer = StoreWriter(tmp_path)
    for i in order:
        record, facts = record_of(examples[i])
        writer.add(record, np.array([facts], FACTS), [i])
    path = tmp_path / "kept.safetensors"
    kept = writer.finish({"a": 1}, path)
    again = open_store(path)
    plain = [replace(e, masks=[[True] * len(e.completions[0])]) for e in examples]
    assert list(kept) == list(again) == plain and again.report == {"a": 1}
    assert list(tmp_path.iterdir()) == [path] and load_file(path)["facts"].numel() == 50 * FACTS.itemsize
    assert [again[i].source for i in (49, 0, 17)] == ["f:49", "f:0", "f:17"]
    unnamed = stored(examples, None)
    assert list(unnamed) == plain and list(tmp_path.iterdir()) == [path]


def test_examples_are_never_all_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """While a file is tokenized there are those of a block; then those that are held."""
    monkeypatch.setattr(blocks, "BLOCK", 20)
    monkeypatch.setattr(store, "SPOOL", 100_000)
    file = write(folder / "a.jsonl", [answer("the cat sat " * 9, f"q{i}") for i in range(1500)])
    made_so_far, seen, add = [], [], StoreWriter.add
    live = lambda: sum(ref() is not None for ref in made_so_far)  # noqa: E731

    def noted(example: Example) -> tuple:
        made_so_far.append(weakref.ref(example))
        return record_of(example)

    def counted(self: StoreWriter, *content: object) -> None:
        seen.append((live(), len(self._file.getvalue()) if hasattr(self._file, "getvalue") else 0))
        add(self, *content)

    monkeypatch.setattr(blocks, "record_of", noted)
    monkeypatch.setattr(StoreWriter, "add", counted)
    for cache in (True, False):
        rows = load([file], Chat(made.chatml()), cache=cache).examples
        assert len(rows) == 1500 and live() == 0 and len(made_so_far) % 1500 == 0
        assert len(seen) == 75 and max(count for count, _ in seen) < 40 and max(size for _, size in seen) < 120_000
        assert rows.parts[0]._file is not None and rows[1499].source == f"{file}:1500"
        seen.clear()
    assert [path.suffix for path in (folder / "cache" / "data").iterdir()] == [".safetensors"]


def test_order_and_resume_are_those_of_a_list(tmp_path: Path) -> None:
    examples = [Example([i], [[i + 1]], [[True]], source=f"f:{i // 2}") for i in range(90)]
    mapped = Examples([stored(examples, tmp_path / "a.safetensors")])
    train = TrainConfig(batch_size=7, seed=3)
    batches = lambda rows, first: [  # noqa: E731
        FixedDataMethod(None, rows, ("policy",), train).batch(step) for step in range(first, 30)
    ]
    assert batches(mapped, 0) == batches(examples, 0) and batches(mapped, 11) == batches(examples, 0)[11:]
    for eval_rows in (0, 5, 0.1):
        assert split_heldout(mapped, eval_rows, 1) == split_heldout(examples, eval_rows, 1)
    rows = list(dict.fromkeys(e.source for e in examples))  # as the rows were chosen by their names
    random.Random(1).shuffle(rows)
    assert {e.source for e in split_heldout(mapped, 5, 1)[1]} == set(rows[-5:])


def test_parts_of_several_sources(tmp_path: Path) -> None:
    rows = Examples([stored(EXAMPLES[:2]), EXAMPLES[2:]], ["a", "b"])
    part = rows.take(np.array([3, 0, 2]))
    assert [e.dataset for e in part] == ["b", "a", "b"] and part.part_numbers().tolist() == [1, 0, 1]
    assert part[1:].fact("tokens").tolist() == [EXAMPLES[0].length, EXAMPLES[2].length]
    assert [e.prompt for e in part.map(lambda e: replace(e, prompt=[0]))[:2]] == [[0], [0]]
    part.set_reference(2, [0.1, -2.0])
    assert [e.reference for e in part] == [None, None, [0.1, -2.0]] and rows[2].reference is None
    with pytest.raises(IndexError):
        part[3]


def test_a_full_disk_and_what_a_killed_process_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, young = tmp_path / ".saving-rows-00000000", tmp_path / ".saving-rows-11111111"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * store.LEFTOVER,) * 2)
    stored(EXAMPLES, tmp_path / "a.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "a.safetensors"]
    monkeypatch.setattr(store, "SPOOL", 0)

    def full(_: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_new_file", full)
    with pytest.raises(UserError, match=r"the disk of .* is full: .* LOWALIGN_CACHE to a folder on another disk"):
        stored(EXAMPLES, tmp_path / "b.safetensors")
    monkeypatch.setattr(store, "SPOOL", 2**20)
    assert list(stored(EXAMPLES, tmp_path / "b.safetensors")) == EXAMPLES  # few rows stay in memory


def test_a_report_of_another_file_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for content in (b"", b"x" * 2000, (8).to_bytes(8, "little") + json.dumps({"records": 1}).encode()):
        path.write_bytes(content)
        assert open_store(path) is None
    assert open_store(tmp_path / "none.safetensors") is None
