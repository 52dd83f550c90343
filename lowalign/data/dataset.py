"""Files of rows to Examples, with a report of the rows that were cut, dropped or bad."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lowalign.config.sections import DataConfig
from lowalign.data import cache
from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.data.prompt_format import formats_of, formatted
from lowalign.data.report import FileStats, merge_reports
from lowalign.data.rows.formats import RowFormat, RowFormats
from lowalign.data.rows.read import BadRow, Row, RowDropped, RowError, is_file, iter_rows
from lowalign.data.rows.sft_rows import SFT_ROWS, Conversation, PlainText, PromptCompletion
from lowalign.data.rows.unused import read_renames, with_columns
from lowalign.data.template import Unrenderable
from lowalign.data.truncate import chunks, fit, turn_ends, up_to, whole_turns
from lowalign.durable import file_hash, write_jsonl
from lowalign.errors import UserError

BLOCK = 1000  # rows that are tokenized together
LISTED = 20  # bad rows shown before training is refused
UNUSED = ("files", "eval", "eval_rows", "on_error", "template", "cache")  # options that do not change tokenized rows


@dataclass
class Dataset:
    """Examples in the order of their rows, the report as JSON, and the bad rows."""

    examples: list[Example]
    report: dict[str, Any]
    bad: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class RowEncoder:
    """How rows become Examples.

    formats: the row formats. group_key: rows of a file with the same key (not None) are encoded as one group. encode:
    (parsed rows of a group, chat, options, stats) -> Examples of at most config.max_length tokens; none when no
    supervised token is left. It raises RowError, RowDropped or Unrenderable.
    """

    formats: RowFormats
    group_key: Callable[[Any], Hashable]
    encode: Callable[[list[Any], Chat, DataConfig, FileStats], list[Example]]


@dataclass(frozen=True)
class _ParsedRow:
    """A row, its number in the file, its format and what the format's parser returned."""

    number: int
    row: Row
    row_format: RowFormat
    parsed: Any


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
    datasets = [_read_file(name, chat, config, encoder or SFT_ENCODER) for name in files]
    return Dataset(
        [example for dataset in datasets for example in dataset.examples],
        merge_reports([dataset.report for dataset in datasets], config.max_length, heldout),
        [row for dataset in datasets for row in dataset.bad],
    )


def list_bad(dataset: Dataset) -> list[str]:
    """Lines of text: the count of bad rows, and the first 20."""
    listed = [f"  {row}" for row in dataset.bad[:LISTED]]
    more = len(dataset.bad) - len(listed)
    count = f"{len(dataset.bad):,} of {dataset.report['rows']:,} rows cannot be used:"
    return [count, *listed, *([f"  … and {more:,} more"] if more else [])]


def split_heldout(examples: Sequence[Example], rows: int, seed: int) -> tuple[list[Example], list[Example]]:
    """-> the Examples to train on, and those of `rows` rows held out from the end of a seeded shuffle. Both keep their
    order; all Examples of a row go to one side. Raises UserError when nothing would be left to train on."""
    sources = list(dict.fromkeys(example.source for example in examples))
    if rows >= len(sources):
        raise UserError(f"--data.eval-rows {rows:,} of {len(sources):,} rows leaves none to train on; hold out fewer")
    random.Random(seed).shuffle(sources)
    heldout = set(sources[len(sources) - rows :])
    return [e for e in examples if e.source not in heldout], [e for e in examples if e.source in heldout]


def _read_file(name: str, chat: Chat, config: DataConfig, encoder: RowEncoder) -> Dataset:
    rows, cache_key = None, None
    if config.cache:
        if is_file(name):
            content = file_hash(Path(name))
        else:
            rows = list(iter_rows(name, config.limit))
            content = hashlib.sha256(json.dumps([row.data for row in rows], default=str).encode()).hexdigest()
        options = {option: value for option, value in vars(config).items() if option not in UNUSED}
        cache_key = cache.key(content, chat.templates, chat.tokenizer, name, options)
        if (stored := cache.read(cache_key)) is not None:
            return Dataset(*stored)
    dataset = _tokenize(name, iter_rows(name, config.limit) if rows is None else rows, chat, config, encoder)
    if cache_key and not dataset.bad:
        cache.write(cache_key, dataset.examples, dataset.report)
    return dataset


