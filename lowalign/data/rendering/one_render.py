"""The turns of a plain conversation from one rendering, for templates that were found to allow it.

The header of an assistant turn and the end of a turn hold special tokens, which no text of a row can hold. So the turns lie
between them. Whether this gives the same pieces as `Turns.pieces`, which renders each turn, is tried on conversations of
its own, once for each kind of conversation.
"""

from lowalign.data.rendering.special_tokens import SpecialTokens
from lowalign.data.rendering.template import ANSWER, SYSTEM, USER, Template, Unrenderable
from lowalign.data.rendering.turns import Piece, Turns, text_after_last
from lowalign.data.rows.turns import Message, weight_of

TEXTS = ("a", "Two\n\nlines, 1 + 1 = 2.", "  spaces \n", "ü 💡 {x} {{ y }} `z`", "A longer text. " * 40, "1. a\n2. b\n")
PLAIN = {"role", "content", "weight"}
Kind = tuple[bool, int]  # whether there is a system turn; turns of the assistant, 2 for more


class OneRender:
    """Cuts rendered conversations at what stands before and after each answer."""

    def __init__(self, template: Template, turns: Turns, special_tokens: SpecialTokens):
        self._template, self._turns, self._special_tokens = template, turns, special_tokens
        self._header: str | None = None
        self._same: dict[Kind, bool] = {}

    def pieces(self, messages: list[Message]) -> list[Piece] | None:
        """The pieces of a conversation without calls and thoughts; None where they must be found otherwise. Raises
        Unrenderable."""
        kind = _kind(messages)
        if kind is None or self._template.has_generation_tags or self._template.shared_end:
            return None
        if kind not in self._same:
            self._same[kind] = self._try(kind)
        return self._cut(messages) if self._same[kind] else None

    def _cut(self, messages: list[Message]) -> list[Piece] | None:
        header, end_token = self._find_header(), self._template.end_token
        if not header or not end_token:
            return None
        full = self._template.render(messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        parts = full.split(header)
        if len(parts) != len(answers) + 1:
            return None
        pieces, before = [], parts[0]
        for i, part in zip(answers, parts[1:], strict=True):
            text, found, after = part.partition(end_token)
            if not found:
                return None
            pieces += [Piece(before + header), Piece(text + end_token, weight_of(messages[i]), message=i)]
            before = after
        return pieces

    def _find_header(self) -> str:
        """What ends the prompt of every answer, from its first special token on; "" if it has none."""
        if self._header is None:
            tail = text_after_last(self._template, [USER], None)
            special = self._special_tokens.pattern.search(tail)
            self._header = tail[special.start() :] if special else ""
        return self._header

    def _try(self, kind: Kind) -> bool:
        """Whether the pieces of this kind of conversation are those that `Turns` finds."""
        system, several = kind
        for shift in range(len(TEXTS)):
            texts = [TEXTS[(shift + k) % len(TEXTS)] for k in range(7)]
            messages = [SYSTEM | {"content": texts[6]}] if system else []
            for k in range(3 if several > 1 else 1):
                messages += [USER | {"content": texts[2 * k]}, ANSWER | {"content": texts[2 * k + 1]}]
            try:
                pieces = self._cut(messages)
                if pieces is None or pieces != self._turns.pieces(messages, None):
                    return False
            except Unrenderable:
                return False
        return True


def _kind(messages: list[Message]) -> Kind | None:
    """The kind of a conversation of questions and answers; None for others: with calls, thoughts or joined roles."""
    system = messages[0]["role"] == "system"
    turns = messages[1:] if system else messages
    for k, message in enumerate(turns):
        if (
            message["role"] != ("assistant" if k % 2 else "user")
            or message.keys() - PLAIN
            or not message["content"].strip()
        ):
            return None
        if k % 2 and ("think" in message["content"] or "THINK" in message["content"]):
            return None
    return None if len(turns) % 2 or not turns else (system, min(len(turns) // 2, 2))
