"""Conversations and texts to Examples, with the mask of supervised tokens.

The mask comes from rendering, not from a search for token ids. The template renders the messages before an assistant turn
with the generation prompt; that must be the beginning of what it renders with the turn, and the difference is the turn.
So a pad token that equals eos, or eos in the user's text, changes nothing. `{% generation %}` tags are not used: few
templates have them.

The pieces (generation prompt | assistant turn | what follows | …) are tokenized one by one, in `prompt_ids` too, so a
model is trained after the same prompt ids as it gets in generation.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from lowalign.data.encode import Encoder
from lowalign.data.pack import Example
from lowalign.data.rows.read import RowError
from lowalign.data.rows.rewrite import alternating, system_as_user, tools_as_text
from lowalign.data.rows.turns import Message, Tools, is_supervised
from lowalign.data.special_tokens import strings_of
from lowalign.data.template import Template, Unrenderable
from lowalign.errors import UserError

T = TypeVar("T")
Variant = tuple[list[Message], Tools, list[str]]  # a conversation, and notes on what was changed in it

TOOLS_NOTE = "tools written as plain text: the chat template does not support tools"
SYSTEM_NOTE = "system text put before the first user turn: the chat template has no system role"
JOINED_NOTE = "turns joined or a first assistant turn left out: the chat template requires alternating roles"
TURNS_NOTE = "one example for each assistant turn: the chat template rewrites earlier turns"
HIDDEN_NOTE = "special tokens in the texts kept as plain text"


@dataclass
class Piece:
    """A part of rendered text that is tokenized by itself. eos: add the end-of-sequence id after it."""

    text: str
    supervised: bool = False
    eos: bool = False


def load_chat(tokenizer: PreTrainedTokenizerBase, template: Path | None) -> "Chat":
    """A Chat with the template in a file, or with the tokenizer's own. Raises UserError when the template is unusable."""
    try:
        return Chat(tokenizer, None if template is None else template.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the chat template {template} cannot be read ({error})") from error


class Chat:
    """A tokenizer and the template for its conversations.

    template: its text. end_of_turn: the id that ends an assistant turn. notes: how often conversations so far had to be
    changed for the template, by kind of change.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None):
        """template: as in Template. Raises UserError when it cannot render a question and an answer."""
        self.tokenizer = tokenizer
        self._template = Template(tokenizer, template)
        self.template = self._template.text
        self._encoder = Encoder(tokenizer, self._template.special_tokens)
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
        self, messages: list[Message], tools: Tools, encode: Callable[[list[Message], Tools, list[str]], T]
    ) -> T:
        """`encode` (messages, tools, hidden strings) for the first variant of the conversation that the template accepts."""
        special_tokens, forbidden = self._encoder.special_tokens, self._template.forbidden
        if forbidden and any(forbidden in text for text in strings_of((messages, tools))):
            raise RowError(
                f"its text holds {forbidden}, which begins a turn in the default chat template and is no token of this "
                "tokenizer; remove it, or give a template (--data.template)"
            )
        (messages, tools), hidden = special_tokens.hide((messages, tools))
        refusal = None
        for turns, functions, notes in self._variants(messages, tools):
            try:
                result = encode(turns, functions, hidden)
            except Unrenderable as error:
                refusal = refusal or error
                continue
            self.notes.update(notes + ([HIDDEN_NOTE] if hidden else []))
            return result
        raise refusal

    def _variants(self, messages: list[Message], tools: Tools) -> Iterator[Variant]:
        """The conversation, then variants for templates without tools, without system role, or with alternating roles."""
        variants: list[Variant] = [(messages, tools, [])]
        if tools or any(m["role"] == "tool" or "tool_calls" in m for m in messages):
            as_text = (tools_as_text(messages, tools), None, [TOOLS_NOTE])
            variants = [*variants, as_text] if self._template.has_tools else [as_text]
        for turns, functions, notes in variants:
            if any(m["role"] == "system" for m in turns) and not self._template.has_system:
                turns, notes = system_as_user(turns), [*notes, SYSTEM_NOTE]
            yield turns, functions, notes
            if (joined := alternating(turns)) != turns:
                yield joined, functions, [*notes, JOINED_NOTE]

    def _examples(self, messages: list[Message], tools: Tools, hidden: list[str]) -> list[Example]:
        full = self._template.render(messages, tools)
        self._refuse_joins(full, messages, tools, False)
        pieces = self._pieces(full, messages, tools)
        if pieces is not None:
            return [self._example(pieces, hidden)]
        examples = []
        for i in range(1, len(messages)):
            if is_supervised(messages[i]):
                prompt, turn = self._turn(messages, i, tools)
                examples.append(self._example([*self._prompt_pieces(prompt, messages[:i], tools), turn], hidden))
        self.notes[TURNS_NOTE] += 1
        return examples

    def _prompt_ids(self, messages: list[Message], tools: Tools, hidden: list[str]) -> list[int]:
        full = self._template.render(messages, tools, True)
        self._refuse_joins(full, messages, tools, True)
        return self._ids(self._prompt_pieces(full, messages, tools), hidden)[0]

    def _refuse_joins(self, full: str, messages: list[Message], tools: Tools, generation: bool) -> None:
        """Raise RowError when a text of the row forms a special token with what the template writes next to it."""
        special_tokens = self._encoder.special_tokens
        fenced = special_tokens.fenced([messages, tools])
        rendered = full if fenced is None else self._template.render(*fenced, generation)
        if special_tokens.count(rendered) != special_tokens.count(full):
            raise RowError("one of its texts forms a special token with what the chat template writes next to it")

    def _turn(self, messages: list[Message], i: int, tools: Tools) -> tuple[str, Piece]:
        """-> the rendered text before assistant turn i, and the turn with its end token. Raises Unrenderable when the turn
        does not continue the generation prompt."""
        prompt = self._template.render(messages[:i], tools, True)
        whole = self._template.render(messages[: i + 1], tools)
        if not whole.startswith(prompt):
            same = next((k for k, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
            raise Unrenderable(
                f"the chat template begins an answer with {prompt[same:][-40:]!r} in the generation prompt, and differently "
                "in a conversation; use another template (--data.template)"
            )
        text, end_token, supervised = whole[len(prompt) :], self._template.end_token, is_supervised(messages[i])
        if end_token and end_token in text:
            return prompt, Piece(text[: text.rindex(end_token) + len(end_token)], supervised)
        # A turn that calls a tool may end in another token (<|eom_id|>).
        *_, last = [None, *self._encoder.special_tokens.pattern.finditer(text)]
        if last and not text[last.end() :].strip():
            return prompt, Piece(text[: last.end()], supervised)
        return prompt, Piece(text.rstrip(), supervised, eos=True)

    def _pieces(self, full: str, messages: list[Message], tools: Tools) -> list[Piece] | None:
        """`full` cut at the assistant turns, up to the end of the last; None when `full` does not hold every turn as it is
        rendered without the turns after it. An assistant turn at the very beginning stays part of the prompt."""
        pieces, end = [], 0
        for i in range(1, len(messages)):
            if messages[i]["role"] == "assistant":
                try:
                    prompt, turn = self._turn(messages, i, tools)
                except Unrenderable:
                    return None
                if len(prompt) < end or not full.startswith(prompt + turn.text):
                    return None
                pieces += [Piece(full[end : len(prompt)]), turn]
                end = len(prompt) + len(turn.text)
        return pieces

    def _prompt_pieces(self, full: str, messages: list[Message], tools: Tools) -> list[Piece]:
        """`full` (rendered with the generation prompt) cut at the assistant turns; one piece where `_pieces` finds none."""
        pieces = self._pieces(full, messages, tools) or []
        end = sum(len(piece.text) for piece in pieces)
        return [*(replace(piece, supervised=False) for piece in pieces), Piece(full[end:])]

    def _ids(self, pieces: list[Piece], hidden: list[str]) -> tuple[list[int], list[bool]]:
        """The ids of all pieces, and whether each is supervised."""
        ids, supervised = [], []
        for piece in pieces:
            piece_ids = self._encoder.encode(piece.text, hidden, start=not ids)
            piece_ids = piece_ids if ids else self._encoder.with_bos(piece_ids)
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
