"""The cleaning report of a run (lowalign.data.cleaning), for the page of `lowalign report`."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from markupsafe import Markup

from lowalign.report.local_paths import option_without_paths
from lowalign.report.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, tick_text, ticks
from lowalign.report.run_files import RunFiles, is_number
from lowalign.report.tables import Figure, figure

COUNTS = {
    "exact": "repeat an earlier row",
    "near": "nearly repeat one",
    "in_heldout": "held out too",
    "near_heldout": "nearly held out",
    "prompt_in_heldout": "prompt held out",
    "empty": "empty answer",
    "truncated": "cut",
    "lost": "lost in the template",
}
PLACES = 5  # of each kind
BARS = 40


def cleaning(run: RunFiles) -> dict[str, Any] | None:
    """columns and rows of the table, one row a file; histograms of its lengths; notes with the first places. None where the
    run has no such report."""
    report = run.data.get("cleaning")
    sources = report.get("sources") if isinstance(report, dict) else None
    if not isinstance(sources, dict):
        return None
    files = {option_without_paths(name): own for name, own in sources.items() if isinstance(own, dict)}
    used = [kind for kind in COUNTS if any(is_number(own.get(kind)) and own[kind] for own in files.values())]
    return {
        "columns": ["rows", "share", *(COUNTS[kind] for kind in used), "refusals", "languages"],
        "rows": [(name, _cells(own, used)) for name, own in files.items()],
        "histograms": [
            (name, Markup(_histogram(name, bars)))
            for name, own in files.items()
            if len(bars := _bars(own.get("lengths"))) > 1
        ],
        "notes": list(_notes(report)),
    }


def _cells(own: dict[str, Any], used: Sequence[str]) -> list[Figure]:
    languages = own.get("languages")
    shares = languages.items() if isinstance(languages, dict) else ()
    texts = [f"{name} {share:.0%}" for name, share in shares if is_number(share) and share >= 0.005]
    counts = [figure(own.get(kind)) for kind in used]
    return [
        figure(own.get("rows")),
        _percent(own.get("share")),
        *counts,
        _percent(own.get("refusals")),
        Figure(", ".join(texts[:4]) or "–"),
    ]


def _percent(value: Any) -> Figure:
    return Figure(f"{value:.1%}", repr(value)) if is_number(value) else Figure("–")


def _notes(report: dict[str, Any]) -> Iterator[str]:
    """The first places of each kind, and the longest rows."""
    places = report.get("places")
    for kind, meaning in COUNTS.items():
        own = places.get(kind) if isinstance(places, dict) else None
        if isinstance(own, list) and own:
            yield f"{meaning}, first: {', '.join(map(_place, own[:PLACES]))}"
    longest = report.get("longest")
    pairs = [p for p in longest if isinstance(p, list) and len(p) == 2] if isinstance(longest, list) else []
    if pairs:
        yield "longest: " + ", ".join(
            f"{option_without_paths(str(where))} ({tokens} tokens)" for where, tokens in pairs[:PLACES]
        )


def _place(place: Any) -> str:
    """rows.jsonl:7 = :3, in another file with its name; rows.jsonl:7 ~ :3 (82%) where they are only alike."""
    parts = place if isinstance(place, list) and place else [place]
    where, *other = (option_without_paths(str(part)) for part in parts[:2])
    if not other:
        return where
    file, _, line = other[0].rpartition(":")
    same = f":{line}" if file and where.startswith(f"{file}:") else other[0]
    alike = parts[2] if len(parts) > 2 else None
    return f"{where} ~ {same} ({alike:.0%})" if is_number(alike) else f"{where} = {same}"


def _bars(value: Any) -> list[tuple[float, float]]:
    pairs = value if isinstance(value, list) else []
    bars = [(p[0], p[1]) for p in pairs if isinstance(p, list) and len(p) == 2 and all(map(is_number, p)) and p[1] >= 0]
    return bars[:BARS] if any(count for _, count in bars) else []


def _histogram(name: str, bars: Sequence[tuple[float, float]]) -> str:
    """Rows by tokens, one bar for each upper bound; the exact count is its tooltip."""
    most = max(count for _, count in bars)
    wide = (RIGHT - LEFT) / len(bars)
    drawn = [f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#999"/>']
    for value in ticks(0, most, whole=True):
        y = BOTTOM - (BOTTOM - TOP) * value / most
        drawn.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#999" stroke-opacity=".25"/>')
        drawn.append(f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{tick_text(value)}</text>')
    every = -(-len(bars) // 8)
    for i, (bound, count) in enumerate(bars):
        x, tall = LEFT + i * wide, (BOTTOM - TOP) * count / most
        tip = escape(f"{count:,} rows of at most {bound:,} tokens")
        drawn.append(
            f'<rect x="{x + 1:.1f}" y="{BOTTOM - tall:.1f}" width="{max(wide - 2, 1):.1f}" height="{tall:.1f}" fill="var(--c0)">'
            f"<title>{tip}</title></rect>"
        )
        if i % every == 0:
            drawn.append(
                f'<text x="{x + wide / 2:.1f}" y="{BOTTOM + 14}" text-anchor="middle">{tick_text(bound)}</text>'
            )
    described = escape(f"rows of {name} by tokens")
    return f'<svg viewBox="0 {TOP - 14} {WIDTH} {HEIGHT - TOP + 14}" role="img" aria-label="{described}">{"".join(drawn)}</svg>'
