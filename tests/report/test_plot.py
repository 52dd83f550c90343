"""Smoothing against its formula, thinning, ticks, and SVG that parses whatever the numbers and names are."""

import math
import random
import xml.etree.ElementTree as ET

import pytest

from lowalign.report import plot
from lowalign.report.plot import Curve, chart, smoothed, thinned, tick_text, ticks


def test_smoothing_is_the_bias_corrected_average():
    rng = random.Random(0)
    values = [rng.gauss(0, 1) for _ in range(40)]
    for weight in (0.0, 0.6, 0.95):
        result = smoothed([(10 * i, v) for i, v in enumerate(values)], weight)
        assert [step for step, _ in result] == [10 * i for i in range(40)]
        for i, (_, mean) in enumerate(result):
            weights = [weight ** (i - j) for j in range(i + 1)]
            expected = math.fsum(w * v for w, v in zip(weights, values, strict=False)) / math.fsum(weights)
            assert mean == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert [v for _, v in smoothed([(0, 2.0), (1, 4.0), (2, 0.0)], 0.5)] == pytest.approx(
        [2, 10 / 3, 10 / 7]
    )  # by hand


def test_thinning_keeps_every_extreme():
    rng = random.Random(1)
    points = [(i, rng.gauss(0, 1)) for i in range(10_001)]
    points[7_777], points[4_321] = (7_777, 50.0), (4_321, -50.0)
    kept = thinned(points, 400)
    assert len(kept) <= 400 and kept == sorted(kept) and set(kept) <= set(points)
    assert {points[7_777], points[4_321]} <= set(kept)
    assert thinned(points[:400], 400) == points[:400]


def test_ticks():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.82, 1.23) == pytest.approx([0.9, 1.0, 1.1, 1.2])
    assert ticks(0, 2, whole=True) == [0, 1, 2]
    assert ticks(3, 3) == [3]
    assert [tick_text(v) for v in (0.15, 20000, 1500, 2.5e6, 1e-5, -30000)] == [
        *("0.15", "20k", "1500", "2.5M", "1e-05", "-30k")
    ]
    for low, high in [(0, 5e-324), (1e16, 1e16 + 2), (-1e150, 1e150), (1.0, math.nextafter(1.0, 2))]:
        values = ticks(low, high)
        assert 1 <= len(values) <= 12 and all(map(math.isfinite, values))


def heights(svg: str) -> list[list[float]]:
    lines = ET.fromstring(svg).iter("polyline")
    return [[float(point.split(",")[1]) for point in line.get("points").split()] for line in lines]


def test_a_chart_draws_the_values():
    points = [(0, 4.0), (10, 2.0), (20, 1.0), (30, 3.0)]
    (line,) = heights(chart("loss", [Curve("training", points, "red")]))
    # Heights are linear in the values, downward.
    scale = (line[1] - line[0]) / 2
    assert scale > 0 and [y - line[0] for y in line] == pytest.approx([0, 2 * scale, 3 * scale, scale], abs=0.2)
    told = [title.text for title in ET.fromstring(chart("loss", [Curve("a", points, "red")])).iter("title")]
    assert told == ["a, 0: 4.0", "a, 10: 2.0", "a, 20: 1.0", "a, 30: 3.0"]


@pytest.mark.parametrize("values", [[1e150, -1e150], [0, 5e-324], [0.0], [7, 7, 7], [10**140, 1]])
def test_no_number_breaks_a_chart(values):
    name = "</svg><script>alert(1)</script>\"' onload=x"
    root = ET.fromstring(chart(name, [Curve(name, list(enumerate(values)), "red", marked=True)]))
    assert root.get("aria-label").startswith(name) and not list(root.iter("script"))
    for element in root.iter():
        numbers = [value for key, value in element.attrib.items() if key in ("cx", "cy", "x", "y", "points")]
        assert not any("nan" in text or "inf" in text for text in numbers)
        for key, most in (("cx", plot.WIDTH), ("cy", plot.HEIGHT)):
            assert 0 <= float(element.get(key, 0)) <= most
