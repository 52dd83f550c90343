"""Files of rows to Examples, with a report of all that was cut, dropped or refused."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowalign.config import DataConfig
from lowalign.data import cache
from lowalign.data.chat import Chat
from lowalign.data.fit import chunks, fit
from lowalign.data.pack import Example
from lowalign.data.read import BadRow, Row, is_file, read_rows
from lowalign.data.report import Tally, totals
from lowalign.data.schema import (
    Conversation,
    PromptCompletion,
    Text,
    common_shape,
    ignored_columns,
    interpret,
    shape_of,
)
from lowalign.data.template import Unrenderable
from lowalign.data.turns import RowError
from lowalign.errors import UserError

LISTED = 20  # bad rows shown before training is refused


@dataclass
class Dataset:
    """Examples in the order of their rows, the report as JSON, and the rows that could not be used."""

    examples: list[Example]
    report: dict[str, Any]
    bad: list[BadRow] = field(default_factory=list)


def load_examples(
    files: Sequence[str],
    chat: Chat,
    config: DataConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    heldout: bool = False,
    rejected: Path | None = None,
) -> Dataset:
    """The Examples of all files, in order, each with its `source` (file:line), and the report.

    Bad rows: refused with the first 20 listed or, with config.on_error "skip", left out and written to `rejected` (one
    JSON object each: where, message, raw). Raises UserError for bad rows, for unreadable files, and when no row is left.
    heldout: only noted in the report.
    """
    dataset = read_examples(files, chat, config, tokenizer=tokenizer, heldout=heldout)
    if dataset.bad and config.on_error == "refuse":
        raise UserError("\n".join(list_bad(dataset)) + "\nmend them, or leave them out with --data.on-error skip")
    if dataset.bad and rejected is not None:
        lines = [json.dumps(vars(row), ensure_ascii=False) + "\n" for row in dataset.bad]
        cache.write_whole(rejected, "".join(lines).encode())
    if not dataset.examples:
        reasons = [why for file in dataset.report["files"] for why in file["dropped"]]
        why = "; ".join(dict.fromkeys(reasons)) or ("all are bad" if dataset.bad else "the files are empty")
        raise UserError(f"no row of {', '.join(files)} can be used: {why}")
    return dataset


def read_examples(
    files: Sequence[str],
    chat: Chat,
    config: DataConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    heldout: bool = False,
) -> Dataset:
    """As load_examples, but bad rows and empty results are only reported."""
    if config.max_length < len(chat.front) + 2:
        raise UserError(f"--data.max-length {config.max_length} leaves no room for a prompt and its completion")
    if not files:
        raise UserError("no data: name files with --data FILE …")
    examples, reports, bad = [], [], []
    for name in files:
        found = _read_file(name, chat, config, tokenizer)
        examples += found.examples
        reports.append(found.report)
        bad += found.bad
    return Dataset(examples, totals(reports, config.max_length, heldout), bad)


def list_bad(dataset: Dataset) -> list[str]:
    """The first bad rows and the count of all, in lines."""
    shown = [f"  {row}" for row in dataset.bad[:LISTED]]
    more = len(dataset.bad) - len(shown)
    head = f"{len(dataset.bad):,} of {dataset.report['rows']:,} rows cannot be used:"
    return [head, *shown, *([f"  … and {more:,} more"] if more else [])]


def split_heldout(examples: Sequence[Example], rows: int, seed: int) -> tuple[list[Example], list[Example]]:
    """The Examples without, and those of, `rows` rows from the end of a seeded shuffle. Both keep their order, and all
    that came of one row goes to one side. Raises UserError when nothing would be left to train on."""
    sources = list(dict.fromkeys(example.source for example in examples))
    if rows >= len(sources):
        raise UserError(f"--data.eval-rows {rows:,} of {len(sources):,} rows leaves none to train on")
    random.Random(seed).shuffle(sources)
    held = set(sources[len(sources) - rows :])
    return [e for e in examples if e.source not in held], [e for e in examples if e.source in held]


def _read_file(name: str, chat: Chat, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    rows, stored = None, None
    if config.cache:
        if is_file(name):
            content = cache.content_hash(Path(name))
        else:
            rows = read_rows(name, config.limit)
            content = hashlib.sha256(json.dumps([row.data for row in rows], default=str).encode()).hexdigest()
        stored = cache.key(content, chat.templates, tokenizer, name, config.shape, config.max_length, config.limit)
        if (known := cache.recall(stored)) is not None:
            return Dataset(*known)
    dataset = _tokenize(name, rows if rows is not None else read_rows(name, config.limit), chat, config)
    if stored and not dataset.bad:
        cache.store(stored, dataset.examples, dataset.report)
    return dataset


def _tokenize(name: str, rows: list[Row | BadRow], chat: Chat, config: DataConfig) -> Dataset:
    usual = common_shape(row.data for row in rows if isinstance(row, Row))
    tally, examples, bad, before = Tally(name), [], [], chat.notes.copy()
    for row in rows:
        tally.rows += 1
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        shape = config.shape if config.shape != "auto" else shape_of(row.data) or usual
        try:
            said = interpret(row.data, shape)
            tally.shapes[shape] += 1
            made = _examples(said, chat, config.max_length, tally)
        except Unrenderable as error:
            tally.drop(row.where, str(error))
        except RowError as error:
            raw = json.dumps(row.data, ensure_ascii=False, default=str)
            bad.append(BadRow(row.where, str(error), raw))
        else:
            tally.ignored.update(ignored_columns(row.data, shape))
            for example in made:
                example.source = row.where
            if made:
                tally.add(made, chat.end_ids, document=isinstance(said, Text))
                examples += made
            else:
                tally.drop(row.where, f"no supervised token is left in {config.max_length:,} tokens")
    tally.notes = chat.notes - before
    return Dataset(examples, tally.as_dict(len(bad)), bad)


def _examples(said: Conversation | PromptCompletion | Text, chat: Chat, max_length: int, tally: Tally) -> list[Example]:
    """The Examples of a row, each of at most max_length tokens; none when nothing supervised is left of them."""
    if isinstance(said, Text):
        document = chat.document(said.text)
        tally.measure(document)
        pieces = chunks(document, max_length)
        tally.cut.update(["chunked"] if len(pieces) > 1 else [])
        return pieces
    if isinstance(said, PromptCompletion):
        made = [chat.completion(said.prompt, said.completion)]
    else:
        made = chat.example(said.messages, said.tools)
    kept, cuts = [], set()
    for example in made:
        tally.measure(example)
        fitted, cut = fit(example, max_length, chat.front)
        cuts.add(cut)
        kept += [fitted] if fitted is not None else []
    if kept and cuts != {None}:
        tally.cut["completion" if "completion" in cuts else "prompt"] += 1
    return kept
