"""Which of two answers is better: verdicts of a model, or of rewards.

The question to a model is which of A and B is better. The log-odds log p(A) − log p(B) of the two letters are its verdict
for the answer in the first place, from one forward without sampling. A judge may favour a place (arXiv 2306.05685, section
3.3). So each question is put in both orders, and only a verdict that does not change with the order counts.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from lowalign.config.evaluation import CompareConfig, JudgeConfig
from lowalign.data.chat import Chat
from lowalign.data.micro_batches import in_micro_batches
from lowalign.data.pack import Example
from lowalign.data.rows.answers import Answers, as_text
from lowalign.data.rows.turns import as_messages, unsupervised
from lowalign.data.sources.row import RowError
from lowalign.errors import UserError
from lowalign.model.host import Host
from lowalign.model.policy import Stack
from lowalign.rewards.function import Samples
from lowalign.rewards.judge_prompt import JudgePrompt, letter_question
from lowalign.rewards.rewards import Rewards

EMPTY, SAME, TOO_LONG = "an answer is empty", "both answers are the same", "longer than --max-length"

# A line of verdicts.jsonl: source, a, b, verdict ("a", "b", "changed", "tie" or "skipped"), and numbers.
VerdictLine = dict[str, Any]


class Pair(NamedTuple):
    """Answers i and j of a row, i < j."""

    row: Answers
    i: int
    j: int

    @property
    def texts(self) -> tuple[str, str]:
        """The two answers as text."""
        return as_text(self.row.completions[self.i]), as_text(self.row.completions[self.j])

    def unfit(self) -> str:
        """The reason why the two answers cannot be compared; "" when they can."""
        a, b = self.texts
        if not (a.strip() and b.strip()):
            return EMPTY
        return SAME if a == b else ""

    def line(self, verdict: str, **more: Any) -> VerdictLine:
        """The pair's line of verdicts.jsonl."""
        return {"source": self.row.source, "a": self.i, "b": self.j, "verdict": verdict, **more}


@dataclass(frozen=True)
class ModelJudge:
    """Compares answers by asking the model in both orders. stack: the judge's adapters."""

    host: Host
    chat: Chat
    stack: Stack
    prompt: JudgePrompt
    config: JudgeConfig | CompareConfig

    def __call__(self, pairs: Sequence[Pair]) -> list[VerdictLine]:
        """The line of each pair."""
        questions = [pair.unfit() or self._questions(pair) for pair in pairs]
        askable = [question for both in questions if not isinstance(both, str) for question in both]
        with self.host.use(*self.stack):
            odds = iter(log_odds(self.host, askable, self.config.token_budget))
        lines = []
        for pair, both in zip(pairs, questions, strict=True):
            if isinstance(both, str):
                lines.append(pair.line("skipped", why=both))
            else:
                first, swapped = next(odds), next(odds)
                lines.append(pair.line(verdict(first, swapped, self.config.margin), first=first, swapped=swapped))
        return lines

    def _questions(self, pair: Pair) -> list[Example] | str:
        """The question in both orders, or the reason why it cannot be asked."""
        prompt, (a, b) = as_text(pair.row.prompt), pair.texts
        try:
            questions = [letter_question(self.chat, self.prompt.render(prompt, *order)) for order in ((a, b), (b, a))]
        except RowError as error:
            return str(error)
        if max(question.length for question in questions) > self.chat.fitting(self.config.max_length):
            return TOO_LONG
        return [replace(question, source=pair.row.source) for question in questions]


class Sampled(NamedTuple):
    """What reward functions may ask for of a row: its columns, and whether each answer ended by itself; None where that is not
    known."""

    columns: Mapping[str, Any]
    stopped: Sequence[bool] | None


