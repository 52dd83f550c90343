"""Rows to Examples, in blocks of rows, so that only their Examples stay in memory and texts are tokenized together."""

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from lowalign.config.sections import DataConfig
from lowalign.data.chat import Chat
from lowalign.data.example import Example
from lowalign.data.prompt_format import formats_of, formatted
from lowalign.data.record import FACTS, record_of
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


class Block(NamedTuple):
    """Examples that were encoded together: their records one after the other, their FACTS (lowalign.data.record) with `at` from 0,
    and for each the number of its row, of a group of the first one."""

    records: bytes
    facts: np.ndarray
    numbers: list[int]


class Waiting(NamedTuple):
    """What a stretch of a file leaves to be done with the whole: picklable, so that it can come from another process.

    rows: how many were read. bad: by number. recognised: rows by place of their format. grouped, unknown: rows with a group key,
    and rows of no known format, with their numbers, which count from the beginning of the stretch.
    """

    rows: int
    bad: dict[int, BadRow]
    recognised: Counter[int]
    grouped: list[tuple[int, Row]]
    unknown: list[tuple[int, Row]]


class BlockEncoder:
    """Encodes the rows of one file, or of a stretch of it. Counts go to `stats`. bad: by number of the row."""

    def __init__(self, chat: Chat, config: DataConfig, encoder: RowEncoder, stats: FileStats) -> None:
        self.chat, self.config, self.encoder, self.stats = chat, config, encoder, stats
        self.bad: dict[int, BadRow] = {}
        self._formats = encoder.formats.named(config.shape)
        self._rows = 0
        self._recognised: Counter[int] = Counter()
        self._groups: dict[Hashable, list[_ParsedRow]] = {}
        self._unknown: list[tuple[int, Row]] = []  # to be reported as errors in the format of most rows

    def encode(self, rows: Iterable[Row | BadRow | SkippedRow]) -> Iterator[Block]:
        """The rows without a group key, as they are read."""
        single = self._single(rows)
        while block := list(islice(single, BLOCK)):
            yield self._block(block)

    def finish(self) -> Iterator[Block]:
        """The groups; then `bad` has all bad rows."""
        most = self._recognised.most_common(1)
        for number, row in self._unknown:
            self._parsed(number, row, self._formats.formats[most[0][0]] if most else None)
        groups = iter(self._groups.values())
        while block := list(islice(groups, BLOCK)):
            yield self._block(block)

    def waiting(self) -> Waiting:
        """What `merge` of the encoder of the whole file needs."""
        grouped = [(row.number, row.row) for group in self._groups.values() for row in group]
        return Waiting(self._rows, self.bad, self._recognised, grouped, self._unknown)

    def merge(self, part: Waiting) -> int:
        """Add what another encoder left of the next stretch -> the number of its first row."""
        start = self._rows
        self._rows += part.rows
        self.bad |= {start + number: row for number, row in part.bad.items()}
        self._recognised.update(part.recognised)
        self._unknown += [(start + number, row) for number, row in part.unknown]
        for number, row in sorted(part.grouped, key=lambda pair: pair[0]):
            parsed = self._parsed(start + number, row, self._formats.of(row.data))
            self._groups.setdefault(self.encoder.group_key(parsed.parsed), []).append(parsed)
        return start

    def _single(self, rows: Iterable[Row | BadRow | SkippedRow]) -> Iterator[list[_ParsedRow]]:
        for row in rows:
            number, self._rows = self._rows, self._rows + 1
            self.stats.rows += 1
            if isinstance(row, SkippedRow):
                self.stats.drop(row.where, row.why)
                continue
            row_format = self._formats.of(row.data) if isinstance(row, Row) else None
            if isinstance(row, BadRow):
                self.bad[number] = row
            elif row_format is None:
                self._unknown.append((number, row))
            else:
                self._recognised[self._formats.formats.index(row_format)] += 1
                if (parsed := self._parsed(number, row, row_format)) is None:
                    continue
                self.stats.formats[row_format.name] += 1
                key = self.encoder.group_key(parsed.parsed)
                if key is None:
                    yield [parsed]
                else:
                    self._groups.setdefault(key, []).append(parsed)

    def _block(self, groups: list[list[_ParsedRow]]) -> Block:
        parsed = [row.parsed for group in groups for row in group]
        conversations = [(row.messages, row.tools) for row in parsed if isinstance(row, Conversation)]
        texts = [text for row in parsed for text in _plain_texts(row)]
        records, numbers, facts = [], [], []
        with self.chat.prepared(conversations, texts):
            for group in groups:
                encoded, own = self._encode_group(group)
                numbers += [group[0].number] * len(encoded)
                records += encoded
                facts.append(own)
        joined = np.concatenate([np.empty(0, FACTS), *facts])
        joined["at"] = np.cumsum([0, *map(len, records)])[: len(records)]
        return Block(b"".join(records), joined, numbers)

    def _encode_group(self, group: list[_ParsedRow]) -> tuple[list[bytes], np.ndarray]:
        """-> the records, and their FACTS."""
        stats, where = self.stats, group[0].row.where
        stats.where = where
        try:
            examples = self.encoder.encode([row.parsed for row in group], self.chat, self.config, stats)
            if not examples:
                raise RowDropped(f"no supervised token is left in {self.config.max_length:,} tokens")
        except (Unrenderable, RowDropped) as error:
            for row in group:
                stats.drop(row.row.where, str(error))
            return [], np.empty(0, FACTS)
        except RowError as error:
            self.bad |= {row.number: _bad(row.row, error) for row in group}
            return [], np.empty(0, FACTS)
        for example in examples:
            example.source = where
        for row in group:
            stats.ignored.update(row.row_format.ignored(row.row.data))
            stats.prompt_formats.update(formats_of([row.parsed]))
        made = list(map(record_of, examples))
        facts = np.array([own for _, own in made], FACTS)
        document = isinstance(group[0].parsed, PlainText)
        stats.add(examples, facts, self.chat.end_ids, document=document, rows=len(group))
        return [record for record, _ in made], facts

    def _parsed(self, number: int, row: Row, row_format: RowFormat | None) -> _ParsedRow | None:
        """The parsed row; None, and an entry in `bad`, when it is wrong."""
        try:
            parsed = formatted(self._formats.parse(row.data, row_format), self.config.prompt_format)
            if self.config.turns == "last" and isinstance(parsed, Conversation):
                parsed = replace(parsed, messages=only_last(parsed.messages))
            return _ParsedRow(number, row, row_format, parsed)
        except RowError as error:
            self.bad[number] = _bad(row, error)
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
