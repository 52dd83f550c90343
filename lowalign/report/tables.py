"""The tables of a report: overview, stages, figures, options, data, results."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from lowalign.config.verbs import verbs
from lowalign.config.yaml_flags import flag_of
from lowalign.report.local_paths import option_without_paths
from lowalign.report.recipe_summary import NOT_SHOWN, changed
from lowalign.report.run_files import RunFiles, is_number, points_of

COLORS = 8  # of the template
FACTS, LISTED, LONGEST = 60, 8, 200  # entries of a result, numbers of a list, characters of other values that are shown
OVERVIEW = ("loss", "eval/loss", "reward", "kl", "accuracy", "eval/accuracy", "win_rate", "top1")
NOT_FACTS = ("adapters", "base", "metrics", "mean_reward")  # shown elsewhere, or hashes


@dataclass(frozen=True)
class Shown:
    """A run on the page. name: that of its folder, with as many folders above it as tell it from the others. at: its
    place on the page, which decides its color."""

    files: RunFiles
    name: str
    at: int
    in_use: bool

    @property
    def color(self) -> str:
        """In CSS."""
        return f"var(--c{self.at % COLORS})"

    @property
    def state(self) -> str:
        """In a word."""
        if self.in_use:
            return "running"
        return "finished" if self.files.finished else "not finished"


class Figure(NamedTuple):
    """A number as it is shown, and in full for the tooltip."""

    text: str
    full: str = ""


def figure(value: Any, more: str = "") -> Figure:
    """A number with four digits. Anything else as text, in a line."""
    if is_number(value):
        return Figure(f"{value:,}" if isinstance(value, int) else f"{value:.4g}", f"{value!r}{more}")
    if isinstance(value, list) and value and all(map(is_number, value)):
        return Figure(", ".join(figure(item).text for item in value[:LISTED]), json.dumps(value)[:LONGEST])
    return Figure("–" if value is None else value if isinstance(value, str) else json.dumps(value)[:LONGEST])


def overview(run: Shown) -> dict[str, Any]:
    """The run in a line: verb, base, steps and the figures it ended with."""
    files, meta = run.files, run.files.meta
    base = meta.get("base") if isinstance(meta.get("base"), dict) else {}
    last = max((line["step"] for line in files.metrics), default=None)
    merged = meta.get("merge") if isinstance(meta.get("merge"), dict) else {}
    known = (
        files.results
        | merged
        | {name: points[-1][1] for name in files.names() if (points := points_of(files.metrics, name))}
    )
    train = files.recipe.get("train")
    planned = train.get("steps") if isinstance(train, dict) else None
    steps = "–" if last is None else f"{last:,} of {planned:,}" if is_number(planned) else f"{last:,}"
    if is_number(meta.get("step")) and last is not None and meta["step"] != last:
        steps += f", adapter of {meta['step']:,}"
    return {
        "base": option_without_paths(str(base.get("name") or files.recipe.get("model") or "–")),
        "steps": steps,
        "figures": [(name, figure(known[name])) for name in OVERVIEW if is_number(known.get(name))],
        "broken": files.broken,
        "not_finite": sum(
            line[name] is None or (type(line[name]) in (int, float) and not is_number(line[name]))
            for line in files.metrics
            for name in line
        ),
    }


def stages(finished: dict[str, dict[str, Any]]) -> list[tuple[str, str, Figure, list[tuple[str, Figure]]]]:
    """The finished stages of a pipeline: name, verb, seconds, and figures."""
    rows = []
    for name, stage in finished.items():
        own = stage.get("figures") if isinstance(stage.get("figures"), dict) else {}
        numbers = [(key, figure(value)) for key, value in own.items()]
        rows.append((name, str(stage.get("verb", "–")), figure(stage.get("seconds")), numbers))
    return rows


def figures(members: Sequence[Shown]) -> dict[str, Any]:
    """The metrics as numbers. Of one run: first, last, lowest, highest. Of several: the last of each."""
    known = {name for run in members for name in run.files.names()}
    order = dict.fromkeys(name.removeprefix("eval/") for run in members for name in run.files.names())
    names = [name for plain in order for name in (plain, f"eval/{plain}") if name in known]
    columns = ["first", "last", "lowest", "highest"] if len(members) == 1 else [run.name for run in members]
    rows = []
    for name in names:
        cells = []
        for run in members:
            points = points_of(run.files.metrics, name)
            by_value = sorted(points, key=lambda point: point[1])
            chosen = [points[0], points[-1], by_value[0], by_value[-1]] if points else [None] * 4
            cells += [figure(p[1], f" at step {p[0]}") if p else Figure("–") for p in chosen]
        rows.append((name, cells if len(members) == 1 else cells[1::4]))
    return {"columns": columns, "rows": [row for row in rows if any(cell.full for cell in row[1])]}


def differences(members: Sequence[Shown]) -> list[tuple[str, list[str]]]:
    """The options in which these runs differ, with the value of each run. A file of another folder with the same name
    says so."""
    options = [dict(_flat(run.files.recipe)) for run in members]
    rows = []
    for name in dict.fromkeys(name for own in options for name in own):
        values = [own.get(name) for own in options]
        if name in NOT_SHOWN or all(value == values[0] for value in values):
            continue
        texts = [_scalar(value) for value in values]
        if len(set(texts)) == 1:
            texts = [f"{text} (folder {values.index(value) + 1})" for text, value in zip(texts, values, strict=True)]
        rows.append((name, texts))
    return rows


def recipe_text(run: RunFiles) -> str:
    """The options that differ from the defaults, as YAML; "" for none."""
    options = _without_paths(changed(run.recipe))
    return yaml.safe_dump(options, sort_keys=False, allow_unicode=True) if options else ""


def command(run: RunFiles) -> tuple[str, bool] | None:
    """The command that repeats the run, in another folder, and whether it can be typed as it is: a verb that takes no recipe
    gets its options, with names instead of paths. None for a folder without a recipe."""
    verb = next((verb for verb in verbs() if verb.name == run.verb), None)
    if verb is None or not run.recipe:
        return None
    again = shlex.quote(f"{run.folder}-again")
    if verb.takes_recipe:
        return f"lowalign {verb.name} {shlex.quote(str(run.folder / 'recipe.yaml'))} --out {again}", True
    words = []
    for name, value in _flat(changed(run.recipe)):
        values = option_without_paths(value if isinstance(value, list) else [value])
        if isinstance(value, bool):
            words.append(flag_of(name) if value else flag_of(name).replace("--", "--no-", 1))
        elif value is not None and _is_flag(name):
            words += [flag_of(name), *(shlex.quote(str(item)) for item in values)]
    return " ".join(["lowalign", verb.name, *words, "--out", again]), False


def _is_flag(name: str) -> bool:
    """Whether a key of a recipe can be written as a flag: words with dots."""
    return name.replace(".", "").replace("_", "").isalnum()


def results(run: RunFiles) -> list[tuple[str, Figure]]:
    """The entries of report.json or result.json, and of a merge, with dotted names."""
    merged = run.meta.get("merge")
    both = {**run.results, **(merged if isinstance(merged, dict) else {})}
    both = {name: value for name, value in both.items() if not _is_table(value)}
    entries = [
        (name, figure(option_without_paths(value)))
        for name, value in _flat(both)
        if name.split(".")[0] not in NOT_FACTS
    ]
    return entries[:FACTS]


def result_tables(run: RunFiles) -> list[tuple[str, list[str], list[list[Figure]]]]:
    """The entries of result.json that are lists of objects, such as the ratings of compare: name, columns, rows."""
    lists = []
    for name, value in run.results.items():
        if _is_table(value):
            columns = list(dict.fromkeys(key for row in value for key in row))
            rows = [[figure(option_without_paths(row.get(key))) for key in columns] for row in value[:FACTS]]
            lists.append((name, columns, rows))
    return lists


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _flat(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything that is no mapping."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _without_paths(options: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_paths(v) if isinstance(v, dict) else option_without_paths(v) for k, v in options.items()}


def _scalar(value: Any) -> str:
    shown = option_without_paths(value)
    if isinstance(shown, list):
        return ", ".join(map(str, shown)) or "none"
    return "–" if shown is None else str(shown)
