"""Files of rows to Examples, with a report of the rows that were cut, dropped or bad."""

import random
from array import array
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lowalign.config.sections import DataConfig
from lowalign.data import cache
from lowalign.data.blocks import BlockEncoder, RowEncoder
from lowalign.data.chat import Chat
from lowalign.data.example import Example
from lowalign.data.examples import Examples, as_examples, source_names, taken
from lowalign.data.report import FileStats, merge_reports
from lowalign.data.rows.mapping import Mapping, mappings_of
from lowalign.data.rows.sft_rows import SFT_ROWS, Conversation, PlainText, PromptCompletion
from lowalign.data.sources.read import content_hash
from lowalign.data.sources.row import BadRow, RowDropped
from lowalign.data.store import Store, StoreWriter, open_store
from lowalign.data.tokenizing import blocks_of, process_count
from lowalign.data.truncate import chunks, fit, turn_ends, up_to, whole_turns
from lowalign.durable import write_jsonl
from lowalign.errors import UserError
from lowalign.log import BAR_DELAY, progress

LISTED = 20  # bad rows shown before training is refused
MOST_HELDOUT = 200  # of a share
UNUSED = (
    "files",
    "eval",
    "eval_rows",
    "on_error",
    "template",
    "cache",
    "losses",
    "max_loss",
    "min_loss",
    "preset",
    "weights",
    "cap",
    "source_epochs",
    "processes",
)  # options that do not change tokenized rows


@dataclass
class Dataset:
    """Examples in the order of their rows, the report as JSON, and the bad rows."""

    examples: Examples
    report: dict[str, Any]
    bad: list[BadRow] = field(default_factory=list)


def load_examples(
    files: Sequence[str],
    chat: Chat,
    config: DataConfig,
    *,
    heldout: bool = False,
    rejected: Path | None = None,
    encoder: RowEncoder | None = None,
) -> Dataset:
    """The Examples of all files, in order, each with its `source` (file:line; of a group, its first row), and the report.

    Raises UserError for unreadable files, when no row is left, and for bad rows, with the first 20 listed. With
    config.on_error "skip", bad rows are written to `rejected` instead (one JSON object each: where, message, raw).
    heldout: noted in the report. encoder: SFT_ENCODER if None.
    """
    dataset = read_examples(files, chat, config, heldout=heldout, encoder=encoder)
    if dataset.bad and config.on_error == "refuse":
        raise UserError("\n".join(list_bad(dataset)) + "\ncorrect them, or skip them with --data.on-error skip")
    if dataset.bad and rejected is not None:
        write_jsonl(rejected, map(vars, dataset.bad))
    if not len(dataset.examples):
        reasons = [reason for file in dataset.report["files"] for reason in file["dropped"]]
        why = "; ".join(dict.fromkeys(reasons)) or ("all are bad" if dataset.bad else "the files are empty")
        raise UserError(f"no row of {', '.join(files)} can be used: {why}")
    return dataset


def read_examples(
    files: Sequence[str], chat: Chat, config: DataConfig, *, heldout: bool = False, encoder: RowEncoder | None = None
) -> Dataset:
    """As load_examples, but bad rows and empty results are only reported."""
    if not files:
        raise UserError("no data: give --data FILE…")
    if config.max_length < len(chat.bos_ids) + 2:
        raise UserError(f"--data.max-length {config.max_length} leaves no room for a prompt and its completion")
    asked, config = config.max_length, replace(config, max_length=chat.fitting(config.max_length))
    mappings = mappings_of(config, len(files))
    read = [
        _read_source(name, mapping, chat, config, encoder or SFT_ENCODER)
        for name, mapping in zip(files, mappings, strict=True)
    ]
    report = merge_reports([store.report for store, _ in read], config.max_length, heldout)
    if config.max_length < asked and (report["cut"] or report["dropped"]):
        report["max_length_asked"] = asked
    names = source_names(files) if len(files) > 1 else ()
    return Dataset(Examples([store for store, _ in read], names), report, [row for _, bad in read for row in bad])


def list_bad(dataset: Dataset) -> list[str]:
    """Lines of text: the count of bad rows, and the first 20."""
    listed = [f"  {row}" for row in dataset.bad[:LISTED]]
    more = len(dataset.bad) - len(listed)
    count = f"{len(dataset.bad):,} of {dataset.report['rows']:,} rows cannot be used:"
    return [count, *listed, *([f"  … and {more:,} more"] if more else [])]


def heldout_count(eval_rows: float, total: int) -> int:
    """How many of `total` rows --data.eval-rows holds out. Raises UserError when none would be left to train on."""
    rows = int(eval_rows) if eval_rows >= 1 else min(MOST_HELDOUT, int(eval_rows * total))
    if rows and rows >= total:
        raise UserError(f"--data.eval-rows {rows:,} of {total:,} rows leaves none to train on; hold out fewer")
    return rows


