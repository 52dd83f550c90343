"""How much two short texts share: ROUGE-L, and the texts that a new one must differ from."""

import re
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"\w+")


def words_of(text: str) -> tuple[str, ...]:
    """The words in lower case; without any, the text itself, so that two texts of signs are not taken for the same."""
    return tuple(_WORD.findall(text.lower())) or tuple(text.split())


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, with one bit for each word of a (Hyyrö, Bit-parallel LCS-length computation
    revisited, 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    free = full
    for word in b:
        hits = free & places.get(word, 0)
        free = ((free + hits) | (free - hits)) & full
    return len(a) - free.bit_count()


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """The F-measure 2 LCS / (|a| + |b|) of two lists of words (Lin, ROUGE, 2004)."""
    return 2 * common_subsequence(a, b) / (len(a) + len(b)) if a or b else 1.0


class Known:
    """Texts, by name of what they are."""

    def __init__(self) -> None:
        self._texts: list[tuple[tuple[str, ...], str]] = []

    def add(self, texts: Iterable[str], what: str) -> None:
        """Texts of one kind."""
        self._texts += [(words_of(text), what) for text in texts]

    def nearest(self, text: str, least: float) -> tuple[float, str]:
        """The highest ROUGE-L of the text to a known one, from `least` on, and what that one is; (0, "") for none."""
        own, best = words_of(text), (0.0, "")
        for words, what in self._texts:
            longest = 2 * min(len(own), len(words)) / (len(own) + len(words))
            if longest >= max(least, best[0]) and (score := rouge_l(own, words)) >= least and score > best[0]:
                best = score, what
        return best
