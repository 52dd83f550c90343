"""The loss of each row under the base and its adapters: written by `lowalign eval --per-row`, read by --data.losses.

A line is {"source": file:line, "loss": {policy: nats per supervised token}, "tokens": supervised tokens, "key": …}; the
loss is the mean of -log p over the supervised tokens of a row, in the weights of its turns; of preferences, of the best
answers. The key is of the first supervised tokens, so that losses of other rows are not taken for those of these.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lowalign.config.loss_bounds import read_bound
from lowalign.config.sections import DataConfig
from lowalign.data.example import Example
from lowalign.data.examples import as_examples, taken
from lowalign.errors import UserError

KEY_TOKENS = 16


def best_answers(example: Example) -> Iterator[int]:
    """The completions whose loss counts: all, or those of the best rank."""
    for i in range(len(example.completions)):
        if example.rank is None or example.rank[i] == min(example.rank):
            yield i


def row_losses(examples: Sequence[Example], logps: Mapping[str, Sequence[Sequence[float]]]) -> list[dict[str, Any]]:
    """The lines of these Examples, one for each row. logps: by policy, Σ w_t log π of each completion's tokens."""
    rows: dict[str, dict[str, Any]] = {}
    weights: dict[str, float] = {}
    for k, example in enumerate(examples):
        row = rows.setdefault(example.source, {"source": example.source, "loss": {}, "tokens": 0, "key": _key(example)})
        for i in best_answers(example):
            row["tokens"] += sum(example.mask(i))
            weights[example.source] = weights.get(example.source, 0.0) + sum(example.weights(i))
            for policy, sums in logps.items():
                row["loss"][policy] = row["loss"].get(policy, 0.0) - sums[k][i]
    for source, row in rows.items():
        row["loss"] = {policy: nats / (weights.get(source) or 1) for policy, nats in row["loss"].items()}
    return list(rows.values())


def filter_by_loss(examples: Sequence[Example], config: DataConfig) -> tuple[Sequence[Example], dict[str, Any]]:
    """-> the Examples of the rows whose loss is within --data.min-loss and --data.max-loss, and the counts: rows left out above
    and below, and the bounds in nats. Quantiles are over the rows of these Examples; the loss is that of the first policy of the
    file. Raises UserError when a row has no loss in --data.losses, or another one than was measured, and when none is left."""
    if config.losses is None:
        return examples, {}
    place = _place_reader()
    known, policy = _read(config.losses, place)
    _, first, row = np.unique(as_examples(examples).fact("source"), return_index=True, return_inverse=True)
    losses = np.empty(len(first))
    for number in np.argsort(first).tolist():  # in the order of the rows, for the first error
        example = examples[int(first[number])]
        line = known.get(place(example.source))
        if line is None:
            raise UserError(
                f"{example.source} has no loss in --data.losses {config.losses}: measure these files with lowalign eval --per-row"
            )
        if line["key"] != _key(example):
            raise UserError(
                f"{example.source} is another row than the one in --data.losses {config.losses}, or has other tokens: measure "
                "it again with lowalign eval --per-row"
            )
        losses[number] = line["loss"][policy]
    high = _bound(config.max_loss, "--data.max-loss", losses, math.inf)
    low = _bound(config.min_loss, "--data.min-loss", losses, -math.inf)
    kept = np.flatnonzero(((low <= losses) & (losses <= high))[row])
    if not len(kept):
        options = (("--data.min-loss", config.min_loss), ("--data.max-loss", config.max_loss))
        given = " and ".join(f"{flag} {value}" for flag, value in options if value is not None)
        raise UserError(f"no row is left: the loss of none is within {given}")
    counts = {
        "above": int((losses > high).sum()),
        "below": int((losses < low).sum()),
    }
    bounds = {name: value for name, value in (("max_loss", high), ("min_loss", low)) if math.isfinite(value)}
    return taken(examples, kept), {"policy": policy, "rows": len(losses), **counts, **bounds}


def filter_lines(counts: Mapping[str, Any]) -> list[str]:
    """The counts of `filter_by_loss` as lines of text."""
    texts = (("above", "max_loss", "above"), ("below", "min_loss", "below"))
    return [
        f"{counts[kind]:,} of {counts['rows']:,} rows left out: their loss under {counts['policy']} is {word} {counts[bound]:.4g} nats a token"
        for kind, bound, word in texts
        if bound in counts
    ]


def quantile(values: Iterable[float], share: float) -> float:
    """The lowest of the values that at least this share of them do not exceed (nearest rank)."""
    ordered = np.sort(np.array(list(values)))
    return ordered[max(0, math.ceil(round(share * len(ordered), 9)) - 1)].item()


def _bound(option: str | None, flag: str, losses: Iterable[float], otherwise: float) -> float:
    if option is None:
        return otherwise
    number, is_quantile = read_bound(option, flag)
    return quantile(losses, number) if is_quantile else number


def _key(example: Example) -> str:
    """Of the first supervised tokens of the first best answer; the same when the row's end is cut, or its prompt."""
    i = next(best_answers(example))
    ids = [token for token, learned in zip(example.completions[i], example.mask(i), strict=True) if learned]
    return f"{zlib.crc32(json.dumps(ids[:KEY_TOKENS]).encode()):08x}"


def _place_reader() -> Callable[[str], tuple[str, str]]:
    """A function: file:line -> (file, line), the same for every way to write the path of a file, which is looked up once."""

    @cache
    def whole(file: str) -> str:
        path = Path(file).expanduser()
        return str(path.resolve()) if path.exists() else file

    def place(source: str) -> tuple[str, str]:
        file, _, line = source.rpartition(":")
        return whole(file), line

    return place


def _read(file: Path, place: Callable[[str], tuple[str, str]]) -> tuple[dict[tuple[str, str], dict[str, Any]], str]:
    """-> the lines by place, and the first policy. Raises UserError, with file:line, for what is no such line."""
    try:
        raw = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data.losses {file} cannot be read ({error})") from error
    lines = [_line(text, f"{file}:{number}") for number, text in enumerate(raw, 1)]
    if not lines:
        raise UserError(f"--data.losses {file} is empty")
    policy = next(iter(lines[0]["loss"]))
    if lacking := next((line for line in lines if policy not in line["loss"]), None):
        raise UserError(f"{file}: {lacking['source']} has no loss under {policy}, the first policy of the file")
    return {place(line["source"]): line for line in lines}, policy


def _line(text: str, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
        if (
            line["loss"]
            and isinstance(line["key"] + line["source"], str)
            and all(map(math.isfinite, line["loss"].values()))
        ):
            return line
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{where}: no line of lowalign eval --per-row")
