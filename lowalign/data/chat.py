"""Conversations and texts to Examples, with the mask of what is supervised.

The mask is made by construction. The template renders the messages before an assistant turn with the generation prompt;
that must be the beginning of what it renders with the turn, and the difference is the turn. Nothing is found by looking
for token ids, so a pad that equals eos, or an eos in the user's text, changes nothing. `{% generation %}` marks are not
used: few templates have them.

The pieces (generation prompt | assistant turn | what follows | …) are tokenized one by one, in `prompt_ids` too, so the
tokens a model is trained after are the tokens it is asked to continue.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from lowalign.data.encode import Encoder
from lowalign.data.markers import strings_of
from lowalign.data.pack import Example
from lowalign.data.rows.rewrite import alternating, system_as_user, tools_as_text
from lowalign.data.rows.turns import Message, RowError, Tools
from lowalign.data.template import Template, Unrenderable
from lowalign.errors import UserError

T = TypeVar("T")

TOOLS_NOTE = "tools written as plain text: the chat template has none"
SYSTEM_NOTE = "system text put before the first user turn: the chat template has no system role"
JOINED_NOTE = "turns joined or an opening assistant turn left out: the chat template wants user and assistant in turn"
TURNS_NOTE = "one example for each assistant turn: the chat template rewrites earlier turns"
HIDDEN_NOTE = "special tokens in the texts kept as plain text"


@dataclass
class Piece:
    """A stretch of rendered text that is tokenized by itself. eos: the end-of-sequence id follows it."""

    text: str
    supervised: bool = False
    eos: bool = False


def load_chat(tokenizer: PreTrainedTokenizerBase, template: Path | None) -> "Chat":
    """A Chat with the template in a file, or with the tokenizer's own. Raises UserError when it cannot be used."""
    try:
        return Chat(tokenizer, None if template is None else template.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the chat template {template} cannot be read ({error})") from error


class Chat:
    """A tokenizer and the template that its conversations are written in.

    template: its text. end_of_turn: the id that ends an assistant turn. notes: what had to be done to say the rows so
    far in this template, and how often.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None):
        """template: Jinja text; None takes the tokenizer's, or ChatML where it has none. Raises UserError when the
        template cannot render a question and an answer."""
        self.tokenizer = tokenizer
        self._template = Template(tokenizer, template)
        self.template = self._template.text
        self._encoder = Encoder(tokenizer, self._template.markers)
        closing = self._template.closing
        self.end_of_turn: int = self._encoder.eos if closing is None else tokenizer.convert_tokens_to_ids(closing)
        self.notes: Counter[str] = Counter()

    @property
    def end_ids(self) -> set[int]:
        """Every id that a finished turn may end in: end-of-turn, eos, and whatever else only the template writes."""
        return {self.end_of_turn, *self._encoder.marker_ids.values()}

    @property
    def templates(self) -> list[str | None]:
        """All that decides how a conversation is written: the template, and the one for rows with tools, if any."""
        return [self.template, self._template.with_tools]

    @property
    def front(self) -> list[int]:
        """The ids that every text begins with: [bos], or nothing."""
        return self._encoder.front

    def example(self, messages: list[Message], tools: Tools = None) -> list[Example]:
        """The Examples of one conversation: one, or one for each assistant turn where the template rewrites history.

        The prompt reaches through the header of the first turn to be supervised; each such turn is supervised through its
        end-of-turn token. Raises RowError (the row is wrong) or Unrenderable (the template cannot say it).
        """
        supervised = [i for i, m in enumerate(messages) if _learnt(m)]
        if not supervised:
            raise RowError("no assistant turn to learn from")
        return self._say(messages[: supervised[-1] + 1], tools, self._examples)

    def prompt_ids(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """The ids that the answer to `messages` continues: rendered with the generation prompt."""
        return self._say(messages, tools, self._prompt_ids)

    def text_ids(self, text: str) -> list[int]:
        """The ids of plain text that is to be continued; no template."""
        return self._encoder.with_front(self._plain(text, start=True))

    def completion(self, prompt: str, completion: str) -> Example:
        """Plain text and its continuation, which ends with eos; no template."""
        answer = [*self._plain(completion, start=not prompt), self._encoder.eos]
        return Example(self.text_ids(prompt), [answer], [[True] * len(answer)])

    def document(self, text: str) -> Example:
        """A text to learn as a whole, between bos (where the tokenizer puts one) and eos."""
        ids = [*self._plain(text, start=True), self._encoder.eos]
        return Example(list(self.front), [ids], [[True] * len(ids)])

    def _plain(self, text: str, start: bool) -> list[int]:
        text, hidden = self._encoder.markers.hide(text)
        self.notes.update([HIDDEN_NOTE] if hidden else [])
        return self._encoder.encode(text, hidden, start)

    def _say(self, messages: list[Message], tools: Tools, use: Callable[[list[Message], Tools, list[str]], T]) -> T:
        """`use` on the conversation in the first form that the template accepts."""
        markers, forbidden = self._encoder.markers, self._template.forbidden
        if forbidden and any(forbidden in text for text in strings_of((messages, tools))):
            raise RowError(
                f"its text holds {forbidden}, which begins a turn in the default chat template and is no token of this "
                "tokenizer; take it out, or give a template (--data.template)"
            )
        (messages, tools), hidden = markers.hide((messages, tools))
        refusal = None
        for turns, functions, notes in self._forms(messages, tools):
            try:
                result = use(turns, functions, hidden)
            except Unrenderable as error:
                refusal = refusal or error
                continue
            self.notes.update(notes + ([HIDDEN_NOTE] if hidden else []))
            return result
        raise refusal

    def _forms(self, messages: list[Message], tools: Tools) -> Iterator[tuple[list[Message], Tools, list[str]]]:
        forms = [(messages, tools, [])]
        if tools or any(m["role"] == "tool" or "tool_calls" in m for m in messages):
            as_text = (tools_as_text(messages, tools), None, [TOOLS_NOTE])
            forms = [*forms, as_text] if self._template.has_tools else [as_text]
        for turns, functions, notes in forms:
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
            if _learnt(messages[i]):
                prompt, turn = self._turn(messages, i, tools)
                examples.append(self._example([*self._prompt_pieces(prompt, messages[:i], tools), turn], hidden))
        self.notes[TURNS_NOTE] += 1
        return examples

    def _prompt_ids(self, messages: list[Message], tools: Tools, hidden: list[str]) -> list[int]:
        full = self._template.render(messages, tools, True)
        self._refuse_joins(full, messages, tools, True)
        return self._ids(self._prompt_pieces(full, messages, tools), hidden)[0]

    def _refuse_joins(self, full: str, messages: list[Message], tools: Tools, generation: bool) -> None:
        """Raise RowError when the template makes a marker of a text of the row and what stands beside it."""
        markers = self._encoder.markers
        fenced = markers.fenced([messages, tools])
        if fenced is not None and markers.count(self._template.render(*fenced, generation)) != markers.count(full):
            raise RowError("one of its texts and what stands beside it become a special token in the chat template")

    def _turn(self, messages: list[Message], i: int, tools: Tools) -> tuple[str, Piece]:
        """What is rendered before assistant turn i, and the turn through its end. Raises Unrenderable when the turn does
        not continue the generation prompt."""
        prompt = self._template.render(messages[:i], tools, True)
        whole = self._template.render(messages[: i + 1], tools)
        if not whole.startswith(prompt):
            same = next((k for k, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
            raise Unrenderable(
                f"the chat template begins an answer with {prompt[same:][-40:]!r} when the model is to write it, and in "
                "another way when it is given; use a template that does not (--data.template)"
            )
        text, closing, supervised = whole[len(prompt) :], self._template.closing, _learnt(messages[i])
        if closing and closing in text:
            return prompt, Piece(text[: text.rindex(closing) + len(closing)], supervised)
        # A turn that calls a tool may end in a token of its own (<|eom_id|>).
        marks = list(self._encoder.markers.pattern.finditer(text))
        if marks and not text[marks[-1].end() :].strip():
            return prompt, Piece(text[: marks[-1].end()], supervised)
        return prompt, Piece(text.rstrip(), supervised, eos=True)

    def _pieces(self, full: str, messages: list[Message], tools: Tools) -> list[Piece] | None:
        """`full` cut at the assistant turns, through the last of them; None when it does not hold them as they are
        rendered without what follows. An opening assistant turn answers nothing and stays part of the prompt."""
        pieces, at = [], 0
        for i in range(1, len(messages)):
            if messages[i]["role"] == "assistant":
                try:
                    prompt, turn = self._turn(messages, i, tools)
                except Unrenderable:
                    return None
                if len(prompt) < at or not full.startswith(prompt + turn.text):
                    return None
                pieces += [Piece(full[at : len(prompt)]), turn]
                at = len(prompt) + len(turn.text)
        return pieces

    def _prompt_pieces(self, full: str, messages: list[Message], tools: Tools) -> list[Piece]:
        """`full`, rendered with the generation prompt, cut at the assistant turns of the history where it holds them."""
        pieces = self._pieces(full, messages, tools) or []
        at = sum(len(piece.text) for piece in pieces)
        return [*(replace(piece, supervised=False) for piece in pieces), Piece(full[at:])]

    def _ids(self, pieces: list[Piece], hidden: list[str]) -> tuple[list[int], list[bool]]:
        """The ids of all pieces, and whether each is supervised."""
        ids, supervised = [], []
        for piece in pieces:
            new = self._encoder.encode(piece.text, hidden, start=not ids)
            new = new if ids else self._encoder.with_front(new)
            new = [*new, self._encoder.eos] if piece.eos else new
            ids += new
            supervised += [piece.supervised] * len(new)
        return ids, supervised

    def _example(self, pieces: list[Piece], hidden: list[str]) -> Example:
        ids, supervised = self._ids(pieces, hidden)
        if True not in supervised:
            raise Unrenderable("nothing is left to learn: its only answer is an opening assistant turn")
        start = supervised.index(True)
        return Example(ids[:start], [ids[start:]], [supervised[start:]])


def _learnt(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0
