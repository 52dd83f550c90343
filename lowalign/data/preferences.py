"""Files of preferences to Examples: one prompt, the answers to it, and their ranks or label.

All answers of a row share the same prompt ids. Turns that all its answers begin with are moved to the prompt, so that the
prompt ends where a turn ends, whatever the format of the row; assistant turns in it are not supervised.

Comparisons become Examples with K >= 2 completions, `rank` (0 for the best, equal ranks tie), `margin` and `weight`. Rows
with a label have one completion, `label` True or False, and rank None. config.max_length limits the prompt with each
single completion. Rows of one prompt (scores) or one pair (verdicts) in a file become one Example.
"""

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from lowalign.config.sections import PreferenceConfig
from lowalign.data.blocks import RowEncoder
from lowalign.data.chat import Chat
from lowalign.data.dataset import load_examples
from lowalign.data.example import Example
from lowalign.data.examples import as_examples
from lowalign.data.rendering.template import Unrenderable
from lowalign.data.report import FileStats
from lowalign.data.rows.preference_rows import PREFERENCE_ROWS, Preference, PromptAndCompletions, ScoreRow, VerdictRow
from lowalign.data.rows.turns import Message, Tools, unsupervised, weight_of
from lowalign.data.rows.votes import decide, ranks_of
from lowalign.data.sources.row import RowDropped, RowError
from lowalign.data.truncate import fit
from lowalign.errors import UserError

REPEATED_NOTE = "repeated answers of one rank kept once"
R = TypeVar("R", Preference, Example)
SWAPPED = {"a": "b", "b": "a", "tie": "tie"}


def _group_key(row: PromptAndCompletions) -> Hashable:
    match row:
        case ScoreRow():
            return _json([row.prompt, row.tools])
        case VerdictRow():
            return _json([row.prompt, row.tools, sorted(map(_json, row.completions))])
        case _:
            return None


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _encode(rows: list[PromptAndCompletions], chat: Chat, config: PreferenceConfig, stats: FileStats) -> list[Example]:
    """The Example of the rows of one group; empty when no supervised token is left."""
    match rows[0]:
        case ScoreRow():
            preference = _from_scores(rows, config.gap)
        case VerdictRow():
            preference = _from_verdicts(rows, config, stats)
        case Preference(scores=[*scores]):
            preference = replace(rows[0], rank=ranks_of(scores, config.gap), scores=None)
        case _:
            preference = rows[0]
    count = len(preference.completions)
    preference = _without_repeats(preference, map(_json, preference.completions))
    notes = chat.notes.copy()
    example = _example(preference, chat)
    chat.notes = notes + Counter(dict.fromkeys(chat.notes - notes, len(rows)))  # once per row, not once per answer
    example = _without_repeats(example, map(tuple, example.completions))
    if config.ties == "drop" and example.rank and len(set(example.rank)) == 1:
        raise RowDropped("none of its answers is better than another")
    stats.measure(example)
    longest = len(example.prompt) + max(map(len, example.completions))
    if config.long == "drop" and longest > config.max_length:
        raise RowDropped(f"longer than {config.max_length:,} tokens")
    fitted, cut = fit(example, config.max_length, chat.bos_ids)
    if fitted is None:
        return []
    if cut:
        when = f" once they are cut to {config.max_length:,} tokens"
        fitted = _without_repeats(fitted, map(tuple, fitted.completions), when)
        stats.cut[cut] += len(rows)
    if len(fitted.completions) < count:
        stats.notes[REPEATED_NOTE] += len(rows)
    return [fitted]


def _from_scores(rows: list[ScoreRow], gap: float) -> Preference:
    """The answers to one prompt, ranked by their scores."""
    if len(rows) == 1:
        raise RowDropped("the only answer to its prompt")
    ranks = ranks_of([row.score for row in rows], gap)
    return Preference(rows[0].prompt, [row.completions[0] for row in rows], rows[0].tools, rank=ranks)


