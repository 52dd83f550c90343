"""Conversations and texts to Examples, with the mask of supervised tokens.

The mask comes from rendering (lowalign/data/rendering/turns.py), not from a search for token ids. So a pad token that
equals eos, or eos in the user's text, changes nothing.

The pieces (generation prompt | assistant turn | what follows | …) are tokenized one by one, in `prompt_ids` too, so a
model is trained after the same prompt ids as it gets in generation.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from lowalign.config.sections import DataConfig
from lowalign.data.encode import Encoder
from lowalign.data.example import Example, all_supervised
from lowalign.data.rendering.renderer import HIDDEN_NOTE, ChatOptions, Rendered, Renderer
from lowalign.data.rendering.template import Template, Unrenderable
from lowalign.data.rendering.turns import Piece
from lowalign.data.rows.time_limit import TookTooLong
from lowalign.data.rows.turns import Message, Tools
from lowalign.errors import UserError


def load_chat(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> "Chat":
    """A Chat with the template in a file, or with the tokenizer's own. Raises UserError when the template is unusable."""
    template, options = config.template, ChatOptions(config.template_args, config.thoughts, config.lossy)
    try:
        return Chat(tokenizer, None if template is None else template.read_text(encoding="utf-8"), options)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the chat template {template} cannot be read ({error})") from error


class Chat:
    """A tokenizer and the template for its conversations.

    template: its text. end_of_turn: the id that ends an assistant turn. positions: most tokens of a row that the base has
    positions for (lowalign.model.positions), where the caller sets it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, options: ChatOptions | None = None
    ):
        """template: as in Template. Raises UserError when it cannot render a question and an answer."""
        self.tokenizer = tokenizer
        self.arguments = template, options  # what another process makes the same Chat of
        self.positions: int | None = None
        options = options or ChatOptions()
        self._template = Template(tokenizer, template, options.template_args)
        self.template = self._template.text
        self._encoder = Encoder(tokenizer, self._template.special_tokens)
        self._renderer = Renderer(self._template, self._encoder.special_tokens, options)
        self._ready: dict[int, Rendered | UserError] = {}  # conversations rendered in advance
        end = self._template.end_token
        self.end_of_turn: int = self._encoder.eos if end is None else tokenizer.convert_tokens_to_ids(end)

    def fitting(self, max_length: int) -> int:
        """Most tokens of a row: `max_length`, or what the base has positions for."""
        return max_length if self.positions is None else min(max_length, self.positions)

    @property
    def notes(self) -> Counter[str]:
        """How often conversations so far had to be changed for the template, by kind of change."""
        return self._renderer.notes

    @notes.setter
    def notes(self, notes: Counter[str]) -> None:
        self._renderer.notes = notes

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
        rendered = self._ready.pop(id(messages), None) or self._render(messages, tools)
        if isinstance(rendered, UserError):
            raise rendered
        return [self._example(pieces, rendered.hidden) for pieces in rendered.examples]

    @contextmanager
    def prepared(self, conversations: Sequence[tuple[list[Message], Tools]], texts: Iterable[str]) -> Iterator[None]:
        """Within it, `example` of these conversations, and `completion` and `document` of these texts, take ids that were
        made for all of them at once. The lists of messages must be the same objects."""
        self._ready = {id(messages): self._render(messages, tools) for messages, tools in conversations}
        rendered = [r for r in self._ready.values() if isinstance(r, Rendered) and not r.hidden]
        pieces = [(piece.text, k == 0) for r in rendered for pieces in r.examples for k, piece in enumerate(pieces)]
        try:
            with self._encoder.prepared([*pieces, *((text, True) for text in texts)]):
                yield
        finally:
            self._ready = {}

    def _render(self, messages: list[Message], tools: Tools) -> Rendered | UserError:
        try:
            return self._renderer.examples(messages, tools)
        except TookTooLong:
            raise
        except UserError as error:
            return error

    def prompt_ids(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """The ids before the answer to `messages`, rendered with the generation prompt. Raises as `example` does."""
        rendered = self._renderer.prompt(messages, tools)
        return self._ids(rendered.examples[0], rendered.hidden)[0]

    def text_ids(self, text: str) -> list[int]:
        """The ids of a plain-text prompt, without a template."""
        return self._encoder.with_bos(self._plain(text, start=True))

    def completion(self, prompt: str, completion: str) -> Example:
        """The Example of plain text and its continuation, which ends with eos; without a template."""
        answer = [*self._plain(completion, start=not prompt), self._encoder.eos]
        return Example(self.text_ids(prompt), [answer], [all_supervised(len(answer))])

    def document(self, text: str) -> Example:
        """The Example of a text that is all supervised, between bos (if the tokenizer adds it) and eos."""
        ids = [*self._plain(text, start=True), self._encoder.eos]
        return Example(list(self.bos_ids), [ids], [[True] * len(ids)])

    def _plain(self, text: str, start: bool) -> list[int]:
        text, hidden = self._encoder.special_tokens.hide(text)
        self.notes.update([HIDDEN_NOTE] if hidden else [])
        return self._encoder.encode(text, hidden, start)

    def _ids(self, pieces: list[Piece], hidden: list[str]) -> tuple[list[int], list[float]]:
        """The ids of all pieces, and the weight of each."""
        ids, weights = [], []
        for piece in pieces:
            piece_ids = self._encoder.encode(piece.text, hidden, start=not ids)
            piece_ids = piece_ids if ids else self._encoder.one_bos(piece_ids)
            piece_ids = [*piece_ids, self._encoder.eos] if piece.eos else piece_ids
            ids += piece_ids
            weights += [piece.weight] * len(piece_ids)
        return ids, weights

    def _example(self, pieces: list[Piece], hidden: list[str]) -> Example:
        ids, weights = self._ids(pieces, hidden)
        supervised = list(map(bool, weights))
        if True not in supervised:
            raise Unrenderable("no answer to learn from: its only assistant turn is the first turn")
        start = supervised.index(True)
        mask = supervised[start:]
        mask = all_supervised(len(mask)) if all(mask) else mask
        token_weights = None if all(piece.weight in (0, 1) for piece in pieces) else [weights[start:]]
        return Example(ids[:start], [ids[start:]], [mask], token_weights=token_weights)
