"""Metrics as SVG: the small plot of a model card, and the charts of a report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lowalign.report.run_files import Points, points_of, read_metrics

WIDTH, HEIGHT, LEFT, TOP = 340, 190, 52, 26  # of a panel, in pixels; the margins of its axes
RIGHT, BOTTOM = WIDTH - 16, HEIGHT - 26  # the ends of its axes
PANELS = 4  # in the plot of a card, at most
PLOTTED = ("loss", "rewards/accuracies", "rewards/margins", "reward", "kl", "accuracy", "entropy")
COLORS = {"": "#2563eb", "eval/": "#dc2626"}  # by the beginning of a metric's name
DRAWN = 400  # points of a line, at most
HOVER = 60  # a curve with at most this many points shows each one's values under the mouse


@dataclass(frozen=True)
class Curve:
    """A line of a panel. raw: values to draw faintly behind it. color: as in CSS. marked: a circle on each point, dashes
    between them."""

    label: str
    points: Points
    color: str
    raw: Points = ()
    marked: bool = False


def metrics_plot(file: Path) -> str | None:
    """The SVG of a metrics.jsonl; None when it has nothing to plot. The metrics of evaluations are drawn over those of
    training."""
    lines, _ = read_metrics(file)
    panels = []
    for name in PLOTTED:
        series = {prefix: points_of(lines, prefix + name) for prefix in COLORS}
        if max(map(len, series.values())) > 1:
            curves = [Curve("held out" if p else "training", points, COLORS[p]) for p, points in series.items()]
            at = len(panels) * WIDTH
            panels.append(f'<g transform="translate({at} 0)">{_title(name, curves)}{panel(curves)}</g>\n')
    if not panels:
        return None
    width = min(len(panels), PANELS) * WIDTH
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}"'
    return (
        f'{head} font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        + "".join([*panels[:PANELS], "</svg>\n"])
    )


def chart(name: str, curves: Sequence[Curve], whole: bool = True) -> str:
    """One panel as an SVG that is as wide as its place in an HTML page; the page's style gives it fonts and colors.

    whole: the places on the x axis are whole numbers, as steps are.
    """
    described = f"{name}: {', '.join(curve.label for curve in curves)}"
    head = f'<svg viewBox="0 {TOP - 14} {WIDTH} {HEIGHT - TOP + 14}" role="img" aria-label="{escape(described)}">'
    points = "".join(_hover(curve, curves) for curve in curves if len(curve.raw or curve.points) <= HOVER)
    return f"{head}{panel(curves, whole)}{points}</svg>"


def panel(curves: Sequence[Curve], whole: bool = True) -> str:
    """Axes with ticks, and the curves. Nothing but elements of SVG; every text in it is escaped."""
    xs, ys = _ranges(curves)
    drawn = [f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#999"/>']
    for value in ticks(*ys):
        y = _scaled(value, ys, BOTTOM, TOP)
        drawn.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#999" stroke-opacity=".25"/>')
        drawn.append(_text(LEFT - 4, y + 4, tick_text(value), "end"))
    for value in ticks(*xs, whole=whole):
        drawn.append(_text(_scaled(value, xs, LEFT, RIGHT), BOTTOM + 14, tick_text(value), "middle"))
    for curve in curves:
        if curve.raw:
            drawn.append(_line(curve.raw, xs, ys, f'stroke="{curve.color}" stroke-opacity=".3"'))
        dashes = ' stroke-dasharray="4 3"' if curve.marked else ""
        if len(curve.points) > 1:
            drawn.append(_line(curve.points, xs, ys, f'stroke="{curve.color}" stroke-width="1.5"{dashes}'))
        if len(curve.points) == 1 or (curve.marked and len(curve.points) <= HOVER):
            for x, y in curve.points:
                at = f'cx="{_scaled(x, xs, LEFT, RIGHT):.1f}" cy="{_scaled(y, ys, BOTTOM, TOP):.1f}"'
                drawn.append(f'<circle {at} r="{2.5 if curve.marked else 3}" fill="{curve.color}"/>')
    return "\n".join(drawn)


def smoothed(points: Points, weight: float) -> Points:
    """The exponential moving average s_i = Σ_j w^(i-j) v_j / Σ_j w^(i-j) over j ≤ i, w = weight in [0, 1)."""
    total = norm = 0.0
    means = []
    for x, value in points:
        total, norm = weight * total + value, weight * norm + 1
        means.append((x, total / norm))
    return means


def thinned(points: Points, most: int = DRAWN) -> Points:
    """At most `most` of the points: of equal parts of the curve the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return points
    parts = most // 2
    kept = []
    for k in range(parts):
        part = range(k * len(points) // parts, (k + 1) * len(points) // parts)
        ends = {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return kept


def ticks(low: float, high: float, whole: bool = False, count: int = 5) -> list[float]:
    """Round numbers from low to high, about `count`; 1, 2 or 5 times a power of ten apart. whole: whole numbers."""
    apart = max((high - low) / count, 1.0 if whole else 0.0)
    if not high > low or apart == 0 or not math.isfinite(apart):
        return [low]
    power = 10.0 ** math.floor(math.log10(apart))
    apart = next((m * power for m in (1, 2, 5, 10) if m * power >= apart), apart)
    if apart == 0:  # smaller than any number but 0
        return [low]
    return [k * apart for k in range(math.ceil(low / apart), math.floor(high / apart) + 1)] or [low]


def tick_text(value: float) -> str:
    """A number in a few characters: 20000 is 20k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size <= abs(value) < 1e13:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.5g}"


def _ranges(curves: Sequence[Curve]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Lowest and highest x, and the same of the values, with a little room for the lines."""
    xs, ys = zip(*(point for curve in curves for point in (*curve.points, *curve.raw)), strict=True)
    room = (max(ys) - min(ys)) / 20
    return (min(xs), max(xs)), (min(ys) - room, max(ys) + room)


def _line(points: Points, xs: tuple[float, float], ys: tuple[float, float], look: str) -> str:
    places = (
        (_scaled(x, xs, LEFT, RIGHT), _scaled(y, ys, BOTTOM, TOP))
        for x, y in thinned(points)
    )  # fmt: skip
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{line}" fill="none" {look}/>'


def _hover(curve: Curve, curves: Sequence[Curve]) -> str:
    """Circles that cannot be seen and have a tooltip: the curve's label, the step and the value as it is in the file."""
    xs, ys = _ranges(curves)
    circles = []
    for x, y in curve.raw or curve.points:
        at = f'cx="{_scaled(x, xs, LEFT, RIGHT):.1f}" cy="{_scaled(y, ys, BOTTOM, TOP):.1f}"'
        told = escape(f"{curve.label}, {x:g}: {y!r}")
        circles.append(f'<circle {at} r="5" fill-opacity="0"><title>{told}</title></circle>')
    return "".join(circles)


def _title(name: str, curves: Sequence[Curve]) -> str:
    """The name of a card's panel, and the labels of its curves."""
    title = f'<text x="{LEFT}" y="16" font-weight="bold">{escape(name)}</text>'
    labels = [(curve.label, curve.color) for curve in curves if curve.points]
    return title + "".join(
        f'<text x="{RIGHT - 60 * i}" y="16" text-anchor="end" fill="{color}">{escape(label)}</text>'
        for i, (label, color) in enumerate(labels)
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _scaled(value: float, ends: tuple[float, float], start: float, end: float) -> float:
    """Where a value lies between two places, as it lies between two values."""
    low, high = ends
    return start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)
