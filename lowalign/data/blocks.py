"""Rows to Examples, in blocks of rows, so that only their Examples stay in memory and texts are tokenized together."""

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from lowalign.config.sections import DataConfig
from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.data.prompt_format import formats_of, formatted
from lowalign.data.rendering.template import Unrenderable
from lowalign.data.report import FileStats
from lowalign.data.rows.formats import RowFormat, RowFormats
from lowalign.data.rows.mapping import SkippedRow
from lowalign.data.rows.sft_rows import Conversation, PlainText, PromptCompletion
from lowalign.data.rows.turns import only_last
from lowalign.data.sources.row import BadRow, Row, RowDropped, RowError

BLOCK = 250  # rows that are tokenized together


@dataclass(frozen=True)
class RowEncoder:
    """How rows become Examples.

    name: in the key of the cache, as two readings of one file have different tokens. formats: the row formats. group_key:
    rows of a file with the same key (not None) are encoded as one group. encode: (parsed rows of a group, chat, options,
    stats) -> Examples of at most config.max_length tokens; none when no supervised token is left. It raises RowError,
    RowDropped or Unrenderable.
    """

    name: str
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


def encode_rows(
    rows: Iterable[Row | BadRow | SkippedRow], chat: Chat, config: DataConfig, encoder: RowEncoder, stats: FileStats
) -> tuple[list[Example], list[BadRow]]:
    """-> the Examples, each with its `source`, in the order of the rows (of a group: of its first row), and the bad rows;
    counts go to `stats`."""
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
    return [example for _, example in encoded], [bad[number] for number in sorted(bad)]


def _encode_group(
    group: list[_ParsedRow],
    chat: Chat,
    config: DataConfig,
    encoder: RowEncoder,
    stats: FileStats,
    bad: dict[int, BadRow],
) -> list[Example]:
    stats.where = group[0].row.where
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
    rows: Iterable[Row | BadRow | SkippedRow],
    encoder: RowEncoder,
    config: DataConfig,
    stats: FileStats,
    bad: dict[int, BadRow],
) -> Iterator[list[_ParsedRow]]:
    """The parsed rows: those without a key one by one as they are read, then the groups. Bad rows go to `bad`, by number."""
    formats = encoder.formats.named(config.shape)
    gathered: dict[Hashable, list[_ParsedRow]] = {}
    recognised: Counter[RowFormat] = Counter()
    unknown: list[tuple[int, Row]] = []  # to be reported as errors in the format of most rows
    for number, row in enumerate(rows):
        stats.rows += 1
        if isinstance(row, SkippedRow):
            stats.drop(row.where, row.why)
            continue
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
        if config.turns == "last" and isinstance(parsed, Conversation):
            parsed = replace(parsed, messages=only_last(parsed.messages))
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


def _bad(row: Row, error: RowError) -> BadRow:
    return BadRow(row.where, str(error), json.dumps(row.data, ensure_ascii=False, default=str))
