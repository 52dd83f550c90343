"""The tables of docs/sources.md, in part: each source gives the same Examples as JSONL, and the page is up to date."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lowalign.data.rows.columns import typed
from lowalign.data.sources.row import Row

ROOT = Path(__file__).parents[1]
SHAPES = ("messages with tools", "pairs, sharegpt", "trees (preset oasst-rankings)")
KINDS = ("jsonl", "csv", "bz2", "parquet", "glob", "stdin", "saved", "Dataset", "Hub")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import sources

    return lambda *options: sources.page(None, *options).splitlines()


def test_every_kind_of_source_gives_the_same(page: Callable[..., list[str]]) -> None:
    used = dict(zip(SHAPES, ("2/2", "1/1", "2/2"), strict=True))
    lines = page(SHAPES, KINDS, ("ChatML with tools",))
    for shape in SHAPES:
        first, *_ = (line for line in lines if line.startswith(f"| {shape} |"))
        assert [cell.strip() for cell in first.split("|")[2:-1]] == [f"{used[shape]} ="] * len(KINDS)


def test_the_page_is_up_to_date(page: Callable[..., list[str]]) -> None:
    """Without the real files, which not every machine has; of the kinds of source, the first."""
    stored = (ROOT / "docs/sources.md").read_text(encoding="utf-8").splitlines()
    import sources

    lines = [line for line in page(tuple(sources.SHAPES), ("jsonl",)) if line.startswith("| ")]
    first, rest = lines[: 1 + len(sources.SHAPES)], lines[1 + len(sources.SHAPES) :]
    kinds = [line for line in stored if line.startswith("| ")][: len(first)]
    assert [line.split("|")[1:3] for line in kinds] == [line.split("|")[1:3] for line in first]
    assert kinds[0] == f"| rows | {' | '.join(sources.KINDS)} |"
    assert all(line in stored for line in rest) and len(rest) > 30


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ('{"role": "assistant", "content": "a"}', {"role": "assistant", "content": "a"}),
        (' {"from": "gpt", "value": "a"}', {"from": "gpt", "value": "a"}),
        ('{"name": "weather"}', '{"name": "weather"}'),  # an answer in JSON
        ("{}", "{}"),
        ('{"role": broken}', '{"role": broken}'),
    ],
)
def test_a_turn_in_a_cell(cell: str, value: object) -> None:
    assert typed(Row({"chosen": cell, "text": cell}, "f.csv", 2, untyped=True)) == {"chosen": value, "text": cell}
