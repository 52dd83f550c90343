"""A Modelfile for Ollama: the chat template in Go's language, and the tokens that end an answer.

Ollama does not read Jinja. Most chat templates put a fixed text before and after each message, by its role; these texts are
read off renderings of a marked conversation. A template that does more has no Modelfile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
SYSTEM, USER, ANSWER, USER_2 = (
    {"role": "system", "content": "@system@"},
    {"role": "user", "content": "@user@"},
    {"role": "assistant", "content": "@answer@"},
    {"role": "user", "content": "@user 2@"},
)
Message = dict[str, str]


@dataclass(frozen=True)
class Affixes:
    """The texts of a template. before, after: of a message, by role. default: instead of a system message. generation: the
    header of the answer."""

    before: dict[str, str]
    after: dict[str, str]
    default: str
    generation: str

    def render(self, messages: Sequence[Message]) -> str:
        """As the Go template renders them, for an answer."""
        default = "" if messages[0]["role"] == "system" else self.default
        turns = (self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages)
        return default + "".join(turns) + self.generation

    def go(self) -> str:
        """The template in Go's language."""
        branches = [f'if eq .Role "{r}" }}}}{self.before[r]}{{{{ .Content }}}}{self.after[r]}' for r in ROLES]
        default = f"{{{{ if not .System }}}}{self.default}{{{{ end }}}}" if self.default else ""
        turns = "{{ range .Messages }}{{ " + "{{ else ".join(branches) + "{{ end }}{{ end }}"
        return default + turns + self.generation


def modelfile(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> str | None:
    """The Modelfile of a model folder with this tokenizer; None when its template is no sequence of marked messages."""
    affixes = read_affixes(tokenizer)
    if affixes is None:
        return None
    texts = "".join([*affixes.before.values(), *affixes.after.values(), affixes.default, affixes.generation])
    if '"""' in texts or "{{" in texts:  # they would end the template, or be a command in it
        return None
    stops = [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(i)}"' for i in eos_ids]
    return "\n".join(["FROM .", f'TEMPLATE """{affixes.go()}"""', *stops, ""])


def read_affixes(tokenizer: PreTrainedTokenizerBase) -> Affixes | None:
    """None when conversations with them are not what the template renders."""
    # Ollama adds bos itself where the tokenizer does.
    bos = tokenizer.bos_token if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else ""

    def render(*messages: Message, generation: bool = True) -> str:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
        return text.removeprefix(bos or "")

    try:
        after_user = _cut(render(USER, generation=False), USER)[-1]
        after_answer = _cut(render(USER, ANSWER, generation=False), ANSWER)[-1]
        before_system, between, to_answer, to_user, end = _cut(
            render(SYSTEM, USER, ANSWER, USER_2), SYSTEM, USER, ANSWER, USER_2
        )
        before_user = _without(to_user, start=after_answer)
        affixes = Affixes(
            {"system": before_system, "user": before_user, "assistant": _without(to_answer, start=after_user)},
            {"system": _without(between, end=before_user), "user": after_user, "assistant": after_answer},
            default=_without(_cut(render(USER), USER)[0], end=before_user),
            generation=_without(end, start=after_user),
        )
        conversations = ([USER], [SYSTEM, USER], [USER, ANSWER, USER_2], [SYSTEM, *[USER, ANSWER] * 2, USER_2])
        return affixes if all(affixes.render(c) == render(*c) for c in conversations) else None
    except (ValueError, TemplateError):
        return None


def _cut(text: str, *marks: Message) -> list[str]:
    """The texts before, between and after the contents of these messages. Raises ValueError when one is not there."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark["content"])
        if not found:
            raise ValueError(f"the template does not write {mark['content']}")
        parts.append(part)
    return [*parts, text]


def _without(text: str, start: str = "", end: str = "") -> str:
    """The text without what it begins and ends with. Raises ValueError when it does not."""
    if not (text.startswith(start) and text.endswith(end) and len(text) >= len(start) + len(end)):
        raise ValueError(f"{text!r} is not between {start!r} and {end!r}")
    return text[len(start) : len(text) - len(end)]
