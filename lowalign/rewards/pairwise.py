"""The verdict of a judging model without sampling: one forward for each order of the two answers.

Asked which of A and B is better, the model gives each letter a probability; the log-odds log p(A) − log p(B) are its
verdict for the first place. A judge that favours a place (arXiv 2306.05685, section 3.3) changes it with the order, so
only what both orders say counts.
"""

import math
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import StrictUndefined, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lowalign.data.chat import Chat
from lowalign.data.micro_batches import in_micro_batches
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.model.host import Host


class JudgePrompt:
    """The template that asks for a verdict: Jinja, rendered with the texts `prompt`, `a` and `b`."""

    def __init__(self, file: Path) -> None:
        """Raises UserError, with file:line, for what cannot be rendered, and when it leaves an answer out."""
        self.file = file
        try:
            self.text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the judge's template {file} cannot be read ({error})") from error
        try:
            self._template = ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(self.text)
        except TemplateSyntaxError as error:
            raise UserError(f"{file}:{error.lineno}: {error.message}") from error
        shown = self.render("probe_prompt", "probe_first", "probe_second")
        for name, probe in (("a", "probe_first"), ("b", "probe_second")):
            if probe not in shown:
                raise UserError(
                    f"{file}: the judge never sees answer {name}; write {{{{ {name} }}}} where it is to stand"
                )

    def render(self, prompt: str, a: str, b: str) -> str:
        """The question, with answer a in the first place."""
        try:
            return self._template.render(prompt=prompt, a=a, b=b)
        except Exception as error:  # a template is somebody's program: it can fail in any way
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<template>"]
            where = f"{self.file}:{lines[-1]}" if lines else self.file
            raise UserError(
                f"{where}: {error or type(error).__name__} (a judge's template is given prompt, a and b)"
            ) from error


def choice(chat: Chat, question: str) -> Example:
    """An Example whose two completions are the answers A and B, less what both begin or end with.

    They are taken from what the chat template makes of them, so that a space or a marker it puts before an answer stands
    where the model expects it. Raises RowError and Unrenderable like `Chat.example`.
    """
    asked = {"role": "user", "content": question}
    said = [chat.example([asked, {"role": "assistant", "content": letter}])[-1] for letter in "AB"]
    a, b = (example.completions[0] for example in said)
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if shared is None:
        raise UserError("the tokenizer writes A and B alike, so the answers cannot be told apart")
    prompt, a, b = [*said[0].prompt, *a[:shared]], a[shared:], b[shared:]
    while len(a) > 1 and len(b) > 1 and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return Example(prompt, [a, b])


@torch.no_grad()
def log_odds(host: Host, questions: Sequence[Example], token_budget: int) -> list[float]:
    """log p(A) − log p(B) of each question, in nats, under the active adapters."""
    found = {}

    def compute(batch: list[Example]) -> None:
        for question, (a, b) in zip(batch, host.logprobs(batch), strict=True):
            found[id(question)] = value = (a.sum() - b.sum()).item()
            if not math.isfinite(value):
                raise UserError(f"the judge's verdict on {question.source} is {value}; try --base.dtype float32")

    in_micro_batches(questions, token_budget, compute)
    return [found[id(question)] for question in questions]


def verdict(first: float, swapped: float, margin: float = 0.0) -> str:
    """What two verdicts come to: "a" or "b", "changed" (with the order), or "tie".

    first, swapped: log-odds of the answer in the first place, which is a, then b. margin: a lead (the mean of both, for a)
    that is smaller is a tie.
    """
    if first == 0 or swapped == 0:
        return "tie"
    if (first > 0) == (swapped > 0):
        return "changed"
    return winner((first - swapped) / 2, margin)


def winner(lead: float, margin: float) -> str:
    """ "a" where it leads, "b" where it trails, "tie" where neither does by the margin."""
    if lead == 0 or abs(lead) < margin:
        return "tie"
    return "a" if lead > 0 else "b"


def summary(lines: Sequence[dict]) -> dict[str, Any]:
    """The counts of verdicts. first_place: share of the questions in which the answer in the first place won; a half
    where the place says nothing, null where nothing was asked in two orders."""
    counts = Counter(line["verdict"] for line in lines)
    odds = [line[order] for line in lines for order in ("first", "swapped") if order in line]
    return {
        "pairs": len(lines),
        "agreed": counts["a"] + counts["b"],
        "changed": counts["changed"],
        "ties": counts["tie"],
        "skipped": dict(Counter(line["why"] for line in lines if "why" in line)),
        "first_place": sum(x > 0 for x in odds) / len(odds) if odds else None,
    }


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The summary in lines of text."""
    judged = report["agreed"] + report["changed"] + report["ties"]
    said = [
        f"{judged:,} of {report['pairs']:,} pairs judged: {report['agreed']:,} with a winner, {report['ties']:,} ties"
    ]
    if report["first_place"] is not None:
        said[0] += f", {report['changed']:,} of which the verdict changed with the order"
        said.append(f"the first place won {report['first_place']:.1%} of the questions (50% without a bias)")
    return said + [f"{count:,} pairs skipped: {why}" for why, count in report["skipped"].items()]
