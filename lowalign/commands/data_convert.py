"""`lowalign data convert`: rows of any source, in the columns of lowalign's row formats."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lowalign.commands.data_check import row_formats
from lowalign.config.commands import DataConvertConfig
from lowalign.data.dataset import LISTED
from lowalign.data.prompt_format import formatted
from lowalign.data.rows.mapping import SkippedRow, mappings_of
from lowalign.data.rows.normalised import normalised
from lowalign.data.sources.row import BadRow, RowError
from lowalign.durable import json_line, write_file
from lowalign.errors import UserError
from lowalign.log import log


class _Counts:
    """Rows written, and what became of the others."""

    def __init__(self) -> None:
        self.written = self.bad = 0
        self.skipped: dict[str, int] = {}
        self.listed: list[str] = []

    def add_bad(self, row: BadRow) -> None:
        self.bad += 1
        self.listed += [f"  {row}"] if len(self.listed) < LISTED else []


def data_convert(config: DataConvertConfig) -> int:
    """Run the command. Returns the exit code. Raises UserError for bad rows, unless data.on_error is skip; then nothing is
    written."""
    if config.out.exists():
        raise UserError(f"{config.out} exists; --out is a new file")
    counts = _Counts()
    data = replace(config.data, files=(*config.files, *config.data.files))

    def write(path: Any) -> None:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(map(json_line, _rows(data, counts)))
        if counts.bad and data.on_error == "refuse":
            raise UserError(
                "\n".join([f"{counts.bad:,} rows cannot be used:", *counts.listed])
                + "\ncorrect them, or leave them out with --data.on-error skip"
            )

    try:
        write_file(config.out, write)
    except OSError as error:
        raise UserError(f"{config.out} cannot be written: {error.strerror}") from error
    log(f"{counts.written:,} rows written to {config.out}")
    for line in counts.listed:
        log(line)
    for why, count in (*counts.skipped.items(), *([("bad", counts.bad)] if counts.bad else [])):
        log(f"  {count:,} rows left out: {why}")
    return 0


def _rows(config: Any, counts: _Counts) -> Iterator[dict[str, Any]]:
    formats = row_formats(config).named(config.shape)
    for name, mapping in zip(config.files, mappings_of(config, len(config.files)), strict=True):
        for row in mapping.rows(name, config.limit):
            if isinstance(row, SkippedRow):
                counts.skipped[row.why] = counts.skipped.get(row.why, 0) + 1
                continue
            if isinstance(row, BadRow):
                counts.add_bad(row)
                continue
            try:
                converted = normalised(formatted(formats.parse(row.data), config.prompt_format))
            except RowError as error:
                counts.add_bad(BadRow(row.where, str(error), ""))
                continue
            counts.written += 1
            yield converted
