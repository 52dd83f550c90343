"""Conversations and texts to Examples, with the mask of supervised tokens.

The mask comes from rendering (lowalign/data/turns.py), not from a search for token ids. So a pad token that equals eos, or
eos in the user's text, changes nothing.

The pieces (generation prompt | assistant turn | what follows | …) are tokenized one by one, in `prompt_ids` too, so a
model is trained after the same prompt ids as it gets in generation.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from lowalign.config.sections import DataConfig
from lowalign.data.encode import Encoder
from lowalign.data.lost import Lossy, lost_parts
from lowalign.data.pack import Example
from lowalign.data.rows.read import RowError
from lowalign.data.rows.rewrite import opening_unsupervised
from lowalign.data.rows.thoughts import without_thoughts
from lowalign.data.rows.turns import Message, Tools, is_supervised
from lowalign.data.special_tokens import strings_of
from lowalign.data.support import Support
from lowalign.data.template import Template, Unrenderable
from lowalign.data.turns import Piece, Turns
from lowalign.data.variants import Variant, variants
from lowalign.errors import UserError

T = TypeVar("T")

TURNS_NOTE = "one example for each assistant turn: the chat template rewrites earlier turns (see --data.thoughts)"
KEPT_NOTE = "one example with the thoughts of all turns, which the chat template takes out of earlier turns"
HIDDEN_NOTE = "special tokens in the texts kept as plain text"
LOST_NOTE = "the chat template leaves out "


@dataclass(frozen=True)
class ChatOptions:
    """How conversations are rendered; the fields are options of the same names in DataConfig."""

    template_args: tuple[str, ...] = ()
    thoughts: Literal["last", "all", "none"] = "last"
    lossy: Literal["drop", "keep"] = "drop"


def load_chat(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> "Chat":
    """A Chat with the template in a file, or with the tokenizer's own. Raises UserError when the template is unusable."""
    template, options = config.template, ChatOptions(config.template_args, config.thoughts, config.lossy)
    try:
        return Chat(tokenizer, None if template is None else template.read_text(encoding="utf-8"), options)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the chat template {template} cannot be read ({error})") from error


