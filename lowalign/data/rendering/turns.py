"""Where the assistant's turns are in rendered text.

The template renders the messages before a turn with the generation prompt, and the messages with the turn. Where the first
is the beginning of the second, the difference is the turn. Where it is not, the turn is looked up in the second text: after
the text that the template writes between a last message and an answer.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lowalign.data.rendering.special_tokens import SpecialTokens
from lowalign.data.rendering.template import Template, Unrenderable
from lowalign.data.rows.thoughts import close_tag, thoughts_of
from lowalign.data.rows.turns import Message, Tools, is_supervised, weight_of

PROBE = "\U0010fffd"  # a text that no row and no template has; one character of the private-use plane 16
BREAK = re.compile(r"(?=[<\[])|(?<=[\n>\]])")  # where a generation prompt may be cut: before and after tags and lines
CLOSING_TAG = re.compile(r"(</[^<>]*think[^<>]*>|\[/THINK\])\s*$")
THOUGHT_TAGS = re.compile(r"(\s|</?[^<>]*think[^<>]*>|\[/?THINK\])*")
OPEN_TAG = re.compile(r"(<(?![/!])[^<>]*>|\[(?!/)[A-Z_]+\])(\s*)$")  # an opening tag at the end of a text


@dataclass
class Piece:
    """A part of rendered text that is tokenized by itself. weight: factor of its tokens in the loss; 0: not supervised. eos: add
    the end-of-sequence id after it. message: the number of the message whose turn it is; None: text between the turns."""

    text: str
    weight: float = 0
    eos: bool = False
    message: int | None = None

    @property
    def supervised(self) -> bool:
        """Whether its tokens are learned."""
        return self.weight != 0


class Turns:
    """Finds the assistant's turns in what a template renders."""

    def __init__(self, template: Template, special_tokens: SpecialTokens):
        self._template, self._special_tokens = template, special_tokens

    def pieces(self, messages: list[Message], tools: Tools, full: str | None = None) -> list[Piece] | None:
        """`full` (the rendered messages, or the text of a prompt that begins with them) cut at the assistant turns, up to
        the end of the last; None when it does not hold every turn as it is rendered without the turns after it.

        An assistant turn at the very beginning stays part of the text before the next turn.
        """
        if full is None and (tagged := self._tagged(messages, tools)) is not None:
            return tagged
        full = self._template.render(messages, tools) if full is None else full
        pieces, end = [], 0
        for i in range(1, len(messages)):
            if messages[i]["role"] == "assistant":
                try:
                    prompt, turn = self.turn(messages, i, tools)
                except Unrenderable:
                    return None
                # Where the next turn's marker ends a turn, the last turn has none in `full`.
                last = self._template.shared_end and i + 1 == len(messages)
                held = full.rstrip() + self._template.end_token if last else full
                if len(prompt) < end or not held.startswith(prompt + turn.text):
                    return None
                pieces += [Piece(full[end : len(prompt)]), turn]
                end = len(prompt) + len(turn.text)
        return pieces

    def prompt(self, messages: list[Message], tools: Tools, text: str | None = None) -> list[Piece]:
        """The rendered messages with the generation prompt (`text`, if it is known), cut at the assistant turns; one piece
        where the turns are not found."""
        text = self._template.render(messages, tools, True) if text is None else text
        pieces = self.pieces(messages, tools, text) or []
        end = sum(len(piece.text) for piece in pieces)
        return [*(replace(piece, weight=0) for piece in pieces), Piece(text[end:])]

    def each(self, messages: list[Message], tools: Tools) -> Iterator[list[Piece]]:
        """For each supervised turn the pieces of its prompt, and the turn."""
        for i in range(1, len(messages)):
            if is_supervised(messages[i]):
                prompt, turn = self.turn(messages, i, tools)
                yield [*self.prompt(messages[:i], tools, prompt), turn]

    def joined(self, messages: list[Message], tools: Tools) -> list[Piece] | None:
        """One row in which each turn is written as if it were the last, with its thoughts, whatever the template makes of
        it in the history; None when the history does not hold the turns' texts and ends."""
        pieces: list[Piece] = []
        before = ""  # the prompt of the turn before
        for i in range(1, len(messages)):
            if messages[i]["role"] != "assistant":
                continue
            prompt, turn = self.turn(messages, i, tools)
            between = prompt
            if pieces:
                history = before[: _agreement(before, prompt)]
                history = history if history == before else history[: _last_break(history, before)]
                following, kept = prompt[len(history) :], None
                if THOUGHT_TAGS.fullmatch(before[len(history) :]):
                    kept = _kept(pieces[-1].text, following)
                if kept is None:
                    return None
                between = following[kept:]
            pieces += [Piece(between), turn]
            before = prompt
        return pieces

    def turn(self, messages: list[Message], i: int, tools: Tools) -> tuple[str, Piece]:
        """-> the rendered text before assistant turn i, and the turn with its end. Raises Unrenderable."""
        prompt = self._template.render(messages[:i], tools, True)
        whole = self._template.render(messages[: i + 1], tools)
        text = whole[len(prompt) :] if whole.startswith(prompt) else self._found(messages, i, tools, prompt, whole)
        if self._template.shared_end:
            piece = Piece(text.rstrip() + self._marker(messages, i, tools, whole))
        else:
            piece = self._ended(text)
        return prompt, replace(piece, weight=weight_of(messages[i]), message=i)

    def _found(self, messages: list[Message], i: int, tools: Tools, prompt: str, whole: str) -> str:
        """The text of turn i in `whole`, as it continues `prompt`.

        Rendered again with another text in the turn, and in the message before it, `whole` shows the stretch between the
        two. In it, the turn begins after as much as possible of what `prompt` has behind its last message.
        """
        render, last, turn = self._template.render, messages[i - 1], messages[i]
        changed = [*messages[: i - 1], _changed(last)]
        tail = text_after_last(self._template, messages[:i], tools)
        start = len(whole) - _common_suffix(whole, render([*changed, turn], tools))
        stop = _agreement(whole, render([*messages[:i], _changed(turn)], tools))
        breaks = sorted({0, len(tail), *(m.start() for m in BREAK.finditer(tail))})
        for end in reversed(breaks):
            for begin in (b for b in breaks if b < end):
                written = tail[begin:end]
                at = whole.rfind(written, start, stop + _blank(written)) if written.strip() else -1
                if at >= 0:
                    return _continued(tail[end:], whole[at + len(written) :], turn)
        raise Unrenderable(
            f"the chat template writes {tail[-40:]!r} before an answer in the generation prompt, and something else in a "
            "conversation; use another template (--data.template)"
        )

    def _ended(self, text: str) -> Piece:
        """The turn up to its end token; with eos where the template has none."""
        end_token = self._template.end_token
        if end_token and end_token in text:
            return Piece(text[: text.rindex(end_token) + len(end_token)])
        # A turn that calls a tool may end in another token (<|eom_id|>).
        ended = self._up_to_token(text)
        return Piece(text.rstrip(), eos=True) if ended is None else Piece(ended)

    def _up_to_token(self, text: str) -> str | None:
        """The text without white space after the special token that it ends with; None if it ends with none."""
        *_, last = [None, *self._special_tokens.pattern.finditer(text)]
        return text[: last.end()] if last and not text[last.end() :].strip() else None

    def _marker(self, messages: list[Message], i: int, tools: Tools, whole: str) -> str:
        """What ends turn i of a template that ends no turn by itself: the marker of the turn after it."""
        next_turn = messages[i + 1 : i + 2]
        if not next_turn and (calls := messages[i].get("tool_calls")):
            next_turn = [{"role": "tool", "content": PROBE, "tool_call_id": calls[0].get("id", "")}]
        if next_turn:
            following, end = self._template.render([*messages[: i + 1], *next_turn], tools), len(whole.rstrip())
            marker = self._special_tokens.pattern.match(following, end) if following[:end] == whole[:end] else None
            if marker:
                return marker[0]
        return self._template.end_token

    def _tagged(self, messages: list[Message], tools: Tools) -> list[Piece] | None:
        """The pieces of a template with {% generation %}; None for others, and where its tags do not match the turns."""
        if not self._template.has_generation_tags:
            return None
        full, spans = self._template.render_tagged(messages, tools)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) != len(turns):
            return None
        pieces, end = [], 0
        for i, (start, stop) in zip(turns, spans, strict=True):
            turn = self._up_to_token(full[start:stop]) or full[start:stop]  # no model writes white space after its end
            pieces += [Piece(full[end:start]), Piece(turn, weight_of(messages[i]), message=i)]
            end = start + len(turn)
        return pieces


