"""`lowalign demo`: what its table claims."""

import re

from lowalign.demo import run


def test_sft_teaches_to_follow_and_to_stop(capsys):
    assert run.main() == 0
    table = {}
    for line in capsys.readouterr().out.splitlines():
        if found := re.match(r"(base|sft) +(\S+) +(\d+)% +(\d+)% +(\S+)", line):
            table[found[1]] = dict(
                zip(("loss", "place", "stopped", "cheerful"), map(float, found.groups()[1:]), strict=True)
            )
    base, sft = table["base"], table["sft"]
    assert sft["loss"] < base["loss"] - 0.2
    assert base["place"] < 20 and sft["place"] >= 90  # of 64 places; chance is 2 %
    assert base["stopped"] < 70 and sft["stopped"] >= 95
    assert 0.3 < sft["cheerful"] < 0.7  # every mood is in the rows: what later stages can raise