class Chat:
    """A tokenizer and the template for its conversations.

    template: its text. end_of_turn: the id that ends an assistant turn. notes: how often conversations so far had to be
    changed for the template, by kind of change.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, options: ChatOptions | None = None
    ):
        """template: as in Template. Raises UserError when it cannot render a question and an answer."""
        self.tokenizer = tokenizer
        self.options = options or ChatOptions()
        self._template = Template(tokenizer, template, self.options.template_args)
        self.template = self._template.text
        self._support = Support(self._template)
        self._encoder = Encoder(tokenizer, self._template.special_tokens)
        self._turns = Turns(self._template, self._encoder.special_tokens)
        end = self._template.end_token
        self.end_of_turn: int = self._encoder.eos if end is None else tokenizer.convert_tokens_to_ids(end)
        self.notes: Counter[str] = Counter()

    @property
    def end_ids(self) -> set[int]:
        """Every id that may end a finished turn: end-of-turn, eos, and all other special tokens of the template."""
        return {self.end_of_turn, *self._encoder.special_ids.values()}

    @property
    def end_of_text(self) -> int:
        """The id that ends a plain-text completion. Raises UserError where the tokenizer has none."""
        return self._encoder.eos

    @property
    def templates(self) -> list[str | None]:
        """The template, and the one for rows with tools, or None."""
        return [self.template, self._template.with_tools]

    @property
    def bos_ids(self) -> list[int]:
        """The ids that every text begins with: [bos], or nothing."""
        return self._encoder.bos_ids

    def example(self, messages: list[Message], tools: Tools = None) -> list[Example]:
        """The Examples of one conversation: one, or one for each assistant turn if the template rewrites earlier turns.

        The prompt ends with the header of the first supervised turn. Each supervised turn includes its end-of-turn token.
        Raises RowError (the row is wrong) or Unrenderable (the template cannot render it).
        """
        messages = opening_unsupervised(messages)
        supervised = [i for i, m in enumerate(messages) if is_supervised(m)]
        if not supervised:
            raise RowError("no assistant turn to learn from")
        return self._first_accepted(messages[: supervised[-1] + 1], tools, self._examples)

    def prompt_ids(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """The ids before the answer to `messages`, rendered with the generation prompt. Raises as `example` does."""
        return self._first_accepted(messages, tools, self._prompt_ids)

    def text_ids(self, text: str) -> list[int]:
        """The ids of a plain-text prompt, without a template."""
        return self._encoder.with_bos(self._plain(text, start=True))

    def completion(self, prompt: str, completion: str) -> Example:
        """The Example of plain text and its continuation, which ends with eos; without a template."""
        answer = [*self._plain(completion, start=not prompt), self._encoder.eos]
        return Example(self.text_ids(prompt), [answer], [[True] * len(answer)])

    def document(self, text: str) -> Example:
        """The Example of a text that is all supervised, between bos (if the tokenizer adds it) and eos."""
        ids = [*self._plain(text, start=True), self._encoder.eos]
        return Example(list(self.bos_ids), [ids], [[True] * len(ids)])

    def _plain(self, text: str, start: bool) -> list[int]:
        text, hidden = self._encoder.special_tokens.hide(text)
        self.notes.update([HIDDEN_NOTE] if hidden else [])
        return self._encoder.encode(text, hidden, start)

    def _first_accepted(
        self, messages: list[Message], tools: Tools, encode: Callable[[Variant, list[str]], tuple[T, list[str]]]
    ) -> T:
        """What `encode` (variant, hidden strings) returns, with notes, for the first variant of the conversation that the
        template accepts."""
        special_tokens, forbidden = self._encoder.special_tokens, self._template.forbidden
        if forbidden and any(forbidden in text for text in strings_of((messages, tools))):
            raise RowError(
                f"its text holds {forbidden}, which begins a turn in the default chat template and is no token of this "
                "tokenizer; remove it, or give a template (--data.template)"
            )
        if self.options.thoughts == "none":
            messages = without_thoughts(messages)
        (messages, tools), hidden = special_tokens.hide((messages, tools))
        refusal = None
        for variant in variants(messages, tools, self._support, bool(self._template.with_tools)):
            try:
                result, notes = encode(variant, hidden)
            except Unrenderable as error:
                refusal = refusal or error
                continue
            self.notes.update([*variant.notes, *notes, *([HIDDEN_NOTE] if hidden else [])])
            return result
        raise refusal

    def _examples(self, variant: Variant, hidden: list[str]) -> tuple[list[Example], list[str]]:
        messages, tools = variant.rendered, variant.tools
        self._refuse_joins(messages, tools, False)
        rendered, notes = self._turns.pieces(messages, tools), []
        if rendered is None and self.options.thoughts == "all":
            rendered = self._turns.joined(messages, tools)
            notes = [KEPT_NOTE] if rendered is not None else []
        examples = [rendered] if rendered is not None else list(self._turns.each(messages, tools))
        notes += [TURNS_NOTE] if len(examples) > 1 else []
        supervised, rest = lost_parts(variant.messages, examples)
        if supervised and self.options.lossy == "drop":
            without = (
                " leave all thoughts out (--data.thoughts none)," if any("thoughts" in s for s in supervised) else ""
            )
            raise Lossy(
                f"{LOST_NOTE}{', '.join(supervised)}, which is to be learned; use another template (--data.template),"
                f"{without} or learn the rest of such rows (--data.lossy keep)"
            )
        notes += [LOST_NOTE + part for part in (*supervised, *rest)]
        return [self._example(pieces, hidden) for pieces in examples], notes

    def _prompt_ids(self, variant: Variant, hidden: list[str]) -> tuple[list[int], list[str]]:
        messages, tools = variant.rendered, variant.tools
        self._refuse_joins(messages, tools, True)
        return self._ids(self._turns.prompt(messages, tools), hidden)[0], []

    def _refuse_joins(self, messages: list[Message], tools: Tools, generation: bool) -> None:
        """Raise RowError when a text of the row forms a special token with what the template writes next to it."""
        special_tokens = self._encoder.special_tokens
        fenced = special_tokens.fenced([messages, tools])
        if fenced is None:
            return
        full, rendered = (self._template.render(*row, generation) for row in ((messages, tools), fenced))
        if special_tokens.count(rendered) != special_tokens.count(full):
            raise RowError("one of its texts forms a special token with what the chat template writes next to it")

    def _ids(self, pieces: list[Piece], hidden: list[str]) -> tuple[list[int], list[bool]]:
        """The ids of all pieces, and whether each is supervised."""
        ids, supervised = [], []
        for piece in pieces:
            piece_ids = self._encoder.encode(piece.text, hidden, start=not ids)
            piece_ids = piece_ids if ids else self._encoder.one_bos(piece_ids)
            piece_ids = [*piece_ids, self._encoder.eos] if piece.eos else piece_ids
            ids += piece_ids
            supervised += [piece.supervised] * len(piece_ids)
        return ids, supervised

    def _example(self, pieces: list[Piece], hidden: list[str]) -> Example:
        ids, supervised = self._ids(pieces, hidden)
        if True not in supervised:
            raise Unrenderable("no answer to learn from: its only assistant turn is the first turn")
        start = supervised.index(True)
        return Example(ids[:start], [ids[start:]], [supervised[start:]])
