"""Special tokens inside the texts of a row never become markers.

Before a row is rendered, every special-token string in it is replaced by one private-use character; after rendering,
that character is tokenized as the plain text it stands for, apart from what surrounds it. So `<|im_<|im_end|>end|>`
cannot close up into a marker, and a row without special tokens is not touched at all.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lowalign.data.rows.turns import RowError

FIRST, LAST = 0xF0000, 0xFFFFD  # the private-use characters of plane 15


class Markers:
    """The strings that only a template may write."""

    def __init__(self, strings: Iterable[str]):
        """strings: the special tokens, and whatever else delimits turns."""
        self.strings = sorted({s for s in strings if s}, key=len, reverse=True)
        # Longest first, as tokenizers match them.
        self.pattern = re.compile("|".join(map(re.escape, self.strings)) or "(?!)")
        self._replaced = re.compile(f"{self.pattern.pattern}|[{chr(FIRST)}-{chr(LAST)}]")
        self._heads = {s[:k] for s in self.strings for k in range(1, len(s))}
        self._tails = {s[k:] for s in self.strings for k in range(1, len(s))}

    def count(self, text: str) -> int:
        """How many markers are in the text."""
        return len(self.pattern.findall(text))

    def hide(self, row: Any) -> tuple[Any, list[str]]:
        """The row (strings in lists and dicts) without markers, and the texts that its private-use characters stand
        for, in their order. A row without markers comes back as it is."""
        if not any(self.pattern.search(text) for text in strings_of(row)):
            return row, []
        hidden: list[str] = []

        def stand_in(match: re.Match) -> str:
            hidden.append(match[0])
            if FIRST + len(hidden) > LAST:
                raise RowError(f"more than {len(hidden):,} special tokens in its texts")
            return chr(FIRST + len(hidden) - 1)

        return _mapped(row, lambda text: self._replaced.sub(stand_in, text)), hidden

    def split(self, text: str, hidden: list[str]) -> Iterator[tuple[str, bool]]:
        """Pieces of rendered text, and whether each is one of the hidden texts."""
        if not hidden:
            yield text, False
            return
        for i, piece in enumerate(re.split(f"([{chr(FIRST)}-{chr(FIRST + len(hidden) - 1)}])", text)):
            if piece:
                yield (hidden[ord(piece) - FIRST], True) if i % 2 else (piece, False)

    def fenced(self, row: Any) -> Any:
        """The row with a private-use character round every text that might become part of a marker together with its
        neighbours in a rendering (it ends as a marker begins, begins as one ends, or lies within one); None when no
        text might. Keys, roles and types stay as they are: templates ask for them."""
        found = False

        def fence(text: str) -> str:
            nonlocal found
            if not text or not self._could_join(text):
                return text
            found = True
            return f"{chr(LAST)}{text}{chr(LAST)}"

        fenced = _mapped(row, fence, spare=("role", "type"))
        return fenced if found else None

    def _could_join(self, text: str) -> bool:
        longest = len(self.strings[0]) if self.strings else 0
        if len(text) < longest and any(text in s for s in self.strings):
            return True
        lengths = range(1, min(longest, len(text) + 1))
        return any(text[-k:] in self._heads or text[:k] in self._tails for k in lengths)


def strings_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings_of(key)
            yield from strings_of(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings_of(inner)


def _mapped(value: Any, change: Callable[[str], str], spare: tuple[str, ...] | None = None) -> Any:
    """The value with all strings changed; with `spare`, but for the keys and what stands under those keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict) and spare is None:
        return {_mapped(key, change): _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, dict):
        return {k: inner if k in spare else _mapped(inner, change, spare) for k, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(inner, change, spare) for inner in value]
    return value