def _from_verdicts(rows: list[VerdictRow], config: PreferenceConfig, stats: FileStats) -> Preference:
    """Two answers, ranked by the verdicts of several annotators."""
    first, verdicts = rows[0], {}
    for row in rows:
        if row.annotator in verdicts:
            raise RowError(f"the annotator {row.annotator} judges the same two answers more than once")
        same_order = row.completions == first.completions
        verdicts[row.annotator] = row.verdict if same_order else SWAPPED[row.verdict]
    stats.verdicts.append(verdicts)
    winner, weight = decide(list(verdicts.values()), config.verdicts)
    rank = {"a": [0, 1], "b": [1, 0], "tie": [0, 0]}[winner]
    return Preference(first.prompt, first.completions, first.tools, rank=rank, weight=weight)


def _without_repeats(ranked: R, answers: Iterable[Hashable], when: str = "") -> R:
    """The Preference or Example with the first of equal answers only. answers: what decides that; when: for the reason.

    Raises RowDropped when all are the same, or the same answer has two ranks.
    """
    first_index: dict[Hashable, int] = {}
    first = [first_index.setdefault(answer, i) for i, answer in enumerate(answers)]
    if ranked.rank is not None and len(first_index) == 1:
        raise RowDropped(f"its answers are the same{when}")
    if ranked.rank is not None and any(ranked.rank[i] != ranked.rank[k] for i, k in enumerate(first)):
        raise RowDropped(f"one answer has two ranks{when}")
    lists = {name: getattr(ranked, name, None) for name in ("completions", "masks", "rank")}
    kept = {name: [values[i] for i in first_index.values()] for name, values in lists.items() if values is not None}
    return replace(ranked, **kept)


def _example(preference: Preference, chat: Chat) -> Example:
    """The prompt and all answers as they are rendered, whatever their length."""
    if isinstance(preference.prompt, str):
        examples = [chat.completion(preference.prompt, text) for text in preference.completions]
    else:
        prompt, answers = _split(preference.prompt, preference.completions)
        examples = [_one_example([*prompt, *answer], preference.tools, chat) for answer in answers]
    if any(example.prompt != examples[0].prompt for example in examples):
        raise Unrenderable("the chat template renders the prompt differently before each of its answers")
    return Example(
        examples[0].prompt,
        [example.completions[0] for example in examples],
        [example.masks[0] for example in examples],
        rank=None if preference.rank is None else list(preference.rank),
        margin=preference.margin,
        label=preference.label,
        weight=preference.weight,
    )


def _split(prompt: list[Message], answers: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """-> the prompt with the turns that all answers begin with, and the answers without them. Raises RowError."""
    shared = 0
    while len(answers) > 1 and all(a[shared : shared + 1] == answers[0][shared : shared + 1] != [] for a in answers):
        shared += 1
    prompt, rest = prompt + answers[0][:shared], [answer[shared:] for answer in answers]
    if not all(rest):
        raise RowError("one of its answers is the beginning of another")
    for answer in rest:
        if answer[0]["role"] != "assistant":
            raise RowError(f"its answers differ at a turn of the {answer[0]['role']}; they must answer the same prompt")
        if answer[0].get("weight") == 0:
            raise RowError('the first turn in which its answers differ has a "weight" of 0')
        if fraction := next((weight for weight in map(weight_of, answer) if weight not in (0, 1)), None):
            raise RowError(
                f'a turn has a "weight" of {fraction:g}; only lowalign sft weighs turns, here it must be 0 or 1'
            )
    if not prompt:
        raise RowError("there is no turn before its answers")
    return unsupervised(prompt), rest


def _one_example(messages: list[Message], tools: Tools, chat: Chat) -> Example:
    examples = chat.example(messages, tools)
    if len(examples) > 1:
        raise RowError(
            "its answers differ in several assistant turns, and the chat template rewrites earlier ones; write one turn "
            "each, or use a template that does not (--data.template)"
        )
    return examples[0]


PREFERENCE_ENCODER = RowEncoder("preferences", PREFERENCE_ROWS, _group_key, _encode)
load_preferences = partial(load_examples, encoder=PREFERENCE_ENCODER)


def refuse_labels(examples: Sequence[Example], instead: str) -> None:
    """Raise UserError when rows have a label (thumb up or down) instead of answers to compare."""
    labelled = np.flatnonzero(as_examples(examples).fact("ranked") == 0)
    if len(labelled):
        raise UserError(
            f"{len(labelled):,} rows, the first {examples[int(labelled[0])].source}, have a label and no second answer: {instead}"
        )
