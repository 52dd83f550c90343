"""Messages to the user while a command runs."""

import contextlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm  # a widget in a notebook

from lowalign import processes

BAR_DELAY = 1  # seconds after which the bar of a part of the work appears


def log(text: str) -> None:
    """Print a line on stderr, above the progress bar if there is one. Of several processes only the first does."""
    if not processes.is_main():
        return
    with contextlib.suppress(OSError):  # a full disk or a closed pipe behind stderr must not stop the run
        tqdm.write(text, file=sys.stderr)


def duration(started: float) -> str:
    """Hours, minutes and seconds since `time.monotonic()` was `started`."""
    return tqdm.format_interval(time.monotonic() - started)


def progress(shown: bool = True, **options: Any) -> tqdm:
    """A progress bar, on a terminal's stderr or in a notebook; elsewhere, and in all processes but the first, a disabled one.
    options: of tqdm."""
    notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    visible = shown and processes.is_main() and (notebook or sys.stderr.isatty())
    return tqdm(file=sys.stderr, disable=not visible, **options)


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of text: each column as wide as its widest cell, two spaces between."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
