"""The cleaning report: what is wrong with rows that training would take, by file, as JSON and as text."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lowalign.data.cleaning.near import near_duplicates
from lowalign.data.cleaning.words import language_of, refuses
from lowalign.data.dataset import Dataset
from lowalign.data.pack import Example
from lowalign.data.rendering.renderer import LOST_NOTE

MOST_TOKENS = 20_000_000  # rows beyond them are not compared with each other
SAMPLED = 1000  # rows of each file whose answers are read for language and refusals
READ = 200  # tokens of an answer that are read
FEW = 3  # supervised tokens, besides the end of turn, that an answer without letters may have
LISTED = 5  # places of each kind
LEAST_PROMPT = 8  # tokens of a prompt that can be known again
KINDS = {
    "exact": "repeat an earlier row",
    "near": "nearly repeat an earlier row",
    "in_heldout": "are held out too",
    "near_heldout": "are nearly a held-out row",
    "prompt_in_heldout": "have the prompt of a held-out row",
    "empty": "have an answer without a letter or digit",
    "truncated": "are cut",
    "lost": "lose text in the chat template",
}


@dataclass(frozen=True)
class _Row:
    """The Examples of one row of a file, and their ids as one array."""

    where: str
    examples: list[Example]

    def ids(self) -> np.ndarray:
        parts = [part for example in self.examples for part in (example.prompt, *example.completions)]
        return np.fromiter((i for part in parts for i in part), np.uint32, sum(map(len, parts)))

    def content(self) -> tuple[int, ...]:
        """Equal for rows with the same tokens."""
        return tuple(hash((tuple(e.prompt), *map(tuple, e.completions), e.label)) for e in self.examples)

    def prompt(self) -> int | None:
        """Equal for rows with the same prompt; None where it is too short to mean anything."""
        prompt = self.examples[0].prompt
        return hash(tuple(prompt)) if len(prompt) >= LEAST_PROMPT else None


def cleaning_report(
    train: Sequence[Example], heldout: Sequence[Example], data: Dataset, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The counts by source of the rows to train on. data: all that was read; train: its Examples that are not held out.

    sources: by --data FILE, the counts of KINDS, languages and refusals (shares of a sample of its answers), rows, share of
    all rows, lengths (a histogram of tokens, [upper bound, rows] each). places: of each kind the first rows, with the row
    that each repeats. longest: [file:line, tokens]. compared: rows that were compared with each other.
    """
    rows, held = list(_rows(train)), list(_rows(heldout))
    found = _repeats(rows, held)
    found["empty"] = {i: () for i, row in enumerate(rows) if _is_empty(row, tokenizer)}
    files = data.report["files"]
    sources = {file["file"]: _of_file(file) for file in files}
    for file, own in _by_file(rows, data).items():
        source = sources[file]
        source |= {"rows": len(own), "share": len(own) / len(rows)}
        source |= {kind: sum(i in places for i in own) for kind, places in found.items()}
        source |= _read([rows[i] for i in own], tokenizer)
    names = [row.where for row in (*rows, *held)]
    return {
        "compared": sum(1 for _ in _within_limit(rows)),
        "sources": sources,
        "places": {kind: _places(names, places) for kind, places in found.items() if places},
        "longest": sorted((place for file in files for place in file.get("longest", ())), key=lambda p: -p[1])[:LISTED],
    }


def _of_file(file: dict[str, Any]) -> dict[str, Any]:
    """What the data report of a file says already."""
    notes = [(name, count) for name, count in file.get("notes", {}).items()]
    notes += [(name, places["rows"]) for name, places in file.get("dropped", {}).items()]
    return {
        "rows": 0,
        "share": 0.0,
        **dict.fromkeys(KINDS, 0),
        "truncated": sum(file.get("cut", {}).values()),
        "lost": sum(count for name, count in notes if name.startswith(LOST_NOTE)),
        "lengths": file.get("histogram", []),
        "languages": {},
        "refusals": None,
    }


def _rows(examples: Sequence[Example]) -> Iterator[_Row]:
    """A template that rewrites earlier turns makes several Examples of a row, one after the other."""
    row: _Row | None = None
    for example in examples:
        if row is not None and example.source == row.where:
            row.examples.append(example)
            continue
        if row is not None:
            yield row
        row = _Row(example.source, [example])
    if row is not None:
        yield row


