"""Files of preferences to Examples: one prompt, the answers to it, and their ranks or label.

The prompt of all answers is the same ids. Turns that all answers of a row begin with belong to it, so it ends where a turn
ends, whoever wrote the row; its assistant turns are not supervised.
"""

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lowalign.config.sections import PreferenceConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import Dataset, RowEncoder, load_examples
from lowalign.data.pack import Example
from lowalign.data.report import Tally
from lowalign.data.rows.preference_rows import PREFERENCE_ROWS, Preference, PromptAndCompletions, ScoreRow, VerdictRow
from lowalign.data.rows.turns import Message, RowDropped, RowError
from lowalign.data.rows.votes import decide, ranks_of
from lowalign.data.template import Unrenderable
from lowalign.data.truncate import fit
from lowalign.errors import UserError

REPEATED_NOTE = "answers that stand twice at one rank kept once"
SWAPPED = {"a": "b", "b": "a", "tie": "tie"}


def load_preferences(
    files: Sequence[str],
    chat: Chat,
    config: PreferenceConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    heldout: bool = False,
    rejected: Path | None = None,
) -> Dataset:
    """The Examples of all files of preferences. Otherwise as load_examples.

    Comparisons: K >= 2 completions with `rank` (0 for the best, ties the same), `margin` and `weight`. Rows with a label:
    one completion, `label` True or False, `rank` None. The prompt and each single completion are together at most
    config.max_length tokens. Rows of one prompt (scores) or of one pair (verdicts) in a file become one Example, whose
    `source` is the first of them.
    """
    return load_examples(
        files, chat, config, tokenizer=tokenizer, heldout=heldout, rejected=rejected, encoder=PREFERENCE_ENCODER
    )


def _together(said: PromptAndCompletions) -> Hashable:
    match said:
        case ScoreRow():
            return _key([said.prompt, said.tools])
        case VerdictRow():
            return _key([said.prompt, said.tools, sorted(map(_key, said.completions))])
        case _:
            return None


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _encode(rows: list[PromptAndCompletions], chat: Chat, config: PreferenceConfig, tally: Tally) -> list[Example]:
    """The Example of rows that belong together."""
    match rows[0]:
        case ScoreRow():
            said = _ranked(rows, config.gap)
        case VerdictRow():
            said = _judged(rows, config, tally)
        case _:
            said = rows[0]
    given = len(said.completions)
    kept = _distinct(map(_key, said.completions), said.rank)
    if len(kept) < given:
        said = replace(said, completions=[said.completions[i] for i in kept], rank=[said.rank[i] for i in kept])
    notes = chat.notes.copy()
    example = _example(said, chat)
    chat.notes = notes + Counter(dict.fromkeys(chat.notes - notes, len(rows)))  # once a row, not once an answer
    example = _without_repeats(example)
    if config.ties == "drop" and example.rank and len(set(example.rank)) == 1:
        raise RowDropped("none of its answers is better than another")
    tally.measure(example)
    fitted, cut = fit(example, config.max_length, chat.front)
    if fitted is None:
        return []
    if cut:
        fitted = _without_repeats(fitted, f" once they are cut to {config.max_length:,} tokens")
        tally.cut[cut] += len(rows)
    if len(fitted.completions) < given:
        tally.notes[REPEATED_NOTE] += len(rows)
    return [fitted]


def _ranked(rows: list[ScoreRow], gap: float) -> Preference:
    """Answers to one prompt, ranked by their scores."""
    if len(rows) == 1:
        raise RowDropped("the only answer to its prompt")
    ranks = ranks_of([row.score for row in rows], gap)
    return Preference(rows[0].prompt, [row.completions[0] for row in rows], rows[0].tools, rank=ranks)


