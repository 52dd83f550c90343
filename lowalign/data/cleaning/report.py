"""The cleaning report: what is wrong with rows that training would take, by file, as JSON and as text."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lowalign.data.cleaning.near import Near, near_duplicates
from lowalign.data.cleaning.words import language_of, refuses
from lowalign.data.dataset import Dataset
from lowalign.data.example import Example
from lowalign.data.examples import Examples, as_examples
from lowalign.data.rendering.renderer import LOST_NOTE

MOST_TOKENS = 20_000_000  # rows beyond them are not compared with each other
SAMPLED = 1000  # rows of each file whose answers are read for language and refusals
READ = 200  # tokens of an answer that are read
FEW = 3  # supervised tokens, besides the end of turn, that an answer without letters may have
LISTED = 5  # places of each kind
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
class _Rows:
    """The rows of a file: a template that rewrites earlier turns makes several Examples of a row, one after the other.

    first (R + 1,): the first Example of each row, and the end. content, prompt (R,): hashes, equal for rows with the same tokens
    (with the same prompt; 0: too short to mean anything). tokens (R,).
    """

    examples: Examples
    first: np.ndarray
    content: np.ndarray
    prompt: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "_Rows":
        own = as_examples(examples)
        source = own.fact("source")
        starts = np.flatnonzero(np.diff(source, prepend=~source[:1]) != 0)
        place = np.arange(len(source)) - np.repeat(starts, np.diff(starts, append=len(source)))
        # Each content times an odd number that depends on its place in the row, so that an order counts.
        parts = own.fact("content") * (2 * place.astype(np.uint64) + np.uint64(1))
        summed = lambda values: np.add.reduceat(values, starts) if len(starts) else values  # noqa: E731
        first = np.append(starts, len(source))
        return cls(own, first, summed(parts), own.fact("prompt")[starts], summed(own.fact("tokens").astype(np.int64)))

    def __len__(self) -> int:
        return len(self.tokens)

    def where(self, i: int) -> str:
        """The place of a row."""
        return self.examples[int(self.first[i])].source

    def row(self, i: int) -> list[Example]:
        """The Examples of a row."""
        return [self.examples[k] for k in range(self.first[i], self.first[i + 1])]

    def ids(self, i: int) -> np.ndarray:
        """All its tokens."""
        parts = [part for example in self.row(i) for part in (example.prompt, *example.completions)]
        return np.fromiter(chain.from_iterable(parts), np.uint32, sum(map(len, parts)))

    def within_limit(self) -> int:
        """How many rows, from the first, have at most MOST_TOKENS tokens."""
        return int(np.searchsorted(np.cumsum(self.tokens), MOST_TOKENS, side="right"))


@dataclass(frozen=True)
class _Ids(Sequence[np.ndarray]):
    """The tokens of some rows, read when they are asked for. place: which, of `rows` and then of `held`."""

    rows: _Rows
    held: _Rows
    place: np.ndarray

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, k: int) -> np.ndarray:
        i = int(self.place[k])
        return self.rows.ids(i) if i < len(self.rows) else self.held.ids(i - len(self.rows))


@dataclass(frozen=True)
class _Found:
    """Rows of one kind, ascending: `rows`, the rows that they repeat, of those to train on and then the held-out ones, and how alike
    they are; empty where there is no such row."""

    rows: np.ndarray
    others: Sequence[int] = ()
    similarities: Sequence[float] = ()


def cleaning_report(
    train: Sequence[Example], heldout: Sequence[Example], data: Dataset, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The counts by source of the rows to train on. data: all that was read; train: its Examples that are not held out.

    sources: by --data FILE, the counts of KINDS, languages and refusals (shares of a sample of its answers), rows, share of
    all rows, lengths (a histogram of tokens, [upper bound, rows] each). places: of each kind the first rows, with the row
    that each repeats. longest: [file:line, tokens]. compared: rows that were compared with each other.
    """
    rows, held = _Rows.of(train), _Rows.of(heldout)
    found = _repeats(rows, held)
    found["empty"] = _Found(_empty_rows(rows, tokenizer))
    files = data.report["files"]
    sources = {file["file"]: _of_file(file) for file in files}
    part = rows.examples.part_numbers()[rows.first[:-1]]
    numbers = {name: [k for k, file in enumerate(files) if file["file"] == name] for name in sources}
    for name, source in sources.items():
        own = np.isin(part, numbers[name])
        if own.any():
            source |= {"rows": int(own.sum()), "share": int(own.sum()) / len(rows)}
            source |= {kind: int(own[places.rows].sum()) for kind, places in found.items()}
            source |= _read(rows, np.flatnonzero(own), tokenizer)
    where = lambda i: rows.where(i) if i < len(rows) else held.where(i - len(rows))  # noqa: E731
    return {
        "compared": rows.within_limit(),
        "sources": sources,
        "places": {kind: _places(where, places) for kind, places in found.items() if len(places.rows)},
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


def _repeats(rows: _Rows, held: _Rows) -> dict[str, _Found]:
    """By kind, as far as it can be told from tokens alone."""
    total = len(rows)
    _, first, inverse = np.unique(rows.content, return_index=True, return_inverse=True)
    original = first[inverse]
    exact = np.flatnonzero(original != np.arange(total))
    content, prompt = _first_in(rows.content, held.content), _first_in(rows.prompt, held.prompt)
    prompt = np.where((rows.prompt == 0) | (content >= 0), -1, prompt)
    found = {"exact": _Found(exact, original[exact])}
    found |= {
        kind: _Found(np.flatnonzero(places >= 0), total + places[places >= 0])
        for kind, places in (("in_heldout", content), ("prompt_in_heldout", prompt))
    }
    repeated = np.zeros(total, np.bool_)
    repeated[exact] = True
    chosen = np.flatnonzero(~repeated[: rows.within_limit()])
    others = held.within_limit()
    place = np.concatenate([chosen, total + np.arange(others)])
    within, across = near_duplicates(_Ids(rows, held, place), len(chosen))
    found["near"] = _near(within, place)
    found["near_heldout"] = _near({i: pair for i, pair in across.items() if content[place[i]] < 0}, place)
    return {kind: found[kind] for kind in KINDS if kind in found}


def _near(pairs: Near, place: np.ndarray) -> _Found:
    ordered = sorted(pairs.items())
    others, similarities = [int(place[j]) for _, (j, _) in ordered], [round(s, 3) for _, (_, s) in ordered]
    return _Found(place[np.array([i for i, _ in ordered], np.int64)], others, similarities)


def _first_in(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Of each value the first place in `known`, or -1."""
    unique, first = np.unique(known, return_index=True)
    if not len(unique):
        return np.full(len(values), -1)
    place = np.minimum(np.searchsorted(unique, values), len(unique) - 1)
    return np.where(unique[place] == values, first[place], -1)


def _answers(example: Example) -> list[list[int]]:
    """The supervised ids of each completion."""
    pairs = (zip(c, example.mask(k), strict=True) for k, c in enumerate(example.completions))
    return [[i for i, supervised in pair if supervised] for pair in pairs]


def _empty_rows(rows: _Rows, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Rows with an answer that is short and has no letter or digit in any script."""
    short = np.flatnonzero(rows.examples.fact("shortest") <= FEW + 1)
    candidates = np.unique(np.searchsorted(rows.first, short, side="right") - 1).tolist()
    return np.array([i for i in candidates if _is_empty(rows.row(i), tokenizer)], np.int64)


def _is_empty(row: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> bool:
    short = (ids for example in row for ids in _answers(example) if len(ids) <= FEW + 1)
    return any(not any(map(str.isalnum, tokenizer.decode(ids, skip_special_tokens=True))) for ids in short)


def _read(rows: _Rows, own: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """languages and refusals of the best answers of evenly spaced rows, as shares."""
    texts = []
    for i in own[:: max(1, len(own) // SAMPLED)].tolist():
        example = rows.row(i)[-1]
        best = min(range(len(example.completions)), key=lambda k: example.rank[k] if example.rank else 0)
        texts.append(tokenizer.decode(_answers(example)[best][:READ], skip_special_tokens=True))
    languages = Counter(map(language_of, texts))
    return {
        "languages": {name: round(count / len(texts), 4) for name, count in languages.most_common()},
        "refusals": round(sum(map(refuses, texts)) / len(texts), 4),
    }


def _places(where: Callable[[int], str], found: _Found) -> list[list[Any]]:
    """[file:line, the row that it repeats, similarity] of the first ones, as far as there is each."""
    first = found.rows[:LISTED].tolist()
    others = [[where(int(i))] for i in found.others[:LISTED]] or [[] for _ in first]
    alike = [[value] for value in found.similarities[:LISTED]] or [[] for _ in first]
    return [[where(i), *other, *share] for i, other, share in zip(first, others, alike, strict=True)]
