"""Files of rows to Examples, with a report of all that was cut, dropped or refused."""

import hashlib
import json
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowalign.config.sections import DataConfig
from lowalign.data import cache
from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.data.report import Tally, totals
from lowalign.data.rows.read import BadRow, Row, is_file, read_rows
from lowalign.data.rows.sft_rows import SFT_ROWS, Conversation, PlainText, PromptCompletion
from lowalign.data.rows.shapes import RowFormat, RowFormats
from lowalign.data.rows.turns import RowDropped, RowError
from lowalign.data.template import Unrenderable
from lowalign.data.truncate import chunks, fit
from lowalign.durable import file_hash, write_jsonl
from lowalign.errors import UserError

LISTED = 20  # bad rows shown before training is refused
UNUSED = ("files", "eval", "eval_rows", "on_error", "template", "cache")  # options that change no tokenized row


@dataclass
class Dataset:
    """Examples in the order of their rows, the report as JSON, and the rows that could not be used."""

    examples: list[Example]
    report: dict[str, Any]
    bad: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class RowEncoder:
    """How rows become Examples.

    shapes: what each row means. together: rows of the same key (not None) make one Example between them. encode: what
    such rows mean, to Examples of at most config.max_length tokens; none when nothing supervised is left. It raises
    RowError, RowDropped or Unrenderable.
    """

    shapes: RowFormats
    together: Callable[[Any], Hashable]
    encode: Callable[[list[Any], Chat, DataConfig, Tally], list[Example]]


@dataclass(frozen=True)
class _Said:
    """A row, its number in the file, its shape and its meaning."""

    number: int
    row: Row
    shape: RowFormat
    meaning: Any


def load_examples(
    files: Sequence[str],
    chat: Chat,
    config: DataConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    heldout: bool = False,
    rejected: Path | None = None,
    encoder: RowEncoder | None = None,
) -> Dataset:
    """The Examples of all files, in order, each with its `source` (file:line), and the report.

    Bad rows: refused with the first 20 listed or, with config.on_error "skip", left out and written to `rejected` (one
    JSON object each: where, message, raw). Raises UserError for bad rows, for unreadable files, and when no row is left.
    heldout: only noted in the report. encoder: how rows become Examples; as for fine-tuning when left out.
    """
    dataset = read_examples(files, chat, config, tokenizer=tokenizer, heldout=heldout, encoder=encoder)
    if dataset.bad and config.on_error == "refuse":
        raise UserError("\n".join(list_bad(dataset)) + "\nmend them, or leave them out with --data.on-error skip")
    if dataset.bad and rejected is not None:
        write_jsonl(rejected, map(vars, dataset.bad))
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
    encoder: RowEncoder | None = None,
) -> Dataset:
    """As load_examples, but bad rows and empty results are only reported."""
    if config.max_length < len(chat.front) + 2:
        raise UserError(f"--data.max-length {config.max_length} leaves no room for a prompt and its completion")
    if not files:
        raise UserError("no data: name files with --data FILE …")
    examples, reports, bad = [], [], []
    for name in files:
        found = _read_file(name, chat, config, tokenizer, encoder or SFT_ENCODER)
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


def _read_file(
    name: str, chat: Chat, config: DataConfig, tokenizer: PreTrainedTokenizerBase, encoder: RowEncoder
) -> Dataset:
    rows, stored = None, None
    if config.cache:
        if is_file(name):
            content = file_hash(Path(name))
        else:
            rows = read_rows(name, config.limit)
            content = hashlib.sha256(json.dumps([row.data for row in rows], default=str).encode()).hexdigest()
        options = {option: value for option, value in vars(config).items() if option not in UNUSED}
        stored = cache.key(content, chat.templates, tokenizer, name, options)
        if (known := cache.recall(stored)) is not None:
            return Dataset(*known)
    dataset = _tokenize(name, rows if rows is not None else read_rows(name, config.limit), chat, config, encoder)
    if stored and not dataset.bad:
        cache.store(stored, dataset.examples, dataset.report)
    return dataset


def _tokenize(name: str, rows: list[Row | BadRow], chat: Chat, config: DataConfig, encoder: RowEncoder) -> Dataset:
    tally, examples, before = Tally(name), [], chat.notes.copy()
    tally.rows = len(rows)
    groups, bad = _interpret(rows, encoder, config.shape, tally)
    for group in groups:
        try:
            made = encoder.encode([said.meaning for said in group], chat, config, tally)
            if not made:
                raise RowDropped(f"no supervised token is left in {config.max_length:,} tokens")
        except (Unrenderable, RowDropped) as error:
            for said in group:
                tally.drop(said.row.where, str(error))
        except RowError as error:
            bad |= {said.number: _bad(said.row, error) for said in group}
        else:
            for example in made:
                example.source = group[0].row.where
            for said in group:
                tally.ignored.update(said.shape.ignored(said.row.data))
            tally.add(made, chat.end_ids, document=isinstance(group[0].meaning, PlainText), rows=len(group))
            examples += made
    tally.notes += chat.notes - before
    return Dataset(examples, tally.as_dict(len(bad)), [bad[number] for number in sorted(bad)])


def _interpret(
    rows: list[Row | BadRow], encoder: RowEncoder, name: str, tally: Tally
) -> tuple[list[list[_Said]], dict[int, BadRow]]:
    """The rows with their meaning, those together that belong together, in the order of the first; and the bad ones by
    their number."""
    shapes = encoder.shapes.named(name)
    usual = shapes.common(row.data for row in rows if isinstance(row, Row))
    groups: dict[Hashable, list[_Said]] = {}
    bad: dict[int, BadRow] = {}
    for number, row in enumerate(rows):
        if isinstance(row, BadRow):
            bad[number] = row
            continue
        shape = shapes.of(row.data) or usual
        try:
            meaning = shapes.read(row.data, shape)
        except RowError as error:
            bad[number] = _bad(row, error)
            continue
        tally.shapes[shape.name] += 1
        key = encoder.together(meaning)
        groups.setdefault(number if key is None else key, []).append(_Said(number, row, shape, meaning))
    return list(groups.values()), bad


def _bad(row: Row, error: RowError) -> BadRow:
    return BadRow(row.where, str(error), json.dumps(row.data, ensure_ascii=False, default=str))


def _examples(
    meanings: list[Conversation | PromptCompletion | PlainText], chat: Chat, config: DataConfig, tally: Tally
) -> list[Example]:
    """The Examples of a row to fine-tune on."""
    (said,), max_length = meanings, config.max_length
    if isinstance(said, PlainText):
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


SFT_ENCODER = RowEncoder(SFT_ROWS, lambda meaning: None, _examples)
