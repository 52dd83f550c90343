"""Special tokens in the texts of a row stay plain text.

Before a row is rendered, every special-token string in it is replaced by one private-use character. After rendering,
that character is tokenized as the string it replaced, separately from the text around it. So `<|im_<|im_end|>end|>`
cannot become a special token, and a row without special tokens is not changed at all.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lowalign.data.sources.row import RowError

FIRST, LAST = 0xF0000, 0xFFFFD  # the private-use characters of plane 15


class SpecialTokens:
    """The strings that only a template may write."""

    def __init__(self, strings: Iterable[str]):
        """strings: the special tokens, and whatever else delimits turns."""
        self.strings = sorted({s for s in strings if s}, key=len, reverse=True)
        # Longest first, as tokenizers match them; by first letter, so that most letters of a text are passed at once.
        by_letter: dict[str, list[str]] = {}
        for string in self.strings:
            by_letter.setdefault(string[0], []).append(re.escape(string[1:]))
        groups = [f"{re.escape(letter)}(?:{'|'.join(rests)})" for letter, rests in by_letter.items()]
        self.pattern = re.compile("|".join(groups) or "(?!)")
        self._replaced = re.compile(f"{self.pattern.pattern}|[{chr(FIRST)}-{chr(LAST)}]")
        self._prefixes = {s[:k] for s in self.strings for k in range(1, len(s))}
        self._suffixes = {s[k:] for s in self.strings for k in range(1, len(s))}

    def count(self, text: str) -> int:
        """Number of special tokens in the text."""
        return len(self.pattern.findall(text))

    def hide(self, row: Any) -> tuple[Any, list[str]]:
        """-> the row (strings in lists and dicts) with private-use characters in place of special tokens, and the strings
        that they replaced, in order. A row without special tokens is returned as it is.

        Raises RowError when there are more special tokens than private-use characters.
        """
        if not any(self.pattern.search(text) for text in strings_of(row)):
            return row, []
        hidden: list[str] = []

        def replacement(match: re.Match) -> str:
            hidden.append(match[0])
            if FIRST + len(hidden) > LAST:
                raise RowError(f"more than {len(hidden):,} special tokens in its texts")
            return chr(FIRST + len(hidden) - 1)

        return _mapped(row, lambda text: self._replaced.sub(replacement, text)), hidden

    def split(self, text: str, hidden: list[str]) -> Iterator[tuple[str, bool]]:
        """The pieces of rendered text, and whether each is one of the hidden strings."""
        if not hidden:
            yield text, False
            return
        for i, piece in enumerate(re.split(f"([{chr(FIRST)}-{chr(FIRST + len(hidden) - 1)}])", text)):
            if piece:
                yield (hidden[ord(piece) - FIRST], True) if i % 2 else (piece, False)

    def fenced(self, row: Any) -> Any:
        """The row with a private-use character before and after every text that could form a special token with the text
        next to it in a rendering (it ends as one begins, begins as one ends, or is part of one). None: no such text.
        Keys, roles and types are not changed, because templates compare them."""
        any_fenced = False

        def fence(text: str) -> str:
            nonlocal any_fenced
            if not text or not self._could_join(text):
                return text
            any_fenced = True
            return f"{chr(LAST)}{text}{chr(LAST)}"

        fenced = _mapped(row, fence, untouched=("role", "type"))
        return fenced if any_fenced else None

    def _could_join(self, text: str) -> bool:
        longest = len(self.strings[0]) if self.strings else 0
        if len(text) < longest and any(text in s for s in self.strings):
            return True
        lengths = range(1, min(longest, len(text) + 1))
        return any(text[-k:] in self._prefixes or text[:k] in self._suffixes for k in lengths)


def strings_of(value: Any) -> Iterator[str]:
    """All strings in nested lists and dicts, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings_of(key)
            yield from strings_of(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings_of(inner)


def _mapped(value: Any, change: Callable[[str], str], untouched: tuple[str, ...] | None = None) -> Any:
    """The value with all its strings changed. untouched: keys whose values stay as they are; then all keys stay too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict) and untouched is None:
        return {_mapped(key, change): _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, dict):
        return {k: inner if k in untouched else _mapped(inner, change, untouched) for k, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(inner, change, untouched) for inner in value]
    return value