def _by_file(rows: Sequence[_Row], data: Dataset) -> dict[str, list[int]]:
    """The rows of each --data FILE, which may be a folder: its Examples follow each other in `data`."""
    names = (file["file"] for file in data.report["files"] for _ in range(file["examples"]))
    origin = {example.source: name for example, name in zip(data.examples, names, strict=True)}
    files: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        files.setdefault(origin[row.where], []).append(i)
    return files


def _within_limit(rows: Sequence[_Row]) -> Iterator[_Row]:
    tokens = 0
    for row in rows:
        tokens += sum(example.length for example in row.examples)
        if tokens > MOST_TOKENS:
            return
        yield row


def _repeats(rows: Sequence[_Row], held: Sequence[_Row]) -> dict[str, dict[int, tuple[Any, ...]]]:
    """By kind: row -> (index of the row that it repeats, of `rows` and then `held`; for near ones also the similarity)."""
    found: dict[str, dict[int, tuple[Any, ...]]] = {kind: {} for kind in KINDS if kind not in ("truncated", "lost")}
    seen: dict[Any, int] = {}
    for i, row in enumerate(rows):
        first = seen.setdefault(row.content(), i)
        if first != i:
            found["exact"][i] = (first,)
    contents = _first(held, len(rows), _Row.content)
    prompts = _first(held, len(rows), _Row.prompt)
    for i, row in enumerate(rows):
        if (place := contents.get(row.content())) is not None:
            found["in_heldout"][i] = (place,)
        elif (place := prompts.get(row.prompt())) is not None:
            found["prompt_in_heldout"][i] = (place,)
    chosen = [i for i, _ in enumerate(_within_limit(rows)) if i not in found["exact"]]
    others = list(_within_limit(held))
    place = [*chosen, *range(len(rows), len(rows) + len(others))]
    within, across = near_duplicates([row.ids() for row in (*(rows[i] for i in chosen), *others)], len(chosen))
    found["near"] = {place[i]: (place[j], round(s, 3)) for i, (j, s) in sorted(within.items())}
    found["near_heldout"] = {
        place[i]: (place[j], round(s, 3)) for i, (j, s) in sorted(across.items()) if place[i] not in found["in_heldout"]
    }
    return found


def _first(rows: Sequence[_Row], start: int, key: Callable[[_Row], Any]) -> dict[Any, int]:
    first: dict[Any, int] = {}
    for i, row in enumerate(rows, start):
        if (value := key(row)) is not None:
            first.setdefault(value, i)
    return first


def _answers(example: Example) -> list[list[int]]:
    """The supervised ids of each completion."""
    pairs = (zip(c, example.mask(k), strict=True) for k, c in enumerate(example.completions))
    return [[i for i, supervised in pair if supervised] for pair in pairs]


def _is_empty(row: _Row, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether an answer of it is short and has no letter or digit in any script."""
    short = (ids for example in row.examples for ids in _answers(example) if len(ids) <= FEW + 1)
    return any(not any(map(str.isalnum, tokenizer.decode(ids, skip_special_tokens=True))) for ids in short)


def _read(rows: Sequence[_Row], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """languages and refusals of the best answers of evenly spaced rows, as shares."""
    step = max(1, len(rows) // SAMPLED)
    texts = []
    for row in rows[::step]:
        example = row.examples[-1]
        best = min(range(len(example.completions)), key=lambda k: example.rank[k] if example.rank else 0)
        texts.append(tokenizer.decode(_answers(example)[best][:READ], skip_special_tokens=True))
    languages = Counter(map(language_of, texts))
    return {
        "languages": {name: round(count / len(texts), 4) for name, count in languages.most_common()},
        "refusals": round(sum(map(refuses, texts)) / len(texts), 4),
    }


def _places(names: Sequence[str], places: dict[int, tuple[Any, ...]]) -> list[list[Any]]:
    """[file:line, the row that it repeats, similarity] of the first ones, as far as there is each."""
    return [
        [names[i], *(names[v] if k == 0 else v for k, v in enumerate(more))]
        for i, more in list(places.items())[:LISTED]
    ]