def text_after_last(template: Template, messages: list[Message], tools: Tools) -> str:
    """What a prompt has behind the text of its last message: the end of its turn, and the header of the answer."""
    prompt = template.render(messages, tools, True)
    other = template.render([*messages[:-1], _changed(messages[-1])], tools, True)
    return prompt[len(prompt) - _common_suffix(prompt, other) :]


def _continued(opened: str, text: str, message: Message) -> str:
    """The turn's `text` after a generation prompt that ends with `opened`, which the text lacks.

    Thoughts that the prompt opens are written and closed. Where the prompt closes them too, the text has none.
    """
    if closing := CLOSING_TAG.search(opened):
        _, found, after = text.partition(closing[1])
        return after.lstrip("\n") if found else text
    tag = OPEN_TAG.search(opened)
    close = close_tag(tag[1]) if tag else None
    if close is None:
        return text
    thoughts, lines = thoughts_of(message), tag[2].endswith("\n")
    if text.lstrip().startswith(close):
        return (f"{thoughts}\n" if lines else thoughts) + text.lstrip() if thoughts else text
    if not lines:
        return thoughts + close + text
    return (f"{thoughts}\n" if thoughts else "\n") + close + "\n\n" + text.lstrip("\n")


def _kept(turn: str, following: str) -> int | None:
    """How many characters of `following` are the end of `turn`: its longest end that `following` begins with."""
    return next((len(turn) - k for k in range(len(turn)) if following.startswith(turn[k:])), None)


def _last_break(shared: str, prompt: str) -> int:
    """The last place in `shared` where a tag or line begins or ends, so that no tag of `prompt` is cut."""
    return max((m.start() for m in BREAK.finditer(prompt) if m.start() <= len(shared)), default=len(shared))


def _changed(message: Message) -> Message:
    kept = {k: v for k, v in message.items() if k in ("role", "name", "tool_call_id")}
    return kept | {"content": PROBE}


def _agreement(a: str, b: str) -> int:
    """How many characters both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_suffix(a: str, b: str) -> int:
    return _agreement(a[::-1], b[::-1])


def _blank(text: str) -> int:
    """Characters of white space at the end of the text: a template may trim them before an answer."""
    return len(text) - len(text.rstrip())
