"""The metrics of a run as a picture: a small SVG with one panel for each."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP = 340, 190, 52, 26  # of a panel, in pixels; the margins of its axes
PANELS = 4  # at most
PLOTTED = ("loss", "rewards/accuracies", "rewards/margins", "reward", "kl", "accuracy", "entropy")
COLORS = {"": "#2563eb", "eval/": "#dc2626"}  # by the beginning of a metric's name

Points = list[tuple[float, float]]  # (step, value)


def metrics_plot(file: Path) -> str | None:
    """The SVG of a metrics.jsonl; None when it has nothing to plot. The metrics of evaluations are drawn over those of
    training."""
    panels = []
    lines = _lines(file)
    for name in PLOTTED:
        series = {prefix: _points(lines, prefix + name) for prefix in COLORS}
        if max(map(len, series.values())) > 1:
            panels.append(_panel(name, series, len(panels) * WIDTH))
    if not panels:
        return None
    width = min(len(panels), PANELS) * WIDTH
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}"'
    return (
        f'{head} font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        + "".join([*panels[:PANELS], "</svg>\n"])
    )


def _panel(name: str, series: dict[str, Points], x: int) -> str:
    everything = [point for points in series.values() for point in points]
    steps, values = zip(*everything, strict=True)
    step_range, value_range = (min(steps), max(steps)), (min(values), max(values))
    right, bottom = WIDTH - 12, HEIGHT - 26
    drawn = [f'<g transform="translate({x} 0)"><text x="{LEFT}" y="16" font-weight="bold">{escape(name)}</text>']
    drawn.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#999"/>')
    for value, y in zip(value_range, (bottom, TOP + 8), strict=True):
        drawn.append(f'<text x="{LEFT - 4}" y="{y}" text-anchor="end">{value:.3g}</text>')
    for step, at, anchor in ((step_range[0], LEFT, "start"), (step_range[1], right, "end")):
        drawn.append(f'<text x="{at}" y="{bottom + 14}" text-anchor="{anchor}">{step:g}</text>')
    for i, (prefix, points) in enumerate((prefix, points) for prefix, points in series.items() if points):
        xs = [_scaled(step, step_range, LEFT, right) for step, _ in points]
        ys = [_scaled(value, value_range, bottom, TOP) for _, value in points]
        color, label = COLORS[prefix], "held out" if prefix else "training"
        if len(points) == 1:
            drawn.append(f'<circle cx="{xs[0]:.1f}" cy="{ys[0]:.1f}" r="3" fill="{color}"/>')
        else:
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys, strict=True))
            drawn.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        drawn.append(f'<text x="{right - 60 * i}" y="16" text-anchor="end" fill="{color}">{label}</text>')
    return "\n".join([*drawn, "</g>\n"])


def _scaled(value: float, ends: tuple[float, float], start: float, end: float) -> float:
    """Where a value lies between two places, as it lies between two values."""
    low, high = ends
    return start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)


def _points(lines: Sequence[dict], name: str) -> Points:
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]


def _lines(file: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl; a run that was killed may have left part of one."""
    lines = []
    for raw in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
