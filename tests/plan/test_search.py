"""The search for the largest value that fits, and the table of cards."""

import pytest

from lowalign.config import cards
from lowalign.errors import UserError
from lowalign.plan.search import largest


@pytest.mark.parametrize("memory", [lambda n: 100 + 3 * n, lambda n: n * n // 50, lambda n: n // 256 * 300], ids=["line", "square", "steps"])  # fmt: skip
@pytest.mark.parametrize("limit", [101, 700, 5_000, 10**6])
def test_the_largest_that_fits(memory, limit):
    expected = max((n for n in range(128, 4097, 128) if memory(n) <= limit), default=None)
    assert largest(memory, limit, 128, 4096, 128) == expected


def test_a_line_takes_few_runs():
    runs = []
    assert largest(lambda n: runs.append(n) or 10**9 + 7 * n, 2 * 10**9, 128, 2**28, 128) == 10**9 // 7 // 128 * 128
    assert len(runs) <= 5


@pytest.mark.parametrize(
    "text,size", [("24GB", 24 * 10**9), ("24 gb", 24 * 10**9), ("22.5GiB", int(22.5 * 2**30)), ("512MiB", 2**29)]
)
def test_sizes(text, size):
    assert cards.memory(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "-1GB", "0GB", "24 giga"])
def test_a_size_that_is_none(text):
    with pytest.raises(UserError, match="expected a size such as 24GB"):
        cards.memory(text)


def test_cards_by_name():
    assert cards.card("nvidia geforce rtx 4090") == ("RTX 4090", cards.CARDS["RTX 4090"])
    with pytest.raises(UserError, match=r'"RTX 4091" is not in the table; did you mean RTX 4090\?'):
        cards.card("RTX 4091")
