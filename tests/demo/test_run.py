"""`lowalign demo`: what its table claims."""

import re

import pytest

from lowalign.demo import run, world
from lowalign.demo.measure import Measured


def test_every_stage_gains_what_it_is_for(capsys):
    assert run.main() == 0
    said = capsys.readouterr().out
    table = {}
    for line in said.splitlines():
        if found := re.match(r"(\S+) +(\d+)% +(\d+)% +([.\d]+) +([.\d]+)(?: +(\d+)% ± (\d+)%)?", line):
            numbers = [float(x) for x in found.groups()[1:] if x is not None]
            table[found[1]] = dict(
                zip(("place", "stopped", "cheerful", "reward", "wins", "half"), numbers, strict=False)
            )
    base, sft = table["base"], table["sft"]
    before, after = map(float, re.search(r"held-out loss: (\S+) -> (\S+)", said).groups())
    assert after < before - 0.2
    assert base["place"] < 20 and sft["place"] >= 90  # of 64 places; chance is 2 %
    assert base["stopped"] < 70 and sft["stopped"] >= 95
    assert 0.3 < sft["cheerful"] < 0.7  # every mood is in the rows: what later stages can raise
    assert float(re.search(r"held-out rankings: ([\d.]+)%", said)[1]) >= 95
    for stage in ("best-of-8", "dpo", "ppo"):
        assert table[stage]["wins"] - table[stage]["half"] > 50, stage
        assert table[stage]["reward"] > sft["reward"] and table[stage]["place"] >= 90
        assert table[stage]["stopped"] >= 95


def test_win_rate_by_hand():
    score = lambda cheerful: world.CardScore(cheerful, 1.0, 1.0)  # noqa: E731
    a = Measured("a", [score(0.9), score(0.5), score(0.1), score(0.8)])
    b = Measured("b", [score(0.1), score(0.5), score(0.4), score(0.2)])
    rate, half = a.against(b)  # won, drawn, lost, won: 1, ½, 0, 1
    assert rate == 0.625
    assert half == pytest.approx(1.96 * (0.6875 / 3) ** 0.5 / 2)  # Σ(w - mean)² = 0.6875
