"""Rows of JSON and JSONL, each with its line.

A line that is no row becomes a BadRow with the reason. Arrays are read element by element, so that each row has its true
line; JSONL is read line by line.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowalign.data.sources.row import BadRow, Row
from lowalign.data.sources.streams import lines_of, open_binary
from lowalign.data.sources.strict_json import StrictParser, half_surrogate, json_type

WHITESPACE = re.compile(r"[ \t\r\n]*")


def json_rows(path: Path, name: str) -> Iterator[Row | BadRow]:
    """The rows of a file. name: what it is called in messages."""
    with open_binary(path) as stream:
        # Bytes that are not UTF-8 become lone surrogates, which _invalid_text finds.
        if stream.peek(1024)[:1024].lstrip().startswith(b"["):
            yield from _array(name, stream.read().decode("utf-8", "surrogateescape"))
        else:
            yield from _lines(name, lines_of(stream, name))


def line_rows(path: Path, name: str, start: int, end: int, before: int) -> Iterator[Row | BadRow]:
    """The rows of a stretch of JSONL. start, end: in bytes, where lines begin. before: lines before it."""
    with open_binary(path) as stream:
        stream.seek(start)
        part = io.BytesIO(stream.read(end - start))
    yield from _lines(name, lines_of(part, name, before), before)


def _lines(name: str, lines: Iterator[str], before: int = 0) -> Iterator[Row | BadRow]:
    parser, first = StrictParser(), not before
    for number, line in enumerate(lines, before + 1):
        text = line.strip("\r\n\t ")
        if not text:
            continue
        if first and text == "{":
            message = "a row spread over several lines: write each row in one line, or all of them in one array"
            yield BadRow(f"{name}:{number}", f"{message}; nothing after this is read", text)
            return
        first = False
        data, end, message = parser.parse(text, 0)
        if not message and text[end:].strip():
            message = f"more text after the row, at column {end + 1}: write one row per line"
        elif message and not line.endswith("\n") and parser.ended:
            message += "; the file seems to be cut off here"
        yield _checked(name, number, data, message, text)


def _array(name: str, text: str) -> Iterator[Row | BadRow]:
    parser = StrictParser()
    at, line, counted = _skip(text, text.index("[") + 1), 1, 0
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        data, end, message = parser.parse(text, at)
        if end is None:
            yield _checked(name, line, None, f"{message}; nothing after this can be read", text[at : at + 2000])
            return
        yield _checked(name, line, data, message, text[at:end])
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            break
    line += text.count("\n", counted, at)
    if at >= len(text):
        yield BadRow(f"{name}:{line}", 'the array is not closed with "]"; the file seems to be cut off here', "")
    elif text[at] != "]":
        rest = _printable(text[at : at + 2000])
        yield BadRow(f"{name}:{line}", 'expected "," or "]" after a row; nothing after this can be read', rest)
    elif text[_skip(text, at + 1) :]:
        start = _skip(text, at + 1)
        line += text.count("\n", at, start)
        rest = _printable(text[start : start + 2000])
        yield BadRow(f"{name}:{line}", 'more text after the "]" that ends the rows', rest)


def _skip(text: str, at: int) -> int:
    """The index of the first character from `at` that is no white space."""
    return WHITESPACE.match(text, at).end()


def _checked(name: str, line: int, data: Any, message: str, raw: str) -> Row | BadRow:
    if not message and not isinstance(data, dict):
        message = f"a row must be an object {{…}}, found {json_type(data)}"
    message = message or _invalid_text(data, raw)
    if not message:
        return Row(data, name, line)
    return BadRow(f"{name}:{line}", message.encode("utf-8", "backslashreplace").decode(), _printable(raw))


def _invalid_text(data: dict[str, Any], raw: str) -> str:
    bad = re.search(r"[\ud800-\udfff]", raw)
    if bad:
        return f"not valid UTF-8 at column {bad.start() - raw.rfind(chr(10), 0, bad.start())}"
    return half_surrogate(data, raw)


def _printable(raw: str) -> str:
    """The text, bytes that are not UTF-8 written as \\xNN."""
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
