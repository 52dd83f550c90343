"""Names instead of paths in the options of a recipe."""

import pytest

from lowalign.report.local_paths import option_without_paths


@pytest.mark.parametrize(
    "value, shown",
    [
        ("/home/me/models/base", "base"),
        ("/home/me/my models/base 2", "base 2"),
        ("~/models/base/", "base"),
        ("C:\\models\\base", "base"),
        ("../runs/first", "first"),
        ("data/rows.jsonl", "rows.jsonl"),
        ("0.5*/home/me/rules.py:score", "0.5*rules.py:score"),
        ("2*rewards/rules.py:score", "2*rules.py:score"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("them/rows:train", "them/rows:train"),
        ("0.5*runs/reward", "0.5*runs/reward"),
        ("sft.jsonl", "sft.jsonl"),
        ("a prompt / a completion", "a prompt / a completion"),
        (["/data/a.jsonl", "them/rows"], ["a.jsonl", "them/rows"]),
        (None, None),
        (0.5, 0.5),
    ],
)
def test_option(value, shown):
    assert option_without_paths(value) == shown
