"""Conversations to rendered pieces: in the first form that the chat template accepts, with notes on what was changed."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lowalign.data.rendering.lost import Lossy, kept_all, lost_parts
from lowalign.data.rendering.one_render import OneRender
from lowalign.data.rendering.special_tokens import SpecialTokens, strings_of
from lowalign.data.rendering.support import Support
from lowalign.data.rendering.template import Template, Unrenderable
from lowalign.data.rendering.turns import Piece, Turns
from lowalign.data.rendering.variants import Variant, variants
from lowalign.data.rows.rewrite import opening_unsupervised
from lowalign.data.rows.thoughts import without_thoughts
from lowalign.data.rows.turns import Message, Tools, is_supervised
from lowalign.data.sources.row import RowError

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


@dataclass(frozen=True)
class Rendered:
    """The pieces of each Example of a conversation, and the strings that private-use characters in them stand for."""

    examples: list[list[Piece]]
    hidden: list[str]


class Renderer:
    """Renders conversations. notes: how often they had to be changed for the template, by kind of change."""

    def __init__(self, template: Template, special_tokens: SpecialTokens, options: ChatOptions):
        self._template, self._special_tokens, self._options = template, special_tokens, options
        self._support, self._turns = Support(template), Turns(template, special_tokens)
        self._one_render = OneRender(template, self._turns, special_tokens)
        self.notes: Counter[str] = Counter()

    def examples(self, messages: list[Message], tools: Tools = None) -> Rendered:
        """The pieces of one Example, or one for each assistant turn if the template rewrites earlier turns. Raises RowError,
        Lossy or Unrenderable."""
        messages = opening_unsupervised(messages)
        supervised = [i for i, m in enumerate(messages) if is_supervised(m)]
        if not supervised:
            raise RowError("no assistant turn to learn from")
        return self._first_accepted(messages[: supervised[-1] + 1], tools, self._examples)

    def prompt(self, messages: list[Message], tools: Tools = None) -> Rendered:
        """The pieces before the answer to `messages`. Raises as `examples` does."""
        return self._first_accepted(messages, tools, self._prompt)

    def _first_accepted(
        self,
        messages: list[Message],
        tools: Tools,
        render: Callable[[Variant], tuple[list[list[Piece]], list[str]]],
    ) -> Rendered:
        """What `render` returns (pieces, notes) for the first variant of the conversation that the template accepts."""
        forbidden = self._template.forbidden
        if forbidden and any(forbidden in text for text in strings_of((messages, tools))):
            raise RowError(
                f"its text holds {forbidden}, which begins a turn in the default chat template and is no token of this "
                "tokenizer; remove it, or give a template (--data.template)"
            )
        if self._options.thoughts == "none":
            messages = without_thoughts(messages)
        (messages, tools), hidden = self._special_tokens.hide((messages, tools))
        refusal = None
        for variant in variants(messages, tools, self._support, bool(self._template.with_tools)):
            try:
                examples, notes = render(variant)
            except Unrenderable as error:
                refusal = refusal or error
                continue
            self.notes.update([*variant.notes, *notes, *([HIDDEN_NOTE] if hidden else [])])
            return Rendered(examples, hidden)
        raise refusal

    def _examples(self, variant: Variant) -> tuple[list[list[Piece]], list[str]]:
        messages, tools = variant.rendered, variant.tools
        self._refuse_joins(messages, tools, False)
        pieces = self._one_render.pieces(messages) if tools is None else None
        if pieces is not None and kept_all(messages, pieces):
            return [pieces], []
        pieces, notes = self._turns.pieces(messages, tools), []
        if pieces is None and self._options.thoughts == "all":
            pieces = self._turns.joined(messages, tools)
            notes = [KEPT_NOTE] if pieces is not None else []
        examples = [pieces] if pieces is not None else list(self._turns.each(messages, tools))
        if not any(piece.supervised for pieces in examples for piece in pieces):
            raise Unrenderable("no answer to learn from: its only assistant turn is the first turn")
        notes += [TURNS_NOTE] if len(examples) > 1 else []
        supervised, rest = lost_parts(variant.messages, examples)
        if supervised and self._options.lossy == "drop":
            thoughts = any("thoughts" in part for part in supervised)
            without = " leave all thoughts out (--data.thoughts none)," if thoughts else ""
            raise Lossy(
                f"{LOST_NOTE}{', '.join(supervised)}, which is to be learned; use another template (--data.template),"
                f"{without} or learn the rest of such rows (--data.lossy keep)"
            )
        return examples, notes + [LOST_NOTE + part for part in (*supervised, *rest)]

    def _prompt(self, variant: Variant) -> tuple[list[list[Piece]], list[str]]:
        messages, tools = variant.rendered, variant.tools
        self._refuse_joins(messages, tools, True)
        return [self._turns.prompt(messages, tools)], []

    def _refuse_joins(self, messages: list[Message], tools: Tools, generation: bool) -> None:
        """Raise RowError when a text of the row forms a special token with what the template writes next to it."""
        special_tokens = self._special_tokens
        fenced = special_tokens.fenced([messages, tools])
        if fenced is None:
            return
        full, rendered = (self._template.render(*row, generation) for row in ((messages, tools), fenced))
        if special_tokens.count(rendered) != special_tokens.count(full):
            raise RowError("one of its texts forms a special token with what the chat template writes next to it")
