"""The cleaning report as text: a table with a line for each file, and what is wrong with the first places."""

from typing import Any

from lowalign.data.cleaning.report import KINDS
from lowalign.log import aligned

COLUMNS = {
    "exact": "exact",
    "near": "near",
    "in_heldout": "held out",
    "near_heldout": "near it",
    "prompt_in_heldout": "its prompt",
}
COLUMNS |= {"empty": "empty", "truncated": "cut", "lost": "lost"}


def table(report: dict[str, Any]) -> list[str]:
    """A line for each file: its share of all rows, the kinds that occur, languages and refusals."""
    sources = report["sources"]
    used = [kind for kind in KINDS if any(source[kind] for source in sources.values())]
    lines = [["file", "rows", "share", *(COLUMNS[kind] for kind in used), "refusals", "languages"]]
    for name, source in sources.items():
        languages = ", ".join(
            f"{language} {share:.0%}" for language, share in list(source["languages"].items())[:3] if share >= 0.005
        )
        refusals = "-" if source["refusals"] is None else f"{source['refusals']:.1%}"
        counts = [f"{source[kind]:,}" for kind in used]
        lines.append([name, f"{source['rows']:,}", f"{source['share']:.1%}", *counts, refusals, languages or "-"])
    return aligned(lines)


def cleaning_lines(report: dict[str, Any]) -> list[str]:
    """What is wrong, in a line for each kind that occurs, with the first places."""
    lines = []
    for kind, meaning in KINDS.items():
        count = sum(source[kind] for source in report["sources"].values())
        if count:
            places = ", ".join(_place(*place) for place in report["places"].get(kind, []))
            lines.append(f"{count:,} rows {meaning}" + (f" (first: {places})" if places else ""))
    rows = sum(source["rows"] for source in report["sources"].values())
    if report["compared"] < rows:
        lines.append(f"only the first {report['compared']:,} of {rows:,} rows were compared for near repetitions")
    return lines


def longest_lines(report: dict[str, Any]) -> list[str]:
    """The longest rows."""
    return [f"longest: {where}, {tokens:,} tokens" for where, tokens in report["longest"]]


def _place(where: str, other: str = "", similarity: float | None = None) -> str:
    """rows.jsonl:7 = :3, in another file with its name; rows.jsonl:7 ~ :3 (82%) where they are only alike."""
    if not other:
        return where
    file, _, line = other.rpartition(":")
    other = f":{line}" if where.startswith(f"{file}:") else other
    return f"{where} = {other}" if similarity is None else f"{where} ~ {other} ({similarity:.0%})"
