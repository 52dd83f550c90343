"""The question for a judging model: a template over prompt and answers a and b, to be answered with the letter A or B."""

from pathlib import Path

from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.data.prompt_template import PromptTemplate
from lowalign.errors import UserError


class JudgePrompt:
    """The template of the question: Jinja, rendered with the texts `prompt`, `a` and `b`."""

    def __init__(self, file: Path) -> None:
        """Raises UserError, with file:line, when it cannot be rendered, and when it leaves an answer out."""
        self._template = PromptTemplate(file, "judge's template", ("prompt", "a", "b"))
        self.text = self._template.text
        probe = self.render("probe_prompt", "probe_first", "probe_second")
        for name, answer in (("a", "probe_first"), ("b", "probe_second")):
            if answer not in probe:
                raise UserError(
                    f"{file}: the judge never sees answer {name}; write {{{{ {name} }}}} at the place for it"
                )

    def render(self, prompt: str, a: str, b: str) -> str:
        """The question, with answer a in the first place. Raises UserError with file:line."""
        return self._template.render(prompt=prompt, a=a, b=b)


def letter_question(chat: Chat, question: str) -> Example:
    """An Example whose two completions are the answers A and B, without the tokens that both begin or end with.

    They are cut from the rendered conversation, so that a space or a marker that the chat template puts before an answer
    belongs to the prompt. Raises RowError and Unrenderable like `Chat.example`.
    """
    user = {"role": "user", "content": question}
    examples = [chat.example([user, {"role": "assistant", "content": letter}])[-1] for letter in "AB"]
    a, b = (example.completions[0] for example in examples)
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if shared is None:
        raise UserError("the tokenizer encodes A and B alike, so this model cannot judge; choose another --model")
    prompt, a, b = [*examples[0].prompt, *a[:shared]], a[shared:], b[shared:]
    while len(a) > 1 and len(b) > 1 and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return Example(prompt, [a, b])