@dataclass(frozen=True)
class RewardJudge:
    """Compares answers by their rewards; each answer is scored once. chat: None when no reward needs token ids. sampled: by id
    of the row."""

    rewards: Rewards
    chat: Chat | None
    config: JudgeConfig | CompareConfig
    sampled: Mapping[int, Sampled] | None = None

    def __call__(self, pairs: Sequence[Pair]) -> list[VerdictLine]:
        """The line of each pair."""
        rows = {id(pair.row): self._encode(pair.row) for pair in pairs}
        scores = self._scores([row for row in rows.values() if row.ids])
        lines = []
        for pair in pairs:
            skipped = rows[id(pair.row)].skipped
            if why := pair.unfit() or skipped.get(pair.i) or skipped.get(pair.j):
                lines.append(pair.line("skipped", why=why))
            else:
                a, b = (scores[id(pair.row), k] for k in (pair.i, pair.j))
                lines.append(pair.line(winner(a - b, self.config.margin), scores=[a, b]))
        return lines

    def _scores(self, rows: Sequence["_EncodedRow"]) -> dict[tuple[int, int], float]:
        """The reward of each answer with ids, by (id of the row, index of the answer)."""
        by_row = self.rewards(
            [row.answers.prompt if row.answers.plain_text else as_messages(row.answers.prompt) for row in rows],
            [row.prompt for row in rows],
            [[as_text(row.answers.completions[k]) for k in row.ids] for row in rows],
            [list(row.ids.values()) for row in rows],
            self._samples(rows),
        )
        return {
            (id(row.answers), k): score.total
            for row, scores in zip(rows, by_row, strict=True)
            for k, score in zip(row.ids, scores, strict=True)
        }

    def _samples(self, rows: Sequence["_EncodedRow"]) -> Samples | None:
        if self.sampled is None:
            return None
        sampled = [self.sampled[id(row.answers)] for row in rows]
        stopped = None
        if all(own.stopped is not None for own in sampled):
            stopped = [[own.stopped[k] for k in row.ids] for own, row in zip(sampled, rows, strict=True)]
        return Samples([own.columns for own in sampled], stopped, self.chat is not None)

    def _encode(self, row: Answers) -> "_EncodedRow":
        messages = [] if row.plain_text else unsupervised(as_messages(row.prompt))
        prompt, ids, skipped = [], {}, {}
        for k, completion in enumerate(row.completions):
            text = as_text(completion)
            if not text.strip():
                skipped[k] = EMPTY
            elif self.chat is None:
                ids[k] = []
            else:
                try:
                    if row.plain_text:
                        example = self.chat.completion(row.prompt, text)
                    else:
                        example = self.chat.example([*messages, {"role": "assistant", "content": text}])[-1]
                except RowError as error:
                    skipped[k] = str(error)
                    continue
                prompt = example.prompt
                if example.length > self.chat.fitting(self.config.max_length):
                    skipped[k] = TOO_LONG
                else:
                    ids[k] = example.completions[0]
        return _EncodedRow(row, prompt, ids, skipped)


class _EncodedRow(NamedTuple):
    """prompt: its ids. ids: of each answer through the end of its turn. skipped: why an answer cannot be scored. Both by
    index of the answer."""

    answers: Answers
    prompt: list[int]
    ids: dict[int, list[int]]
    skipped: dict[int, str]


@torch.no_grad()
def log_odds(host: Host, questions: Sequence[Example], token_budget: int) -> list[float]:
    """log p(A) − log p(B) of each question, in nats, under the active adapters."""
    odds = {}

    def compute(batch: list[Example]) -> None:
        for question, (a, b) in zip(batch, host.logprobs(batch), strict=True):
            odds[id(question)] = value = (a.sum() - b.sum()).item()
            if not math.isfinite(value):
                raise UserError(f"the judge's verdict on {question.source} is {value}; try --base.dtype float32")

    in_micro_batches(questions, token_budget, compute)
    return [odds[id(question)] for question in questions]


def verdict(first: float, swapped: float, margin: float = 0.0) -> str:
    """The verdict of both orders: "a", "b", "changed" (with the order) or "tie".

    first, swapped: log-odds of the answer in the first place, which is a in the first order and b in the second.
    margin: a lead (the mean over both orders, for a) smaller than this is a tie.
    """
    if first == 0 or swapped == 0:
        return "tie"
    if (first > 0) == (swapped > 0):
        return "changed"
    return winner((first - swapped) / 2, margin)


def winner(lead: float, margin: float) -> str:
    """ "a" for a positive lead, "b" for a negative one, "tie" for none or one below the margin."""
    if lead == 0 or abs(lead) < margin:
        return "tie"
    return "a" if lead > 0 else "b"


def report(lines: Sequence[VerdictLine]) -> dict[str, Any]:
    """The counts of verdicts. first_place: share of the questions won by the answer in the first place; 0.5 without a bias
    for a place, None when no question was asked."""
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


def report_lines(figures: dict[str, Any]) -> list[str]:
    """The report as text."""
    agreed, changed, ties = figures["agreed"], figures["changed"], figures["ties"]
    counts = (
        f"{agreed + changed + ties:,} of {figures['pairs']:,} pairs judged: {agreed:,} with a winner, {ties:,} ties"
    )
    skipped = [f"{count:,} pairs skipped: {why}" for why, count in figures["skipped"].items()]
    if figures["first_place"] is None:
        return [counts, *skipped]
    order = f"the first place won {figures['first_place']:.1%} of the questions (50% without a bias)"
    return [f"{counts}, {changed:,} with a verdict that changed with the order", order, *skipped]
