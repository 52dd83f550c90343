"""Scores of a reward run: an adapter with a scalar head on the base."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from lowalign.data.chat import Chat
from lowalign.data.micro_batches import in_micro_batches
from lowalign.data.pack import Example
from lowalign.data.prompt_format import check_prompt_format
from lowalign.data.rows.turns import Prompt
from lowalign.errors import UserError
from lowalign.log import BAR_DELAY, progress
from lowalign.model.adapters.adapter import SCALAR_HEAD
from lowalign.model.adapters.files import adapter_template, locate, read, read_meta, trained_format
from lowalign.model.host import Host
from lowalign.model.policy import Stack, load_stack

NO_HEAD = " is not a reward model: it has no scalar head (`lowalign reward` trains one)"
TOKEN_BUDGET = 8192  # most tokens of one scoring forward, unless a single completion is longer
# What the metrics of a reward run were measured on, as its lowalign.json has it under reward.measured_on.
HELDOUT, TRAINING = "held-out rows", "training rows"

Ids = Sequence[int]


@dataclass(frozen=True)
class RunReward:
    """A reward run on the base. stack: its adapters, the last of which has the head. chat: that of the completions. A score s
    is returned as (s - mean) / std."""

    host: Host
    stack: Stack
    chat: Chat
    mean: float
    std: float
    token_budget: int

    def __call__(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Ids],
        _: object,
        completion_ids: Sequence[Sequence[Ids]],
        __: object = None,
    ) -> list[list[float]]:
        """The scores by prompt and completion; each prompt is computed once for the completions that fit beside it.

        A sampled completion may end with any end token of the base. The score is read at the one that the reward model
        knows, in its place: the end of turn, after plain text eos.
        """
        eos_ids, examples = self.host.base.eos_ids, []
        for prompt, ids, group in zip(prompts, prompt_ids, completion_ids, strict=True):
            end = self.chat.end_of_text if isinstance(prompt, str) else self.chat.end_of_turn
            examples.append(Example(list(ids), [ended_with(end, c, eos_ids) for c in group]))
        scores = score_examples(self.host, self.stack, examples, self.token_budget)
        return [[(score - self.mean) / self.std for score in group] for group in scores]


def ended_with(end: int, completion: Ids, eos_ids: Collection[int]) -> list[int]:
    """The completion with its last id replaced by `end` if that is one of `eos_ids`; a cut-off completion stays as it is."""
    return [*completion[:-1], end if completion[-1] in eos_ids else completion[-1]]


def load_reward_run(host: Host, name: str, run: str, allow_base_mismatch: bool = False) -> Stack:
    """Load a reward run onto the host as `name`, with the adapters it was trained on top of -> their names as they stack.

    Raises UserError when it has no head to score with.
    """
    stack = load_stack(host, name, run, allow_base_mismatch)
    if not host.has_scalar_head(name):
        for adapter in stack:
            host.delete(adapter)
        raise UserError(f"{run}{NO_HEAD}")
    return stack


def mean_and_std(run: str, allow_training_spread: bool = False) -> tuple[float, float]:
    """Mean and spread of a reward run's scores, from its lowalign.json. Raises UserError without them, and for those of its
    training rows unless they are allowed."""
    statistics = read_meta(locate(run)).get("reward", {})
    mean, std = statistics.get("mean"), statistics.get("std")
    instead = "train it with held-out rows (`lowalign reward … --data.eval-rows 200`), or use it alone"
    if mean is None or std is None or not std > 0:
        raise UserError(
            f"the lowalign.json of {run} has no mean and spread of its scores, which a sum of several rewards needs; "
            f"{instead}"
        )
    if statistics.get("measured_on") == TRAINING and not allow_training_spread:
        raise UserError(
            f"mean and spread of the scores of {run} were measured on the rows it was trained on, where scores lie further "
            f"apart than on others, and a sum of several rewards standardises with them; {instead}, or accept them with "
            "--allow-training-spread"
        )
    return mean, std


def check_template(run: str, chat: Chat) -> None:
    """Raises UserError for a reward run that was trained with another chat template than that of the completions."""
    if adapter_template((run,)) not in (None, chat.template):
        raise UserError(
            f"{run} was trained with another chat template than that of the completions; train both with the same one "
            "(--data.template)"
        )


def check_reward_runs(runs: Sequence[str], formats: Collection[str]) -> None:
    """Raises UserError for a reward run without a head, and for one that was trained on prompts of another format than
    those of the completions."""
    for run in runs:
        stored, _ = read(locate(run))
        if not any(key.endswith(SCALAR_HEAD) for key in stored.tensors):
            raise UserError(f"{run}{NO_HEAD}")
        check_prompt_format(f"the reward run {run}", trained_format(run), formats)


@torch.no_grad()
def score_examples(
    host: Host, stack: Stack, examples: Sequence[Example], token_budget: int = TOKEN_BUDGET
) -> list[list[float]]:
    """The score of each completion of each Example, by the head of the last adapter of the stack.

    A forward has at most token_budget tokens; where the completions of a prompt do not fit, the prompt is computed again
    for the rest. Raises UserError for a score that is not finite, and for a completion that does not fit in memory.
    """
    scores: dict[tuple[int, int], float] = {}

    def compute(pieces: list[_Piece]) -> None:
        for piece, values in zip(pieces, host.scores(pieces, stack[-1]), strict=True):
            scores.update(zip(piece.owners, values.tolist(), strict=True))
            bar.update(len(piece.owners))

    pieces = [piece for i, example in enumerate(examples) for piece in _pieces(i, example, token_budget)]
    options = {"unit": "completion", "desc": "scoring", "leave": False, "delay": BAR_DELAY}
    with host.use(*stack), progress(total=sum(len(e.completions) for e in examples), **options) as bar:
        in_micro_batches(pieces, token_budget, compute, _Piece.halves)
    if not all(map(math.isfinite, scores.values())):
        raise UserError("a reward is not finite; the reward model is broken, or float16 overflowed (bfloat16 does not)")
    return [[scores[i, j] for j in range(len(example.completions))] for i, example in enumerate(examples)]


@dataclass
class _Piece(Example):
    """Some completions of an Example. owners: for each, the index of its Example and its index there."""

    owners: list[tuple[int, int]] = field(default_factory=list)

    def halves(self) -> "list[_Piece]":
        """Two pieces, or this one when it has a single completion."""
        middle = len(self.owners) // 2
        parts = ((self.completions[s], self.owners[s]) for s in (slice(middle), slice(middle, None)))
        return [_Piece(self.prompt, c, source=self.source, owners=o) for c, o in parts if o]


def _pieces(i: int, example: Example, token_budget: int) -> list[_Piece]:
    """Example i in pieces of at most token_budget tokens, or of one completion."""
    pieces: list[_Piece] = []
    for j, completion in enumerate(example.completions):
        if not pieces or pieces[-1].length + len(completion) > token_budget:
            pieces.append(_Piece(example.prompt, [completion], source=example.source, owners=[(i, j)]))
        else:
            pieces[-1].completions.append(completion)
            pieces[-1].owners.append((i, j))
    return pieces
