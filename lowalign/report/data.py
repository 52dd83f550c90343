"""The data report of a run, for the page of `lowalign report`."""

from collections.abc import Iterator, Sequence
from typing import Any

from lowalign.report.local_paths import is_local_path, name_of, option_without_paths
from lowalign.report.run_files import RunFiles, is_number
from lowalign.report.tables import Figure, Shown, figure

DATA = {
    "rows": "rows",
    "used": "used",
    "examples": "examples",
    "bad": "bad",
    "duplicates": "repeated",
    "tokens": "tokens",
    "supervised_tokens": "supervised tokens",
}


def data_of_each(members: Sequence[Shown]) -> list[tuple[str, list[dict[str, Any]]]]:
    """For each run the name of an earlier one with the same data ("" where there is none), and the files else."""
    files = [data(run.files) for run in members]
    first = [next(j for j, other in enumerate(files) if other == own) for own in files]
    return [(members[j].name, []) if j < i and files[i] else ("", files[i]) for i, j in enumerate(first)]


def data(run: RunFiles) -> list[dict[str, Any]]:
    """The files of data_report.json: a name, counts and lengths, and notes."""
    parts = [part for part in run.data.values() if isinstance(part, dict) and isinstance(part.get("files"), list)]
    return [
        {
            "file": option_without_paths(str(file.get("file"))),
            "heldout": part.get("heldout") is True,
            "counts": [(label, figure(file[key])) for key, label in DATA.items() if is_number(file.get(key))],
            "lengths": list(_lengths(file)),
            "notes": list(_notes(file)),
        }
        for part in parts
        for file in part["files"]
        if isinstance(file, dict)
    ]


def _lengths(file: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, Figure]]]]:
    """For prompt, completion and total: minimum, median, 95th percentile and maximum of their tokens."""
    for name, spread in _items(file, "lengths"):
        if isinstance(spread, dict) and spread:
            yield name, [(label, figure(value)) for label, value in spread.items()]


def _notes(file: dict[str, Any]) -> Iterator[str]:
    """What happened to rows, in a line each."""
    ends = dict(_items(file, "end_of_turn"))
    if is_number(ends.get("turns")):
        yield f"end of turn in the loss: {ends.get('ended')} of {ends['turns']}"
    for reason, places in _items(file, "dropped"):
        first = [_place(place) for place in places.get("first") or ()] if isinstance(places, dict) else []
        count = places.get("rows") if isinstance(places, dict) else places
        yield f"{count} dropped: {reason}" + (f" (first: {', '.join(first)})" if first else "")
    for kind, count in _items(file, "cut"):
        yield f"{count} too long: cut ({kind})"
    if columns := [name for name, _ in _items(file, "ignored_columns")]:
        yield f"columns not used: {', '.join(columns)}"
    for note, count in _items(file, "notes"):
        yield f"{count}: {note}"


def _place(place: Any) -> str:
    return name_of(place) if isinstance(place, str) and (is_local_path(place) or "/" in place) else str(place)


def _items(owner: dict[str, Any], name: str) -> list[tuple[str, Any]]:
    value = owner.get(name)
    return list(value.items()) if isinstance(value, dict) else []
