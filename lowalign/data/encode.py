"""Text to token ids, piece by piece, so that training sees what generation sees."""

from transformers import PreTrainedTokenizerBase

from lowalign.data.markers import Markers
from lowalign.data.rows.turns import RowError
from lowalign.errors import UserError


class Encoder:
    """A tokenizer that is told which pieces of a text may hold special tokens.

    front: the ids it puts before every text (bos, for most that put any). eos: its end-of-sequence id.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markers: set[str]):
        """markers: the strings that stand for tokens where a template writes them, and for plain text elsewhere."""
        self.tokenizer = tokenizer
        self.markers = Markers(markers)
        ids = {text: tokenizer.convert_tokens_to_ids(text) for text in markers}
        # "unknown" comes up for any character the vocabulary lacks, which makes it no marker (unless it is eos too).
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self.marker_ids = {t: i for t, i in ids.items() if i != tokenizer.unk_token_id or i in ends}
        bare, dressed = self._ids("a"), list(tokenizer("a", verbose=False)["input_ids"])
        places = [k for k in range(len(dressed)) if dressed[k : k + len(bare)] == bare]
        self.front: list[int] = dressed[: places[0]] if places else []
        # SentencePiece tokenizers put a space before every text they are given. Within a row that space would be wrong.
        self._newline = self._ids("\n")
        self._puts_space = self._ids("\na") != self._newline + bare

    @property
    def eos(self) -> int:
        """The end-of-sequence id. Raises UserError where the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-sequence token: a model trained with it would never stop")
        return self.tokenizer.eos_token_id

    def encode(self, text: str, hidden: list[str], start: bool = False) -> list[int]:
        """The ids of rendered text, its private-use characters read as the plain text they stand for.

        start: nothing stands before it. Raises RowError when the ids hold other markers than the text does.
        """
        ids: list[int] = []
        written = 0
        for piece, plain in self.markers.split(text, hidden):
            ids += (self._as_text if plain else self._piece)(piece, start and not ids)
            written += 0 if plain else sum(m in self.marker_ids for m in self.markers.pattern.findall(piece))
        known = set(self.marker_ids.values())
        found = sum(i in known for i in ids)
        if found != written:
            raise RowError(f"its texts become special tokens ({found} where the template writes {written})")
        return ids

    def with_front(self, ids: list[int]) -> list[int]:
        """The ids of a whole text, beginning with what the tokenizer puts there, and with bos at most once."""
        if ids[: len(self.front)] != self.front:
            ids = self.front + ids
        while len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            ids = ids[1:]
        return ids

    def _as_text(self, text: str, start: bool) -> list[int]:
        ids = self._piece(text, start, split=True)
        if any(i in self.marker_ids.values() for i in ids):  # Unigram models know the string as a word of its own
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
        options = {"add_special_tokens": False, "split_special_tokens": split, "verbose": False}
        return list(self.tokenizer(text, **options)["input_ids"])
