"""Mixtures of sources: shares, passes, and an order that depends on seed and step alone."""

from collections import Counter

import pytest

from lowalign.config.sections import DataConfig
from lowalign.data.mixture import MixedExamples, Mixture, epoch_length, mixed, order_of, source_names
from lowalign.data.pack import Example, step_order
from lowalign.errors import UserError

FILES = ("chat.jsonl", "refusals.jsonl", "math.jsonl")
SIZES = (700, 40, 260)


def examples(sizes: tuple[int, ...] = SIZES) -> list[Example]:
    names = source_names(FILES)
    return [Example([1], [[i + 1]], dataset=name) for name, size in zip(names, sizes, strict=True) for i in range(size)]


def config(**options: object) -> DataConfig:
    return DataConfig(files=FILES, **options)


def seen(rows: list[Example], batch_size: int, steps: int) -> Counter[str]:
    return Counter(rows[i].dataset for step in range(steps) for i in order_of(rows, batch_size, 0, step))


@pytest.mark.parametrize("batch_size", [1, 7, 16])
@pytest.mark.parametrize("weights", [(3, 1, 1), (1, 1, 1), (0.9, 0.02, 0.08)])
def test_realised_shares_are_within_one_percent_over_2000_steps(weights: tuple[float, ...], batch_size: int) -> None:
    rows = mixed(examples(), config(weights=weights), seed=0)
    counts, total = seen(rows, batch_size, 2000), 2000 * batch_size
    for name, weight in zip(("chat", "refusals", "math"), weights, strict=True):
        assert abs(counts[name] / total - weight / sum(weights)) < 0.01 * weight / sum(weights)
        assert counts[name] / total == rows.mixture.realised(total)[name]


def test_every_stretch_has_its_shares() -> None:
    """Not only the whole run: any 50 steps of 8 are within two examples of their share."""
    rows = mixed(examples(), config(weights=(3, 1, 1)), seed=0)
    for start in range(0, 3000, 50):
        counts = Counter(rows[i].dataset for step in range(start, start + 50) for i in order_of(rows, 8, 0, step))
        assert abs(counts["chat"] - 240) <= 2 and abs(counts["refusals"] - 80) <= 2 and abs(counts["math"] - 80) <= 2


def test_the_order_depends_on_seed_and_step_alone() -> None:
    orders = [
        [order_of(mixed(examples(), config(weights=(1, 1, 1)), seed), 16, seed, step) for step in range(0, 300, 20)]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    resumed = mixed(examples(), config(weights=(1, 1, 1)), seed=0)
    assert [order_of(resumed, 16, 0, step) for step in reversed(range(0, 300, 20))] == orders[0][::-1]


def test_each_pass_over_a_source_has_every_row_once() -> None:
    rows = mixed(examples(), config(weights=(1, 1, 1)), seed=3)
    order = [i for step in range(600) for i in order_of(rows, 4, 3, step)]
    refusals = [i for i in order if rows[i].dataset == "refusals"]
    passes = [refusals[k : k + 40] for k in range(0, 800, 40)]
    assert all(sorted(one) == list(range(700, 740)) for one in passes) and passes[0] != passes[1]


def test_passes_over_each_source() -> None:
    rows = mixed(examples(), config(source_epochs=(1, 5, 0.5)), seed=0)
    assert epoch_length(rows) == 700 + 200 + 130
    counts = seen(rows, 1, epoch_length(rows))
    assert [counts[name] for name in ("chat", "refusals", "math")] == pytest.approx([700, 200, 130], abs=1)


def test_sizes_up_to_a_cap() -> None:
    rows = mixed(examples(), config(cap=100), seed=0)
    assert rows.mixture.shares == pytest.approx([100 / 240, 40 / 240, 100 / 240]) and epoch_length(rows) == 240


def test_a_single_source() -> None:
    """Its Examples have no name of a source."""
    rows = [Example([1], [[i + 1]]) for i in range(30)]
    one = mixed(rows, DataConfig(files=("chat.jsonl",), cap=10), seed=0)
    assert epoch_length(one) == 10 and len({i for step in range(6) for i in order_of(one, 5, 0, step)}) == 30


def test_without_options_the_order_is_that_of_one_source() -> None:
    rows = examples()
    assert mixed(rows, config(), 0) is rows and epoch_length(rows) == 1000
    assert order_of(rows, 8, 5, 17) == step_order(1000, 8, 5, 17)


def test_a_tiny_share_is_not_lost_and_a_weight_of_0_is_none() -> None:
    mixture = Mixture(["a", "b", "c"], [10, 10, 10], [0.99999, 0.00001, 0.0], 30, 0)
    assert 0 < mixture.realised(20_000)["b"] <= 1e-4 and mixture.realised(20_000)["c"] == 0


WRONG = {
    "--data.weights has 2 numbers for 3 sources": {"weights": (1, 2)},
    "--data.source-epochs has 1 numbers for 3 sources": {"source_epochs": (2,)},
    "--data.weights and --data.cap each say how": {"weights": (1, 1, 1), "cap": 5},
    "--data.weights leaves no source to train on": {"weights": (0, 0, 0)},
}


@pytest.mark.parametrize("message", WRONG)
def test_options_that_do_not_fit(message: str) -> None:
    with pytest.raises(UserError, match=message):
        MixedExamples(examples(), config(**WRONG[message]), 0)


def test_a_source_without_rows() -> None:
    with pytest.raises(UserError, match="refusals has no row to train on; leave it out, or give it the weight 0"):
        mixed(examples((5, 0, 5)), config(weights=(1, 1, 1)), 0)
    assert set(seen(mixed(examples((5, 0, 5)), config(weights=(1, 0, 1)), 0), 2, 50)) == {"chat", "math"}


def test_names_of_sources() -> None:
    assert source_names(["x/a.jsonl.gz", "a/b:main:train", "-"]) == ["a", "b:main:train", "-"]
    assert source_names(["x/a.jsonl", "y/a.csv"]) == ["x/a.jsonl", "y/a.csv"]
    assert source_names(["a.jsonl", "a.jsonl"]) == ["a.jsonl", "a.jsonl#2"]
