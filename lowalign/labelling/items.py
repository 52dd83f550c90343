"""What people judge: a prompt and different answers to it, in an order of its own for each annotator."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lowalign.data.rows.answers import Answers, as_text
from lowalign.data.rows.turns import Prompt, as_messages

MOST = 9  # answers of an item: one key of the keyboard each
BLANK, REPEATED = "blank answers", "repeated answers"
FEW, MANY = "prompts with fewer than two different answers", f"prompts with more than {MOST} different answers"


@dataclass(frozen=True)
class Item:
    """A prompt and its answers: all texts, or all messages. policies: what gave each answer; empty where nothing says it.

    key: hash of prompt and answers, so a judgement belongs to its item however files and rows are arranged.
    """

    key: str
    prompt: Prompt
    answers: list[Prompt]
    policies: list[str]
    source: str

    def order(self, annotator: str) -> list[int]:
        """The numbers of the answers in the order in which they are shown to this annotator: the same at every start."""
        shown = list(range(len(self.answers)))
        random.Random(f"{self.key} {annotator}").shuffle(shown)
        return shown


def make_items(rows: Sequence[Answers], policies: Sequence[Sequence[str]] = ()) -> tuple[list[Item], Counter[str]]:
    """-> the items, each once, and what was left out. policies: of the answers of each row, where they are known."""
    items: dict[str, Item] = {}
    left_out: Counter[str] = Counter()
    for i, row in enumerate(rows):
        kept: dict[str, int] = {}
        for k, text in enumerate(map(as_text, row.completions)):
            if not text.strip() or text in kept:
                left_out[REPEATED if text.strip() else BLANK] += 1
            else:
                kept[text] = k
        if not 2 <= len(kept) <= MOST:
            left_out[FEW if len(kept) < 2 else MANY] += 1
            continue
        answers = [row.completions[k] for k in kept.values()]
        prompt = row.prompt
        if not row.plain_text:
            prompt, answers = as_messages(prompt), [as_messages(answer, "assistant") for answer in answers]
        key = hashlib.sha256(json.dumps([prompt, answers]).encode()).hexdigest()[:16]
        items.setdefault(
            key, Item(key, prompt, answers, [policies[i][k] for k in kept.values()] if policies else [], row.source)
        )
    return list(items.values()), left_out
