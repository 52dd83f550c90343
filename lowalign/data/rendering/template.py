"""A chat template: its text, rendering, and how it ends an assistant turn."""

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lowalign.data.rows.time_limit import TookTooLong, time_limit
from lowalign.data.rows.turns import Message, Tools
from lowalign.errors import UserError

DATE = "26 Jul 2024"  # Llama 3's own default; its templates would otherwise write the day of the run
START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{%% for message in messages %%}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + %s + '\\n' }}"
    "{%% endfor %%}{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\\n' }}{%% endif %%}"
)

GENERATION = re.compile(r"\{%-?\+?\s*generation\s*[-+]?%\}")
USER = {"role": "user", "content": "probe_user"}
SYSTEM = {"role": "system", "content": "probe_system"}
ANSWER = {"role": "assistant", "content": "probe_answer"}


class Unrenderable(UserError):
    """The chat template cannot render this conversation."""


class Template:
    """The chat template in use.

    text: its Jinja text (of several templates, the one named "default"). with_tools: the template for rows with tools, if
    it is another one. end_token: the token that ends an assistant turn, as a string; None if there is none. shared_end:
    that token begins the next turn, because the template ends no turn by itself. special_tokens: the strings that only
    the template may write. forbidden: a string that begins a turn and is not a token, so the same characters in a row
    would look like a turn (default template only).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None = None, arguments: Sequence[str] = ()):
        """text: Jinja; None takes the tokenizer's own, or ChatML where it has none. arguments: NAME=VALUE, variables of
        the template; they become part of `text`, so that whoever renders it gets the same. Raises UserError when the
        template cannot render a question and an answer."""
        self.tokenizer = tokenizer
        self._variables = {**tokenizer.special_tokens_map, "date_string": DATE}
        self.forbidden: str | None = None
        self.with_tools: str | None = None
        own = tokenizer.chat_template
        if text is None and isinstance(own, dict):
            if "default" not in own:
                raise UserError(
                    f"the tokenizer has several chat templates ({', '.join(own)}); choose one (--data.template)"
                )
            own, self.with_tools = own["default"], own.get("tool_use")
        self.text: str = text or own or self._chatml()
        variables = "".join(map(_assignment, arguments))
        self.text, self.with_tools = variables + self.text, self.with_tools and variables + self.with_tools
        self.has_generation_tags = bool(GENERATION.search(self.text)) and not self.with_tools
        self._find_end_token()

    def _chatml(self) -> str:
        """The default template. A turn ends with <|im_end|> if that is a token, else with eos: the vocabulary stays."""
        tokenizer = self.tokenizer
        vocabulary = tokenizer.get_vocab()
        self.forbidden = None if START in vocabulary else START
        end = END if END in vocabulary else tokenizer.eos_token
        if end is None:
            raise UserError(
                "the tokenizer has no chat template and no end-of-sequence token to end a turn with: give a template "
                "(--data.template), or name the token as eos_token in tokenizer_config.json"
            )
        starts_with_bos = tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1]
        return ("{{ bos_token }}" if starts_with_bos else "") + CHATML % json.dumps(end)

    def _find_end_token(self) -> None:
        rendered = self.render([USER, ANSWER])
        if "probe_user" not in rendered or "probe_answer" not in rendered:
            raise UserError(
                "the chat template does not render the text of the user or of the assistant; use another (--data.template)"
            )
        tokens = self.tokenizer.added_tokens_decoder.values()
        special = {*self.tokenizer.all_special_tokens, *(token.content for token in tokens if token.special)}
        # An added token that is blank or a plain word cannot end a turn.
        added = special | {token.content for token in tokens if not (token.content.strip() or "a").isalnum()}
        self.end_token = _first(added, rendered.rpartition("probe_answer")[2])
        between = self._between_turns()
        self.shared_end = self.end_token is None and (marker := _first(added, between)) not in (
            None,
            self.tokenizer.bos_token,
        )
        if self.shared_end:
            self.end_token = marker
        # Some tokenizers do not flag the tokens around a turn as special. Added tokens that the template writes around a
        # user's turn count as special here. Those that belong to answers (<think>) do not, also where a default system
        # text names them: they come in pairs.
        around = self.render([USER])
        paired = {text for text in added if {f"<{text[2:]}", f"</{text[1:]}"} & added and text not in between}
        self.special_tokens = {
            text
            for text in added
            if text in special or text == self.end_token or (text in around and text not in paired)
        }

    def _between_turns(self) -> str:
        """What the template writes between an answer and the next question."""
        try:
            rendered = self.render([USER, ANSWER, USER | {"content": "probe_next"}])
        except Unrenderable:
            return ""
        return rendered.partition("probe_answer")[2].partition("probe_next")[0]

    def render(self, messages: list[Message], tools: Tools = None, generation: bool = False) -> str:
        """The conversation as text. generation: end it with the header of an assistant turn.

        Raises Unrenderable, with the template's own message, when the template fails, and TookTooLong.
        """
        return self._rendered(messages, tools, add_generation_prompt=generation)[0][0]

    def render_tagged(self, messages: list[Message], tools: Tools = None) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the begin and end of each {% generation %} block in it. Raises as `render`."""
        (rendered,), (spans,) = self._rendered(messages, tools, return_assistant_tokens_mask=True)
        return rendered, [(start, end) for start, end in spans if end > start]

    def _rendered(self, messages: list[Message], tools: Tools, **options: bool) -> tuple[list[str], list[Any]]:
        messages = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
        text = self.with_tools if tools is not None and self.with_tools else self.text
        variables: dict[str, Any] = {**self._variables, **options}
        try:
            # As apply_chat_template, but a content of null stays null: some templates write calls only then.
            with time_limit():
                return render_jinja_template([messages], tools, chat_template=text, **variables)
        except TookTooLong as error:
            raise TookTooLong(f"the chat template does not end: {error}; use another (--data.template)") from error
        except Exception as error:  # a template is a program: it can fail in any way
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise Unrenderable(f"the chat template cannot render it: {reason}") from error


def _first(tokens: set[str], text: str) -> str | None:
    """The token that comes first in the text, the longest of several; None if there is none."""
    positions = {token: text.index(token) for token in tokens if token in text}
    return min(positions, key=lambda token: (positions[token], -len(token)), default=None)


def _assignment(argument: str) -> str:
    """The Jinja statement for NAME=VALUE. VALUE is JSON, or text."""
    name, equals, value = argument.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"--data.template-args {argument}: write NAME=VALUE, for example enable_thinking=false")
    try:
        literal = json.loads(value)
    except ValueError:
        literal = value
    if isinstance(literal, dict | list):
        raise UserError(f"--data.template-args {argument}: the value must be text, a number, true, false or null")
    written = "none" if literal is None else json.dumps(literal, ensure_ascii=False)
    return f"{{%- set {name} = {written} %}}\n"  # templates are compiled with trim_blocks