def split_heldout(
    examples: Sequence[Example], eval_rows: float, seed: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """-> the Examples to train on, and those of the rows held out from the end of a seeded shuffle. Both keep their order;
    all Examples of a row go to one side. Raises UserError when nothing would be left to train on."""
    _, first, row = np.unique(as_examples(examples).fact("source"), return_index=True, return_inverse=True)
    rows = heldout_count(eval_rows, len(first))
    shuffled = array("q", np.argsort(first))  # the rows in their order, each by its number in `row`
    random.Random(seed).shuffle(shuffled)
    held = np.zeros(len(first), np.bool_)
    held[np.array(shuffled[len(first) - rows :], np.int64)] = True
    return tuple(taken(examples, np.flatnonzero(held[row] == side)) for side in (False, True))


def _read_source(
    name: str, mapping: Mapping, chat: Chat, config: DataConfig, encoder: RowEncoder
) -> tuple[Store, list[BadRow]]:
    """-> the rows of a source, from the cache where they are in it, and the bad ones."""
    path = None
    if config.cache:
        options = {option: value for option, value in vars(config).items() if option not in UNUSED}
        reading = (encoder.name, name, mapping.fingerprint)
        content = content_hash(name, config.limit)
        path = cache.path(cache.key(content, chat.templates, chat.tokenizer, reading, options))
        if (stored := open_store(path)) is not None:
            return stored, []
    return _tokenize(name, mapping, chat, config, encoder, path)


def _tokenize(
    name: str, mapping: Mapping, chat: Chat, config: DataConfig, encoder: RowEncoder, path: Path | None
) -> tuple[Store, list[BadRow]]:
    """path: where the rows are kept if none is bad."""
    stats, notes_before = FileStats(name), chat.notes.copy()
    whole, writer = BlockEncoder(chat, config, encoder, stats), StoreWriter(cache.cache_folder())
    processes = process_count(name, mapping, config, encoder.name)
    try:
        options = {"unit": "row", "desc": f"tokenizing {Path(name).name}", "leave": False, "delay": BAR_DELAY}
        with progress(**options) as bar, closing(blocks_of(name, mapping, whole, processes, bar)) as blocks:
            for block in chain(blocks, whole.finish()):
                writer.add(*block)
        stats.notes += chat.notes - notes_before
        bad = [whole.bad[number] for number in sorted(whole.bad)]
        return writer.finish(stats.as_dict(len(bad)), None if bad else path), bad
    except BaseException:
        writer.close()
        raise


def _encode(
    rows: list[Conversation | PromptCompletion | PlainText], chat: Chat, config: DataConfig, stats: FileStats
) -> list[Example]:
    """The Examples of a row for fine-tuning (a group has one row)."""
    (row,), max_length = rows, config.max_length
    if isinstance(row, PlainText):
        document = chat.document(row.text)
        stats.measure(document)
        pieces = chunks(document, max_length)
        stats.cut.update(["chunked"] if len(pieces) > 1 else [])
        return pieces
    if isinstance(row, PromptCompletion):
        examples = [chat.completion(row.prompt, row.completion)]
    else:
        examples = chat.example(row.messages, row.tools)
    for example in examples:
        stats.measure(example)
    kept, cuts = _fitted(examples, chat, config, isinstance(row, Conversation))
    if kept and cuts:
        stats.cut[next(cut for cut in ("completion", "prompt", "turns") if cut in cuts)] += 1
    return kept


def _fitted(
    examples: list[Example], chat: Chat, config: DataConfig, conversation: bool
) -> tuple[list[Example], set[str]]:
    """-> the Examples of a row in at most config.max_length tokens, by config.long, and what was cut: "completion",
    "prompt", "turns". Raises RowDropped."""
    limit = config.max_length
    too_long = [example for example in examples if example.length > limit]
    if not too_long:
        return examples, set()
    if config.long == "drop":
        raise RowDropped(f"longer than {limit:,} tokens")
    if config.long == "turns" and conversation:
        shortened = [example if example.length <= limit else whole_turns(example, limit) for example in examples]
        if kept := [example for example in shortened if example is not None]:
            return kept, {"turns"}
        examples = [up_to(examples[0], turn_ends(examples[0])[0])]
    fitted = [fit(example, limit, chat.bos_ids) for example in examples]
    return [example for example, _ in fitted if example is not None], {cut for _, cut in fitted if cut}


SFT_ENCODER = RowEncoder("sft", SFT_ROWS, lambda row: None, _encode)
