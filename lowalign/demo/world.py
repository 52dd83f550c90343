"""A tiny world of postcards: its grammar, the rows each method trains on, and an exact score.

All data are pure functions of a seed. The score is a rule about the text alone, so what a method gains can be measured
without a learned judge. Four kinds of data come from one grammar:

- `pretraining_text`: raw pages (albums, diaries, post boxes, lists) for the base, without any chat format;
- `sft_rows`: instructions with a postcard as the answer, in every mood;
- `prompts`: instructions alone, to sample from;
- `ranking_rows`: instructions with four answers, best first by `score`.

Held-out prompts use places and phrasings that no training prompt has. (The pages name every place.)
"""

import random
import re
from dataclasses import dataclass
from typing import Literal

from lowalign.demo.grammar import CHEERFULNESS, FRAME, PLACES, postcard, pretraining_text

__all__ = ["PLACES", "CardScore", "pretraining_text", "prompts", "ranking_rows", "score", "sft_rows"]

Split = Literal["train", "held_out"]
Messages = list[dict[str, str]]

HELD_OUT_PLACES = PLACES[3::4]
"""Places that no training prompt asks for."""

PHRASINGS = (
    "Write a postcard from {}.",
    "Write me a card from {}.",
    "Please write a postcard from {}.",
    "Send a postcard from {}.",
    "Please send me a card from {}.",
    "I want a postcard from {}.",
    "A postcard from {}, please.",
    "You are in {} now. Write a postcard.",
)
"""Ways to ask in training prompts; `{}` is the place."""

HELD_OUT_PHRASINGS = (
    "Please send a card from {}.",
    "Write to me from {}.",
    "I want a card from {}, please.",
    "You are in {}. Please send a postcard.",
)
"""Ways to ask that no training prompt uses."""

MIN_SENTENCES, MAX_SENTENCES = 3, 6
FLAWS = ("none", "none", "none", "repeated", "long")
"""Flaws of answers in a ranking, drawn evenly; all answers name the right place, as an SFT policy does."""
MIN_GAP = 0.1
"""The least difference between the scores of two answers in a ranking: people rank what they can tell apart."""


@dataclass(frozen=True)
class CardScore:
    """The score of a postcard; every part lies in [0, 1]."""

    cheerful: float
    place: float
    stopped: float

    @property
    def total(self) -> float:
        """The reward: half cheerfulness, a quarter the place, a quarter stopping."""
        return 0.5 * self.cheerful + 0.25 * self.place + 0.25 * self.stopped


def score(prompt: str | Messages, completion: str, stopped: bool) -> CardScore:
    """Score one answer; exact, from the text alone.

    - place: 1.0 if the requested place is the only one named, 0.5 if others are named too, 0.0 if it is missing.
    - stopped: 1.0 if the answer ended its turn by itself (`stopped`), else 0.0.
    - cheerful: each sentence counts `CHEERFULNESS[sentence]`; one the grammar cannot write, one that was written
      before, and every one after the sixth count 0. The part is the sum divided by the number of sentences, by 3 if
      there are fewer. The greeting, the closing and the opening sentence are left out the first time they appear.

    `prompt` is the instruction or its messages. Raises ValueError if it does not name exactly one place.
    """
    requested = _places_in(prompt if isinstance(prompt, str) else prompt[-1]["content"])
    if len(requested) != 1:
        raise ValueError(f"the prompt must name exactly one place of the world, found {sorted(requested) or 'none'}")
    named = _places_in(completion)
    place = 0.0 if not requested <= named else 1.0 if requested == named else 0.5

    seen: set[str] = set()
    values = []
    for sentence in _sentences(completion):
        if sentence not in FRAME or sentence in seen:
            values.append(0.0 if sentence in seen else CHEERFULNESS.get(sentence, 0.0))
        seen.add(sentence)
    cheerful = sum(values[:MAX_SENTENCES]) / max(len(values), MIN_SENTENCES)
    return CardScore(cheerful=cheerful, place=place, stopped=float(stopped))


def _places_in(text: str) -> set[str]:
    return set(re.findall(r"\w+", text)) & set(PLACES)


def _sentences(text: str) -> list[str]:
    """The lines of `text`, split after each full stop."""
    return [part.strip() for line in text.splitlines() for part in re.findall(r"[^.]+\.?|\.", line) if part.strip()]


def prompts(n: int, seed: int, split: Split = "train") -> list[Messages]:
    """`n` instructions, each as one user message; none repeats before all of the split have been used."""
    places = HELD_OUT_PLACES if split == "held_out" else sorted(set(PLACES) - set(HELD_OUT_PLACES))
    phrasings = HELD_OUT_PHRASINGS if split == "held_out" else PHRASINGS
    rng = random.Random(f"prompts {split} {seed}")
    pairs = [(place, phrasing) for place in places for phrasing in phrasings]
    instructions: list[Messages] = []
    while len(instructions) < n:
        rng.shuffle(pairs)
        instructions += [[{"role": "user", "content": phrasing.format(place)}] for place, phrasing in pairs]
    return instructions[:n]


def sft_rows(n: int, seed: int, split: Split = "train") -> list[dict[str, Messages]]:
    """`n` rows {"messages": [user, assistant]}; the answers name the requested place and are of every mood."""
    rng = random.Random(f"sft {split} {seed}")
    return [
        {"messages": [*messages, {"role": "assistant", "content": postcard(rng, requested_place(messages))}]}
        for messages in prompts(n, seed, split)
    ]


def ranking_rows(n: int, seed: int, split: Split = "train") -> list[dict[str, list]]:
    """`n` rows {"prompt": messages, "completions": [A, B, C, D]}, where score(A) > score(B) > score(C) > score(D).

    The totals of one row differ by at least `MIN_GAP`. Two in five answers have a flaw besides their mood: a repeated
    sentence, or too many sentences.
    """
    rng = random.Random(f"ranking {split} {seed}")
    return [{"prompt": messages, "completions": _ranked(rng, messages)} for messages in prompts(n, seed, split)]


def requested_place(messages: Messages) -> str:
    """The place that the last message names."""
    (place,) = _places_in(messages[-1]["content"])
    return place


def _ranked(rng: random.Random, messages: Messages) -> list[str]:
    place = requested_place(messages)
    totals: dict[str, float] = {}
    while len(totals) < 4:
        flaw = rng.choice(FLAWS)
        text = postcard(rng, place, 9 if flaw == "long" else None)
        if flaw == "repeated":
            greeting, body, closing = text.split("\n")
            text = "\n".join((greeting, body + " " + _sentences(body)[-1], closing))
        total = score(messages, text, stopped=True).total
        if all(abs(total - other) >= MIN_GAP for other in totals.values()):
            totals[text] = total
        elif rng.random() < 0.05:  # the texts so far may leave no gap for another: start over
            totals.clear()
    return sorted(totals, key=totals.__getitem__, reverse=True)
