"""What completions are worth: reward runs on the base, functions of the user's, or a weighted sum of both.

A spec is "[WEIGHT*]RUN" (a reward run, an adapter folder or a Hub id) or "[WEIGHT*]FILE.py:NAME", a function that takes
prompts and completions, two lists of one length, and returns a number for each. A prompt is text or messages; a
completion is text.

Where there are several, the scores of a reward run are standardised with the mean and spread on held-out data that its
lowalign.json holds, so that weights compare; what a function returns is taken as it is.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowalign.data.chat import Chat
from lowalign.data.micro_batches import in_micro_batches
from lowalign.data.pack import Example
from lowalign.data.prompts import Prompt
from lowalign.errors import UserError
from lowalign.model.adapters.files import locate
from lowalign.model.host import Host
from lowalign.model.policy import load_stack
from lowalign.rewards.function import FunctionReward, load_function

TOKEN_BUDGET = 8192  # most tokens of one scoring forward, unless a single completion is longer

Ids = Sequence[int]


@dataclass(frozen=True)
class CompletionScore:
    """What a completion is worth. parts: by spec without its weight, before weighting."""

    total: float
    parts: dict[str, float]


@dataclass(frozen=True)
class RunReward:
    """A reward run on the base. stack: its adapters, of which the last has the head. mean, std: of its scores; 0 and 1
    leave them as they are."""

    host: Host
    stack: tuple[str, ...]
    mean: float
    std: float
    token_budget: int

    def __call__(
        self, _: object, prompt_ids: Sequence[Ids], __: object, completion_ids: Sequence[Sequence[Ids]]
    ) -> list[list[float]]:
        """The scores; each prompt is computed once for the completions that fit beside it."""
        examples = [Example(list(p), [list(c) for c in cs]) for p, cs in zip(prompt_ids, completion_ids, strict=True)]
        raw = score_examples(self.host, self.stack, examples, self.token_budget)
        return [[(value - self.mean) / self.std for value in values] for values in raw]


class Rewards:
    """Several rewards with their weights, by their specs without them."""

    def __init__(self, parts: dict[str, tuple[float, FunctionReward | RunReward]]) -> None:
        self.parts = parts

    def __call__(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Ids],
        completions: Sequence[Sequence[str]],
        completion_ids: Sequence[Sequence[Ids]],
    ) -> list[list[CompletionScore]]:
        """For each prompt, the CompletionScore of each of its completions, given as texts and as the ids that were sampled.

        Raises UserError when a function fails, or a reward run's score is not finite.
        """
        given = (prompts, prompt_ids, completions, completion_ids)
        found = {name: reward(*given) for name, (_, reward) in self.parts.items()}
        scores = []
        for i, group in enumerate(completions):
            scores.append([])
            for j in range(len(group)):
                parts = {name: values[i][j] for name, values in found.items()}
                scores[-1].append(
                    CompletionScore(sum(self.parts[name][0] * value for name, value in parts.items()), parts)
                )
        return scores


def load_rewards(
    specs: Sequence[str],
    host: Host,
    chat: Chat,
    allow_base_mismatch: bool = False,
    token_budget: int = TOKEN_BUDGET,
) -> Rewards:
    """The rewards that the specs name, their runs loaded onto the host as reward0, reward1, …

    chat: that of the completions to be scored. Raises UserError for what cannot be loaded, for a run without a head,
    without the mean and spread that a sum needs, or with another chat template.
    """
    split = [split_spec(spec) for spec in specs]
    sources = [source for _, source in split]
    if len(set(sources)) < len(sources):
        raise UserError(f"--reward names {next(s for s in sources if sources.count(s) > 1)} more than once")
    parts = {}
    for i, (weight, source) in enumerate(split):
        if (function := as_function(source)) is not None:
            parts[source] = weight, load_function(*function)
        else:
            stack = load_reward_run(host, f"reward{i}", source, allow_base_mismatch)
            _check_template(source, chat)
            mean, std = _mean_and_std(source) if len(specs) > 1 else (0.0, 1.0)
            parts[source] = weight, RunReward(host, stack, mean, std, token_budget)
    return Rewards(parts)


def named(specs: Sequence[str]) -> tuple[list[str], list[str]]:
    """The Python files, and the runs, that the specs name."""
    functions = {source: as_function(source) for _, source in map(split_spec, specs)}
    return [str(f[0]) for f in functions.values() if f], [source for source, f in functions.items() if not f]


def split_spec(spec: str) -> tuple[float, str]:
    """ "0.5*runs/reward" -> (0.5, "runs/reward"); the weight is 1 when left out."""
    weight, star, source = spec.rpartition("*")
    try:
        number = float(weight) if star else 1.0
    except ValueError:
        number = math.nan
    if not source or not math.isfinite(number):
        raise UserError(f"--reward {spec}: expected [WEIGHT*]RUN or [WEIGHT*]FILE.py:NAME, as in 0.5*runs/reward")
    return number, source


def as_function(source: str) -> tuple[Path, str] | None:
    """The file and name of a function; None when `source` names a run. Raises UserError when there is no such file."""
    match = re.fullmatch(r"(?P<file>.+\.py):(?P<name>\w+)", source)
    if match:
        file = Path(match["file"]).expanduser()
        if not file.is_file():
            raise UserError(f"--reward {source}: there is no file {file}")
        return file, match["name"]
    if re.search(r"\.py(:|$)", source):
        raise UserError(f"--reward {source}: name the function after the file: {source.partition(':')[0]}:NAME")
    return None


def load_reward_run(host: Host, name: str, source: str, allow_base_mismatch: bool = False) -> tuple[str, ...]:
    """Load a reward run with what it was trained on top of. Raises UserError when it has no head to score with."""
    stack = load_stack(host, name, source, allow_base_mismatch)
    if not host.has_head(name):
        for loaded in stack:
            host.delete(loaded)
        raise UserError(f"{source} is no reward model: it has no scalar head (`lowalign reward` trains one)")
    return stack


@torch.no_grad()
def score_examples(
    host: Host, stack: tuple[str, ...], examples: Sequence[Example], token_budget: int = TOKEN_BUDGET
) -> list[list[float]]:
    """The score of each completion of each Example, by the head of the last adapter of the stack.

    At most token_budget tokens go through the model at a time; where the completions of a prompt do not fit, the prompt
    is computed again for the rest. Raises UserError for a score that is not finite, and for a completion that does not
    fit in memory.
    """
    scores: dict[tuple[int, int], float] = {}

    def compute(pieces: list[_Piece]) -> None:
        for piece, values in zip(pieces, host.scores(pieces, stack[-1]), strict=True):
            scores.update(zip(piece.owners, values.tolist(), strict=True))

    pieces = [piece for i, example in enumerate(examples) for piece in _pieces(i, example, token_budget)]
    with host.use(*stack):
        in_micro_batches(pieces, token_budget, compute, _Piece.halves)
    if not all(map(math.isfinite, scores.values())):
        raise UserError("a reward is not finite; the reward model is broken, or float16 overflowed (bfloat16 does not)")
    return [[scores[i, j] for j in range(len(example.completions))] for i, example in enumerate(examples)]


@dataclass
class _Piece(Example):
    """Some completions of an Example. owners: of each, the number of its Example and its place there."""

    owners: list[tuple[int, int]] = field(default_factory=list)

    def halves(self) -> "list[_Piece]":
        """Two pieces, or this one where it has a single completion."""
        at = len(self.owners) // 2
        parts = ((self.completions[s], self.owners[s]) for s in (slice(at), slice(at, None)))
        return [_Piece(self.prompt, c, source=self.source, owners=o) for c, o in parts if o]


def _pieces(i: int, example: Example, token_budget: int) -> list[_Piece]:
    """Example i in pieces that fit, of one completion at least."""
    pieces: list[_Piece] = []
    for j, completion in enumerate(example.completions):
        if not pieces or pieces[-1].length + len(completion) > token_budget:
            pieces.append(_Piece(example.prompt, [completion], source=example.source, owners=[(i, j)]))
        else:
            pieces[-1].completions.append(completion)
            pieces[-1].owners.append((i, j))
    return pieces


def _meta(source: str) -> dict:
    file = locate(source) / "lowalign.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _mean_and_std(source: str) -> tuple[float, float]:
    known = _meta(source).get("reward", {})
    mean, std = known.get("mean"), known.get("std")
    if mean is None or std is None or not std > 0:
        raise UserError(
            f"{source} does not tell the mean and spread of its scores, without which it cannot be one of several "
            "rewards; train it with held-out rows (`lowalign reward … --data.eval-rows 100`), or use it alone"
        )
    return mean, std


def _check_template(source: str, chat: Chat) -> None:
    file = locate(source) / "chat_template.jinja"
    if file.exists() and file.read_text(encoding="utf-8") != chat.template:
        raise UserError(
            f"{source} was trained with another chat template than what it is to score; train both with the same one "
            "(--data.template)"
        )
