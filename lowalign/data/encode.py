"""Text to token ids, piece by piece, so that training and generation use the same ids."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowalign.data.rendering.special_tokens import SpecialTokens
from lowalign.data.sources.row import RowError
from lowalign.errors import UserError


class Encoder:
    """A tokenizer that allows special tokens only where the template wrote them.

    bos_ids: the ids that the tokenizer puts before every text ([bos] or nothing, for most tokenizers).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens: set[str]):
        """special_tokens: strings that are tokens where the template writes them, and plain text elsewhere."""
        self.tokenizer = tokenizer
        self.special_tokens = SpecialTokens(special_tokens)
        ids = {text: tokenizer.convert_tokens_to_ids(text) for text in special_tokens}
        # The id "unknown" stands for any character missing from the vocabulary: no special token, unless it is eos too.
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self.special_ids = {t: i for t, i in ids.items() if i != tokenizer.unk_token_id or i in ends}
        self._special = set(self.special_ids.values())
        self._known: dict[str, list[int]] = {}  # texts tokenized in advance
        self._same: dict[int, int] = {}  # one object for each id: lists of ids then take 8 bytes a token
        bare, with_extras = self._ids("a"), list(tokenizer("a", verbose=False)["input_ids"])
        starts = [k for k in range(len(with_extras)) if with_extras[k : k + len(bare)] == bare]
        self.bos_ids: list[int] = with_extras[: starts[0]] if starts else []
        # SentencePiece tokenizers put a space before every text they are given. Within a row that space would be wrong.
        self._newline = self._ids("\n")
        self._puts_space = self._ids("\na") != self._newline + bare
        self._backend = self._fast_backend(["a", "\na", " the cat, 12", *sorted(special_tokens)])

    @property
    def eos(self) -> int:
        """The end-of-sequence id. Raises UserError where the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token, and nothing else would end an answer: name the token that does as "
                "eos_token in tokenizer_config.json, or use a chat template that ends turns with a token (--data.template) and "
                "rows of messages"
            )
        return self.tokenizer.eos_token_id

    def encode(self, text: str, hidden: list[str], start: bool = False) -> list[int]:
        """The ids of rendered text, its private-use characters encoded as the plain text they replaced.

        start: it is the beginning of the row. Raises RowError when the ids hold more or fewer special tokens than the
        template wrote.
        """
        ids: list[int] = []
        expected = 0
        for piece, plain in self.special_tokens.split(text, hidden):
            ids += (self._as_text if plain else self._piece)(piece, start and not ids)
            expected += 0 if plain else sum(m in self.special_ids for m in self.special_tokens.pattern.findall(piece))
        count = sum(map(self._special.__contains__, ids))
        if count != expected:
            raise RowError(
                f"its texts change the special tokens ({count} in the ids, {expected} written by the template)"
            )
        return ids

    @contextmanager
    def prepared(self, texts: Iterable[tuple[str, bool]]) -> Iterator[None]:
        """Within it, `encode` of these texts (each with its `start`) takes ids that were made for all of them at once, on all
        cores."""
        if self._backend is not None:
            whole = [text if start or not self._puts_space else f"\n{text}" for text, start in texts]
            whole = list(dict.fromkeys(whole))
            self._ids("a")  # a call before may have left the backend with split_special_tokens
            encodings = self._backend.encode_batch_fast(whole, add_special_tokens=False)
            self._known = {text: self._shared(encoding.ids) for text, encoding in zip(whole, encodings, strict=True)}
        try:
            yield
        finally:
            self._known = {}

    def _fast_backend(self, samples: list[str]) -> Any:
        """The tokenizer's backend, if that gives the same ids without the tokenizer; else None."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "encode_batch_fast"):
            return None
        expected = [self._ids(sample) for sample in samples]
        encodings = backend.encode_batch_fast(samples, add_special_tokens=False)
        return backend if [encoding.ids for encoding in encodings] == expected else None

    def _shared(self, ids: list[int]) -> list[int]:
        return list(map(self._same.setdefault, ids, ids))

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids of a whole text, beginning with `bos_ids`, and with bos at most once."""
        if ids[: len(self.bos_ids)] != self.bos_ids:
            ids = self.bos_ids + ids
        return self.one_bos(ids)

    def one_bos(self, ids: list[int]) -> list[int]:
        """The ids, with bos at most once at their beginning."""
        while len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            ids = ids[1:]
        return ids

    def _as_text(self, text: str, start: bool) -> list[int]:
        ids = self._piece(text, start, split=True)
        if any(i in self.special_ids.values() for i in ids):  # Unigram models have the string as an ordinary word
            ids = [i for k, letter in enumerate(text) for i in self._piece(letter, start and k == 0, split=True)]
        return ids

    def _piece(self, text: str, start: bool, split: bool = False) -> list[int]:
        if start or not self._puts_space:
            return self._ids(text, split)
        ids, n = self._ids("\n" + text, split), len(self._newline)
        return ids[n:] if ids[:n] == self._newline else self._ids(text, split)

    def _ids(self, text: str, split: bool = False) -> list[int]:
        if not text:
            return []
        if not split and (known := self._known.get(text)) is not None:
            return known
        options = {"add_special_tokens": False, "split_special_tokens": split, "verbose": False}
        return self._shared(self.tokenizer(text, **options)["input_ids"])
