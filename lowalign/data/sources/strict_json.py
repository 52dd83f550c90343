"""Strict JSON: what Python's parser accepts beyond the standard is a problem, described in words."""

import json
import re
from typing import Any

KINDS = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
KINDS |= {bool: "true or false", type(None): "null"}


class StrictParser:
    """Parses JSON values out of a text. Duplicate keys, NaN and too long numbers are problems."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._int
        )
        self._problem = ""
        self.ended = False  # whether the last error was an early end of the text

    def parse(self, text: str, at: int) -> tuple[Any, int | None, str]:
        """-> the value that begins at `at`, its end (None: unknown), and the problem with it ("": none)."""
        self._problem = ""
        try:
            data, end = self._decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            unterminated = error.msg.startswith("Unterminated string")
            self.ended = unterminated or error.pos >= len(text.rstrip())
            line = error.lineno - text.count("\n", 0, at)
            below = f" of line {error.lineno}" if line > 1 else ""
            return None, None, f"not JSON: {error.msg} (column {error.colno}{below})"
        except RecursionError:
            return None, None, "nested too deeply"
        return data, end, self._problem

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in data if keys.count(key) > 1)
            self._problem = self._problem or f'the key "{repeated}" is there more than once'
        return data

    def _constant(self, name: str) -> None:
        self._problem = self._problem or f"{name} is not JSON: write null or a number"

    def _int(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # Python's own limit on the digits of a number
            self._problem = self._problem or f"a number of {len(digits)} digits"
            return 0


def json_value(text: str) -> Any:
    """The JSON value that a whole text is. Raises ValueError for anything else, for NaN, and for half of a surrogate pair."""
    value = json.loads(text, parse_constant=_refuse_constant)
    if problem := half_surrogate(value, text):
        raise ValueError(problem)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def half_surrogate(data: Any, raw: str) -> str:
    """The problem with parsed JSON whose text has half of an escaped surrogate pair (\\ud800 alone); "": none."""
    if r"\u" in raw and (bad := re.search(r"[\ud800-\udfff]", json.dumps(data, ensure_ascii=False))):
        return f"\\u{ord(bad[0]):04x} is half of a surrogate pair, not a character"
    return ""


def json_type(value: object) -> str:
    """The type of a JSON value, in words."""
    return KINDS.get(type(value), type(value).__name__)
