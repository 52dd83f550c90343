"""The HTML page of `lowalign report`: what it shows of each run, for the template report.html.jinja.

All of it is data of others. The template escapes every text; here only the SVG of lowalign.report.plot is marked as safe.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lowalign import __version__
from lowalign.report import tables
from lowalign.report.cleaning import cleaning
from lowalign.report.data import data_of_each
from lowalign.report.plot import PLOTTED, Curve, chart, smoothed
from lowalign.report.run_files import Points, RunFiles, is_number, points_of, stages_of
from lowalign.report.samples import samples_of
from lowalign.report.tables import COLORS, Shown

GENERATOR = '<meta name="generator" content="lowalign report'  # in every page, so that it is known again
CONSTANT = 50  # the default moving average has a time constant of 1/50 of the points; none up to 50 points
SECOND = "Throughput, memory, optimizer"  # the second section of charts, and the metrics in it
IN_SECOND = re.compile(r"_per_second|seconds|memory|_gib\b|bytes|tokens|epoch|lr$|grad_norm")
_UNPRINTABLE = re.compile(
    r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)  # not allowed in HTML or UTF-8


def render(
    runs: Sequence[RunFiles], roots: Sequence[Path], in_use: set[Path], smooth: float | None, refresh: int
) -> str:
    """The page. roots: the folders that the user named. in_use: those of running runs. smooth: weight of the moving
    average, None: by the number of points. refresh: seconds after which the page reloads, 0: never."""
    names = _names([run.folder for run in runs])
    shown = [Shown(run, names[i], i, run.folder in in_use) for i, run in enumerate(runs)]
    groups: dict[str, list[Shown]] = {}
    for run in shown:
        groups.setdefault(run.files.verb or "other", []).append(run)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")).render(
        title=", ".join(_names(roots)),
        generator=Markup(GENERATOR),
        version=__version__,
        written=datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
        refresh=refresh,
        runs=shown,
        overview=[tables.overview(run) for run in shown],
        pipelines=[rows for root in roots if (rows := tables.stages(stages_of(root)))],
        groups=[_group(verb, members, smooth) for verb, members in groups.items()],
        tables=tables,
        samples_of=samples_of,
    )
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _group(verb: str, members: Sequence[Shown], smooth: float | None) -> dict[str, Any]:
    """What the page shows of the runs of one verb together."""
    names = {name.removeprefix("eval/"): None for run in members for name in run.files.names()}
    order = [name for name in PLOTTED if name in names] + [name for name in names if name not in PLOTTED]
    smoothed_any = False
    sections: dict[str, list[tuple[str, Markup]]] = {"": [], SECOND: []}
    for name in order:
        kind = SECOND if IN_SECOND.search(name) else ""
        if curves := _curves(name, members, smooth):
            smoothed_any = smoothed_any or any(curve.raw for curve in curves)
            sections[kind].append((name, Markup(chart(name, curves))))
    best_of = [
        Curve(run.name, points, run.color, marked=True) for run in members if (points := _by_n(run.files.results))
    ]
    if best_of:
        sections[""].append(("mean reward of the best of n", Markup(chart("mean reward by n", best_of))))
    return {
        "verb": verb,
        "runs": members,
        "sections": [(title, charts) for title, charts in sections.items() if charts],
        "heldout": any(name.startswith("eval/") for run in members for name in run.files.names()),
        "smoothed": smoothed_any,
        "figures": tables.figures(members),
        "differences": tables.differences(members),
        "data": data_of_each(members),
        "cleaning": [cleaning(run.files) for run in members],
    }


def _curves(name: str, members: Sequence[Shown], smooth: float | None) -> list[Curve]:
    """A metric of all these runs, in training and on held-out rows."""
    curves = []
    alone = len(members) == 1
    for run in members:
        if points := points_of(run.files.metrics, name):
            weight = _weight(points) if smooth is None else smooth
            label = "training" if alone else run.name
            curves.append(
                Curve(label, smoothed(points, weight), run.color, raw=points)
                if weight
                else Curve(label, points, run.color)
            )
        if heldout := points_of(run.files.metrics, f"eval/{name}"):
            color = f"var(--c{(run.at + 1) % COLORS})" if alone else run.color
            curves.append(Curve("held out" if alone else f"{run.name}, held out", heldout, color, marked=True))
    return curves


def _weight(points: Points) -> float:
    """Of the default moving average: by the number of points; 0 for a curve without noise, which turns on few of them."""
    ups = [after[1] > before[1] for before, after in pairwise(points) if after[1] != before[1]]
    turns = sum(a != b for a, b in pairwise(ups))
    return max(0.0, 1 - CONSTANT / len(points)) if turns > len(points) / 10 else 0.0


def _by_n(results: dict[str, Any]) -> list[tuple[float, float]]:
    """The mean reward of the best of n completions, from the report.json of best-of-n."""
    rewards = results.get("mean_reward")
    if not isinstance(rewards, dict):
        return []
    return sorted((int(n), value) for n, value in rewards.items() if n.isdecimal() and len(n) < 9 and is_number(value))


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of these paths that differ from each other."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        length = next((k for k in range(1, len(own)) if sum(p[-k:] == own[-k:] for p in parts) == 1), 1)
        names.append("/".join(own[-length:]))
    return names
