"""`lowalign judge`: which of two answers is better, asked in both orders; what stays the same becomes a preference.

OUT/verdicts.jsonl        one line for each two answers: the log-odds of the first place in either order, and the verdict
OUT/pairs.jsonl           prompt, chosen, rejected, ready for `lowalign reward` and `lowalign dpo`
OUT/disagreements.jsonl   answers of which the verdict changed with the order, and ties
OUT/report.json           the counts
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from lowalign.config.commands import JudgeConfig
from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.data.rows.answers import Answers, Prompt, as_text, read_answers
from lowalign.data.rows.turns import Message, RowError
from lowalign.durable import write_json, write_jsonl
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.adapters.files import adapter_template
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import load_policy
from lowalign.rewards.pairwise import JudgePrompt, choice, log_odds, summary, summary_lines, verdict, winner
from lowalign.rewards.rewards import load_rewards, named
from lowalign.train.lock import lock_folder
from lowalign.train.run_folder import Journal, check_or_write_inputs, input_hashes

BLOCK = 32  # pairs of answers whose verdicts are computed and written together
EMPTY, TOO_LONG = "an answer is empty", "longer than --max-length"


class Pair(NamedTuple):
    """Answers number i and j of a row, i < j."""

    row: Answers
    i: int
    j: int

    @property
    def texts(self) -> tuple[str, str]:
        """The two answers as they are shown."""
        return as_text(self.row.completions[self.i]), as_text(self.row.completions[self.j])


def judge(config: JudgeConfig) -> int:
    """Run the command. Returns the exit code."""
    prompt = JudgePrompt(config.template or Path(__file__).with_name("judge.jinja"))
    rows = read_answers(config.data)
    pairs = [Pair(row, i, j) for row in rows for i, j in combinations(range(len(row.completions)), 2)]
    if not pairs:
        raise UserError(f"no two answers to one prompt in {', '.join(config.data)}")
    blocks = list(_blocks(pairs, whole_rows=bool(config.reward)))
    with lock_folder(config.out):
        journal = Journal(config.out / "verdicts.jsonl")
        files, runs = named(config.reward)
        inputs = input_hashes(files, [*runs, *([config.adapter] if config.adapter else [])])
        check_or_write_inputs(
            config, bool(journal.lines), inputs | {"data": [vars(row) for row in rows], "template": prompt.text}
        )
        done = 0
        while blocks and done + len(blocks[0]) <= len(journal.lines):
            done += len(blocks.pop(0))
        # A block is always computed as a whole: its verdicts then have the same bits however often a run was cut off.
        journal.keep(done)
        if blocks:
            verdicts = _scorer(config) if config.reward else _asker(config, prompt)
            with tqdm(total=len(pairs), initial=done, unit="pair", disable=None) as bar:
                for block in blocks:
                    journal.add(verdicts(block))
                    bar.update(len(block))
        _write(config.out, pairs, journal.lines)
    return 0


def _blocks(pairs: Sequence[Pair], whole_rows: bool) -> Iterator[list[Pair]]:
    """The pairs in order, BLOCK together; with whole_rows more, where the pairs of one row would be parted."""
    block: list[Pair] = []
    for pair in pairs:
        if len(block) >= BLOCK and not (whole_rows and pair.row is block[-1].row):
            yield block
            block = []
        block.append(pair)
    if block:
        yield block


def _asker(config: JudgeConfig, prompt: JudgePrompt) -> Callable[[Sequence[Pair]], list[dict]]:
    """What makes the lines of a block: the model is asked in both orders."""
    adapters = (config.adapter,) if config.adapter else ()
    host, chat = _load(config, adapters)
    stack = load_policy(host, adapters, config.allow_base_mismatch)

    def ask(pair: Pair) -> list[Example] | str:
        shown, (a, b) = as_text(pair.row.prompt), pair.texts
        try:
            questions = [choice(chat, prompt.render(shown, *order)) for order in ((a, b), (b, a))]
        except RowError as error:
            return str(error)
        if max(question.length for question in questions) > config.max_length:
            return TOO_LONG
        return [replace(question, source=pair.row.source) for question in questions]

    def lines(block: Sequence[Pair]) -> list[dict]:
        asked = [_unfit(pair) or ask(pair) for pair in block]
        questions = [question for either in asked if not isinstance(either, str) for question in either]
        with host.use(*stack):
            odds = iter(log_odds(host, questions, config.token_budget))
        made = []
        for pair, either in zip(block, asked, strict=True):
            if isinstance(either, str):
                made.append(_line(pair, "skipped", why=either))
            else:
                first, swapped = next(odds), next(odds)
                made.append(_line(pair, verdict(first, swapped, config.margin), first=first, swapped=swapped))
        return made

    return lines


def _scorer(config: JudgeConfig) -> Callable[[Sequence[Pair]], list[dict]]:
    """What makes the lines of a block: each answer is scored once, and the higher score wins."""
    _, runs = named(config.reward)
    if runs and config.model is None:
        raise UserError(f"--reward {runs[0]} is a reward run; give its base with --model M")
    host, chat = _load(config, runs) if runs else (None, None)
    rewards = load_rewards(config.reward, host, chat, config.allow_base_mismatch)

    def lines(block: Sequence[Pair]) -> list[dict]:
        rows = {id(pair.row): pair.row for pair in block}
        scores: dict[tuple[int, int], float | str] = {}
        asked = []  # row, and by number its answers as token ids
        for key, row in rows.items():
            prompt, answers = _encode(chat, row, config.max_length)
            scores |= {(key, k): why for k, why in answers.items() if isinstance(why, str)}
            answers = {k: ids for k, ids in answers.items() if not isinstance(ids, str)}
            asked += [(row, prompt, answers)] if answers else []
        found = rewards(
            [row.prompt for row, _, _ in asked],
            [prompt for _, prompt, _ in asked],
            [[as_text(row.completions[k]) for k in answers] for row, _, answers in asked],
            [list(answers.values()) for _, _, answers in asked],
        )
        for (row, _, answers), values in zip(asked, found, strict=True):
            scores |= {(id(row), k): value.total for k, value in zip(answers, values, strict=True)}
        made = []
        for pair in block:
            a, b = (scores[id(pair.row), k] for k in (pair.i, pair.j))
            why = _unfit(pair) or next((score for score in (a, b) if isinstance(score, str)), "")
            if why:
                made.append(_line(pair, "skipped", why=why))
            else:
                made.append(_line(pair, winner(a - b, config.margin), scores=[a, b]))
        return made

    return lines


def _encode(chat: Chat | None, row: Answers, max_length: int) -> tuple[list[int], dict[int, list[int] | str]]:
    """Ids of the prompt and, by number, of each answer through the end of its turn, or why it cannot be scored.

    Without a chat, nothing that needs ids is to score them: they are left empty.
    """
    asked = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
    asked = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in asked]
    prompt, found = [], {}
    for k, completion in enumerate(row.completions):
        text = as_text(completion)
        if not text.strip():
            found[k] = EMPTY
        elif chat is None:
            found[k] = []
        else:
            try:
                example = chat.example([*asked, {"role": "assistant", "content": text}])[-1]
            except RowError as error:
                found[k] = str(error)
                continue
            prompt, found[k] = example.prompt, example.completions[0]
            if example.length > max_length:
                found[k] = TOO_LONG
    return prompt, found


def _unfit(pair: Pair) -> str:
    """Why the two answers cannot be compared; "": they can."""
    a, b = pair.texts
    if not (a.strip() and b.strip()):
        return EMPTY
    return "both answers are the same" if a == b else ""


def _load(config: JudgeConfig, adapters: Sequence[str]) -> tuple[Host, Chat]:
    base = Base.load(config.model, **vars(config.base))
    return Host(base), Chat(base.tokenizer, adapter_template(adapters))


def _line(pair: Pair, verdict: str, **more: Any) -> dict[str, Any]:
    return {"source": pair.row.source, "a": pair.i, "b": pair.j, "verdict": verdict, **more}


def _write(out: Path, pairs: Sequence[Pair], lines: Sequence[dict]) -> None:
    """What the verdicts come to, in files and in words."""
    preferences, aside = [], []
    for (row, i, j), line in zip(pairs, lines, strict=True):
        a, b = row.completions[i], row.completions[j]
        match line["verdict"]:
            case "a":
                preferences.append(_preference(row.prompt, a, b))
            case "b":
                preferences.append(_preference(row.prompt, b, a))
            case "changed" | "tie":
                aside.append(line | {"prompt": row.prompt, "completion_a": a, "completion_b": b})
    for name, found in (("pairs", preferences), ("disagreements", aside)):
        write_jsonl(out / f"{name}.jsonl", found)
    report = summary(lines)
    write_json(out / "report.json", report)
    log("\n".join(summary_lines(report)))
    log(f"{len(preferences):,} preferences are in {out / 'pairs.jsonl'}")


def _preference(prompt: Prompt, chosen: Prompt, rejected: Prompt) -> dict[str, list[Message]]:
    """A row of pairs, all messages: what was judged as a turn of a chat is learnt as one."""
    turns = lambda text, role: [{"role": role, "content": text}] if isinstance(text, str) else text  # noqa: E731
    answers = {"chosen": turns(chosen, "assistant"), "rejected": turns(rejected, "assistant")}
    return {"prompt": turns(prompt, "user"), **answers}