def _tokenize(name: str, rows: Iterable[Row | BadRow], chat: Chat, config: DataConfig, encoder: RowEncoder) -> Dataset:
    """The rows are read and encoded in blocks, so that only their Examples stay in memory."""
    stats, notes_before = FileStats(name), chat.notes.copy()
    bad: dict[int, BadRow] = {}
    encoded: list[tuple[int, Example]] = []  # with the number of the group's first row
    groups = _groups(rows, encoder, config, stats, bad)
    while block := list(islice(groups, BLOCK)):
        parsed = [row.parsed for group in block for row in group]
        conversations = [(row.messages, row.tools) for row in parsed if isinstance(row, Conversation)]
        texts = [text for row in parsed for text in _plain_texts(row)]
        with chat.prepared(conversations, texts):
            for group in block:
                examples = _encode_group(group, chat, config, encoder, stats, bad)
                encoded += [(group[0].number, example) for example in examples]
    encoded.sort(key=lambda pair: pair[0])
    stats.notes += chat.notes - notes_before
    examples = [example for _, example in encoded]
    return Dataset(examples, stats.as_dict(len(bad)), [bad[number] for number in sorted(bad)])


def _encode_group(
    group: list[_ParsedRow],
    chat: Chat,
    config: DataConfig,
    encoder: RowEncoder,
    stats: FileStats,
    bad: dict[int, BadRow],
) -> list[Example]:
    try:
        encoded = encoder.encode([row.parsed for row in group], chat, config, stats)
        if not encoded:
            raise RowDropped(f"no supervised token is left in {config.max_length:,} tokens")
    except (Unrenderable, RowDropped) as error:
        for row in group:
            stats.drop(row.row.where, str(error))
        return []
    except RowError as error:
        bad |= {row.number: _bad(row.row, error) for row in group}
        return []
    for example in encoded:
        example.source = group[0].row.where
    for row in group:
        stats.ignored.update(row.row_format.ignored(row.row.data))
        stats.prompt_formats.update(formats_of([row.parsed]))
    stats.add(encoded, chat.end_ids, document=isinstance(group[0].parsed, PlainText), rows=len(group))
    return encoded


def _groups(
    rows: Iterable[Row | BadRow], encoder: RowEncoder, config: DataConfig, stats: FileStats, bad: dict[int, BadRow]
) -> Iterator[list[_ParsedRow]]:
    """The parsed rows: those without a key one by one as they are read, then the groups. Bad rows go to `bad`, by number."""
    formats, renames = encoder.formats.named(config.shape), read_renames(config.rename)
    gathered: dict[Hashable, list[_ParsedRow]] = {}
    recognised: Counter[RowFormat] = Counter()
    unknown: list[tuple[int, Row]] = []  # to be reported as errors in the format of most rows
    for number, row in enumerate(rows):
        stats.rows += 1
        row = _with_columns(row, renames, config.ignore)
        row_format = formats.of(row.data) if isinstance(row, Row) else None
        if isinstance(row, BadRow):
            bad[number] = row
        elif row_format is None:
            unknown.append((number, row))
        else:
            recognised[row_format] += 1
            if (parsed := _parsed(number, row, row_format, formats, config, bad)) is None:
                continue
            stats.formats[row_format.name] += 1
            key = encoder.group_key(parsed.parsed)
            if key is None:
                yield [parsed]
            else:
                gathered.setdefault(key, []).append(parsed)
    most = recognised.most_common(1)
    for number, row in unknown:
        _parsed(number, row, most[0][0] if most else None, formats, config, bad)
    yield from gathered.values()


def _parsed(
    number: int,
    row: Row,
    row_format: RowFormat | None,
    formats: RowFormats,
    config: DataConfig,
    bad: dict[int, BadRow],
) -> _ParsedRow | None:
    """The parsed row; None, and an entry in `bad`, when it is wrong."""
    try:
        parsed = formatted(formats.parse(row.data, row_format), config.prompt_format)
        return _ParsedRow(number, row, row_format, parsed)
    except RowError as error:
        bad[number] = _bad(row, error)
        return None


def _plain_texts(row: Any) -> tuple[str, ...]:
    match row:
        case PromptCompletion():
            return row.prompt, row.completion
        case PlainText():
            return (row.text,)
        case _:
            return ()


def _with_columns(row: Row | BadRow, renames: dict[str, str], ignore: tuple[str, ...]) -> Row | BadRow:
    if isinstance(row, BadRow):
        return row
    try:
        return replace(row, data=with_columns(row.data, renames, ignore))
    except RowError as error:
        return _bad(row, error)


def _bad(row: Row, error: RowError) -> BadRow:
    return BadRow(row.where, str(error), json.dumps(row.data, ensure_ascii=False, default=str))


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


SFT_ENCODER = RowEncoder(SFT_ROWS, lambda row: None, _encode)