def _judged(rows: list[VerdictRow], config: PreferenceConfig, tally: Tally) -> Preference:
    """Two answers, the better of which several annotators decide."""
    first, verdicts = rows[0], {}
    for row in rows:
        if row.annotator in verdicts:
            raise RowError(f"the annotator {row.annotator} judges the same two answers more than once")
        same = row.completions == first.completions
        verdicts[row.annotator] = row.verdict if same else SWAPPED[row.verdict]
    tally.verdicts.append(verdicts)
    winner, weight = decide(list(verdicts.values()), config.verdicts)
    rank = {"a": [0, 1], "b": [1, 0], "tie": [0, 0]}[winner]
    return Preference(first.prompt, first.completions, first.tools, rank=rank, weight=weight)


def _distinct(answers: Iterable[Hashable], rank: Sequence[float] | None, when: str = "") -> list[int]:
    """The places of the answers, without those that stand at the same rank a second time. when: added to the reason.

    Raises RowDropped when all are the same, or one is better than itself.
    """
    answers = list(answers)
    found: dict[Hashable, int] = {}
    first = [found.setdefault(answer, i) for i, answer in enumerate(answers)]
    if rank is not None and len(found) == 1:
        raise RowDropped(f"its answers are the same{when}")
    if rank is not None and any(rank[i] != rank[k] for i, k in enumerate(first)):
        raise RowDropped(f"one answer stands at two ranks{when}")
    return list(found.values())


def _without_repeats(example: Example, when: str = "") -> Example:
    kept = _distinct(map(tuple, example.completions), example.rank, when)
    if len(kept) == len(example.completions):
        return example
    take = lambda values: [values[i] for i in kept]  # noqa: E731
    completions, masks, rank = map(take, (example.completions, example.masks, example.rank))
    return replace(example, completions=completions, masks=masks, rank=rank)


def _example(said: Preference, chat: Chat) -> Example:
    """The prompt and all answers as they are rendered, whatever their length."""
    if isinstance(said.prompt, str):
        sides = [chat.completion(said.prompt, text) for text in said.completions]
    else:
        prompt, answers = _split(said.prompt, said.completions)
        sides = [_side([*prompt, *answer], said, chat) for answer in answers]
    if any(side.prompt != sides[0].prompt for side in sides):
        raise Unrenderable("the chat template writes the prompt in another way before each of its answers")
    return Example(
        sides[0].prompt,
        [side.completions[0] for side in sides],
        [side.masks[0] for side in sides],
        rank=None if said.rank is None else list(said.rank),
        margin=said.margin,
        label=said.label,
        weight=said.weight,
    )


def _split(prompt: list[Message], answers: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """-> the prompt with all turns that every answer begins with, and the answers without them."""
    shared = 0
    while len(answers) > 1 and all(a[shared : shared + 1] == answers[0][shared : shared + 1] != [] for a in answers):
        shared += 1
    prompt, rest = prompt + answers[0][:shared], [answer[shared:] for answer in answers]
    if not all(rest):
        raise RowError("one of its answers is the beginning of another")
    for answer in rest:
        if answer[0]["role"] != "assistant":
            raise RowError(f"its answers part at a turn of the {answer[0]['role']}; they must answer the same prompt")
        if answer[0].get("weight") == 0:
            raise RowError('the first turn in which its answers differ has a "weight" of 0')
    if not prompt:
        raise RowError("there is no turn before its answers")
    return [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in prompt], rest


def _side(messages: list[Message], said: Preference, chat: Chat) -> Example:
    made = chat.example(messages, said.tools)
    if len(made) > 1:
        raise RowError(
            "its answers differ in several assistant turns, and the chat template rewrites earlier ones; write one turn "
            "each, or use a template that does not (--data.template)"
        )
    return made[0]


PREFERENCE_ENCODER = RowEncoder(PREFERENCE_ROWS, _together, _encode)


def refuse_labels(examples: Sequence[Example], instead: str) -> None:
    """Raise UserError when there are rows with a thumb up or down and nothing to compare it with."""
    lone = [e for e in examples if e.rank is None]
    if lone:
        raise UserError(f"{len(lone):,} rows, the first {lone[0].source}, have a label and no rival: {instead}")
