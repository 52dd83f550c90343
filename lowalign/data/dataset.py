"""Files of rows to Examples, with a report of the rows that were cut, dropped or bad."""

import gc
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowalign.config.sections import DataConfig
from lowalign.data import cache
from lowalign.data.blocks import RowEncoder, encode_rows
from lowalign.data.chat import Chat
from lowalign.data.mixture import source_names
from lowalign.data.pack import Example
from lowalign.data.report import FileStats, merge_reports
from lowalign.data.rows.mapping import Mapping, SkippedRow, mappings_of
from lowalign.data.rows.sft_rows import SFT_ROWS, Conversation, PlainText, PromptCompletion
from lowalign.data.sources.read import content_hash
from lowalign.data.sources.row import BadRow, Row, RowDropped
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
)  # options that do not change tokenized rows


@dataclass
class Dataset:
    """Examples in the order of their rows, the report as JSON, and the bad rows."""

    examples: list[Example]
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
    if not dataset.examples:
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
    with _without_garbage_collection():
        mappings = mappings_of(config, len(files))
        datasets = [
            _read_source(name, mapping, chat, config, encoder or SFT_ENCODER)
            for name, mapping in zip(files, mappings, strict=True)
        ]
    for name, dataset in zip(source_names(files), datasets, strict=True) if len(files) > 1 else ():
        for example in dataset.examples:
            example.dataset = name
    report = merge_reports([dataset.report for dataset in datasets], config.max_length, heldout)
    if config.max_length < asked and (report["cut"] or report["dropped"]):
        report["max_length_asked"] = asked
    return Dataset(
        [example for dataset in datasets for example in dataset.examples],
        report,
        [row for dataset in datasets for row in dataset.bad],
    )


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


def split_heldout(examples: Sequence[Example], eval_rows: float, seed: int) -> tuple[list[Example], list[Example]]:
    """-> the Examples to train on, and those of the rows held out from the end of a seeded shuffle. Both keep their order;
    all Examples of a row go to one side. Raises UserError when nothing would be left to train on."""
    sources = list(dict.fromkeys(example.source for example in examples))
    rows = heldout_count(eval_rows, len(sources))
    random.Random(seed).shuffle(sources)
    heldout = set(sources[len(sources) - rows :])
    return [e for e in examples if e.source not in heldout], [e for e in examples if e.source in heldout]


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """The collector looks for cycles, of which there are none here, by walking through all ids again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_source(name: str, mapping: Mapping, chat: Chat, config: DataConfig, encoder: RowEncoder) -> Dataset:
    cache_key = None
    if config.cache:
        options = {option: value for option, value in vars(config).items() if option not in UNUSED}
        reading = (encoder.name, name, mapping.fingerprint)
        content = content_hash(name, config.limit)
        cache_key = cache.key(content, chat.templates, chat.tokenizer, reading, options)
        if (stored := cache.read(cache_key)) is not None:
            return Dataset(*stored)
    dataset = _tokenize(name, mapping.rows(name, config.limit), chat, config, encoder)
    if cache_key and not dataset.bad:
        cache.write(cache_key, dataset.examples, dataset.report)
    return dataset


def _tokenize(
    name: str, rows: Iterable[Row | BadRow | SkippedRow], chat: Chat, config: DataConfig, encoder: RowEncoder
) -> Dataset:
    stats, notes_before = FileStats(name), chat.notes.copy()
    shown = progress(iterable=rows, unit="row", desc=f"tokenizing {Path(name).name}", leave=False, delay=BAR_DELAY)
    examples, bad = encode_rows(shown, chat, config, encoder, stats)
    stats.notes += chat.notes - notes_before
    return Dataset(examples, stats.as_dict(len(bad)), bad)


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
