"""The samples of a report: prompts with completions and their rewards, from the files that ppo, best-of-n, judge and
compare write."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from lowalign.report.plot import Curve, chart
from lowalign.report.run_files import RunFiles, is_number
from lowalign.report.tables import Figure, figure

ROUNDS, PER_ROUND = 8, 4  # that are shown
LONGEST = 2000  # characters of a text

Line = dict[str, Any]


class Sample(NamedTuple):
    """A prompt, and its completions: (what it is, its reward or None, the text)."""

    prompt: str
    completions: list[tuple[str, Figure | None, str]]


class Samples(NamedTuple):
    """Samples under a heading. picture: a chart of the rewards."""

    title: str
    samples: list[Sample]
    picture: Markup | None = None


def samples_of(run: RunFiles) -> list[Samples]:
    """What the page shows of a run's samples; [] for a run without."""
    return [
        *_rounds(run.samples.get("samples.jsonl", ())),
        *_group("Best and worst of n", map(_best_and_worst, run.samples.get("candidates.jsonl", ()))),
        *_group("Pairs", map(_pair, run.samples.get("pairs.jsonl", ()))),
    ]


def _group(title: str, samples: Iterator[Sample | None]) -> Iterator[Samples]:
    if shown := [sample for sample in samples if sample]:
        yield Samples(title, shown)


def _rounds(lines: Sequence[Line]) -> Iterator[Samples]:
    """Some rounds of PPO from the first to the last, after a chart of the mean reward of the samples of all rounds."""
    rounds: dict[int, list[Line]] = {}
    for line in lines:
        if type(line.get("round")) is int and abs(line["round"]) < 2**53 and is_number(line.get("reward")):
            rounds.setdefault(line["round"], []).append(line)
    if not rounds:
        return
    means = [(n, sum(line["reward"] for line in own) / len(own)) for n, own in sorted(rounds.items())]
    picture = Markup(chart("mean reward of the samples", [Curve("mean reward, by round", means, "var(--c0)")]))
    order = sorted(rounds)
    chosen = sorted({order[i * (len(order) - 1) // max(1, ROUNDS - 1)] for i in range(ROUNDS)})
    for number in chosen:
        own = rounds[number]
        samples = [Sample(_text(line.get("prompt")), [_completion("", line, "reward")]) for line in own[:PER_ROUND]]
        of = f", {PER_ROUND} of {len(own)} samples" if len(own) > PER_ROUND else ""
        yield Samples(
            f"Round {number} (the last is {order[-1]}){of}", samples, picture if number == chosen[0] else None
        )


def _best_and_worst(line: Line) -> Sample | None:
    completions = line.get("completions")
    if not isinstance(completions, list):
        return None
    scored = [c for c in completions if isinstance(c, dict) and is_number(c.get("score"))]
    scored.sort(key=lambda c: -c["score"])
    ends = [("best", scored[0])] if scored else []
    if len(scored) > 1:
        ends.append(("worst", scored[-1]))
    return Sample(_text(line.get("prompt")), [_completion(label, c, "score") for label, c in ends])


def _pair(line: Line) -> Sample | None:
    if "chosen" not in line or "rejected" not in line:
        return None
    return Sample(_text(line.get("prompt")), [(name, None, _text(line[name])) for name in ("chosen", "rejected")])


def _completion(label: str, line: Line, reward: str) -> tuple[str, Figure | None, str]:
    return label, figure(line[reward]), _text(line.get("completion"))


def _text(value: Any) -> str:
    """A prompt or a completion: text, or the turns of a chat."""
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, dict)]
        only = len(turns) == 1 and turns[0].get("role") in ("user", "assistant")
        value = "\n".join(
            _text(turn.get("content")) if only else f"{turn.get('role')}: {_text(turn.get('content'))}"
            for turn in turns
        )
    elif not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    return value if len(value) <= LONGEST else f"{value[:LONGEST]}… ({len(value):,} characters)"
