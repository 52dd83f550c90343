"""A chat template: rendering, the roles it supports, and how it ends an assistant turn."""

import json
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from lowalign.data.rows.turns import Message, Tools
from lowalign.errors import UserError

DATE = "26 Jul 2024"  # Llama 3's own default; its templates would otherwise write the day of the run
START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{%% for message in messages %%}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + %s + '\\n' }}"
    "{%% endfor %%}{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\\n' }}{%% endif %%}"
)

# Messages to try a template with. The call's id has nine letters and digits: Mistral's templates refuse any other.
USER = {"role": "user", "content": "probe_user"}
SYSTEM = {"role": "system", "content": "probe_system"}
ANSWER = {"role": "assistant", "content": "probe_answer"}
FUNCTION = {"name": "probe_name", "description": "probe_description"}
PARAMETERS = {"type": "object", "properties": {"place": {"type": "string", "description": "A place."}}}
TOOL = {"type": "function", "function": FUNCTION | {"parameters": PARAMETERS}}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "probe_name", "arguments": {"place": "probe_place"}},
}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "probe_result", "name": "probe_name", "tool_call_id": "call00001"}


class Unrenderable(UserError):
    """The chat template cannot render this conversation."""


class Template:
    """The chat template in use.

    text: its Jinja text (of several templates, the one named "default"). with_tools: the template for rows with tools, if
    it is another one. end_token: the token that ends an assistant turn, as a string; None if there is none.
    special_tokens: the strings that only the template may write. forbidden: a string that begins a turn and is not a
    token, so the same characters in a row would look like a turn (default template only).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None = None):
        """text: Jinja; None takes the tokenizer's own, or ChatML where it has none. Raises UserError when the template
        cannot render a question and an answer."""
        self.tokenizer = tokenizer
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
        self._find_end_token()

    def _chatml(self) -> str:
        """The default template. A turn ends with <|im_end|> if that is a token, else with eos: the vocabulary stays."""
        tokenizer = self.tokenizer
        vocabulary = tokenizer.get_vocab()
        self.forbidden = None if START in vocabulary else START
        end = END if END in vocabulary else tokenizer.eos_token
        if end is None:
            raise UserError("the tokenizer has no chat template and no end-of-sequence token to end a turn with")
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
        after = rendered.rpartition("probe_answer")[2]
        positions = {text: after.index(text) for text in added if text in after}
        self.end_token = min(positions, key=lambda text: (positions[text], -len(text)), default=None)
        # Some tokenizers do not flag the tokens around a turn as special. Added tokens that the template writes around a
        # user's turn count as special here; those that belong to answers (<think>) do not.
        around = self.render([USER])
        self.special_tokens = {text for text in added if text in special or text in around or text == self.end_token}

    def render(self, messages: list[Message], tools: Tools = None, generation: bool = False) -> str:
        """The conversation as text. generation: end it with the header of an assistant turn.

        Raises Unrenderable, with the template's own message, when the template fails.
        """
        messages = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
        text = self.with_tools if tools and self.with_tools else self.text
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=text,
                add_generation_prompt=generation,
                tokenize=False,
                date_string=DATE,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise Unrenderable(f"the chat template cannot render it: {reason}") from error

    @cached_property
    def has_system(self) -> bool:
        """Whether the template renders a system message."""
        return self._renders([SYSTEM, USER], None, "probe_system")

    @cached_property
    def has_tools(self) -> bool:
        """Whether the template renders tools, calls and results."""
        turns = [USER, CALLING, RESULT, ANSWER]
        return self._renders(turns, [TOOL], "probe_description", "probe_place", "probe_result")

    def _renders(self, messages: list[Message], tools: Tools, *words: str) -> bool:
        try:
            rendered = self.render(messages, tools)
        except Unrenderable:
            return False
        return all(word in rendered for word in words)
