"""`lowalign judge`: which of two answers is better; the verdicts become preferences.

OUT/verdicts.jsonl        one line for each two answers: the verdict, with the log-odds of both orders or with the scores
OUT/pairs.jsonl           prompt, chosen, rejected: for `lowalign reward` and `lowalign dpo`
OUT/disagreements.jsonl   answers with a tie, or with a verdict that changed with the order
OUT/report.json           the counts
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

from lowalign.config.evaluation import JudgeConfig
from lowalign.data.chat import Chat
from lowalign.data.prompt_format import formats_of, formatted
from lowalign.data.rows.answers import Answers, read_answers
from lowalign.data.rows.turns import Prompt, as_messages
from lowalign.durable import write_json, write_jsonl
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.adapters.files import adapter_template, refuse_reward_runs
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import load_policy
from lowalign.model.positions import usable_positions
from lowalign.rewards.function import FunctionReward, same_columns
from lowalign.rewards.judge_prompt import JudgePrompt
from lowalign.rewards.pairwise import ModelJudge, Pair, RewardJudge, Sampled, VerdictLine, report, report_lines
from lowalign.rewards.reward_run import check_reward_runs
from lowalign.rewards.rewards import RewardOptions, load_functions, load_rewards
from lowalign.rewards.spec import files_and_runs
from lowalign.train.lock import lock_folder
from lowalign.train.run_folder import RECIPE_FILE, Journal, announce_start, check_or_write_inputs, input_hashes

PAIRS_PER_BLOCK = 32  # pairs of answers whose verdicts are computed and written together


def judge(config: JudgeConfig) -> int:
    """Run the command. Returns the exit code."""
    announce_start(config.resume, config.out / RECIPE_FILE)
    prompt = JudgePrompt(config.template or Path(__file__).with_name("judge.jinja"))
    rows = [formatted(row, config.data.prompt_format) for row in read_answers(config.data.files)]
    pairs = [Pair(row, i, j) for row in rows for i, j in combinations(range(len(row.completions)), 2)]
    if not pairs:
        raise UserError(f"no two answers to one prompt in {', '.join(config.data.files)}")
    blocks = list(_blocks(pairs, whole_rows=bool(config.reward)))
    columns = same_columns([row.columns for row in rows])
    functions = load_functions(config.reward, columns[0])
    with lock_folder(config.out):
        journal = Journal(config.out / "verdicts.jsonl")
        files, runs = files_and_runs(config.reward)
        check_reward_runs(runs, formats_of(rows))
        refuse_reward_runs(_adapters(config))
        inputs = input_hashes(files, [*runs, *_adapters(config)])
        content = [{"prompt": row.prompt, "completions": row.completions, "source": row.source} for row in rows]
        inputs |= {"data": content, "template": prompt.text}
        if any(function.parameters.uses_columns for function in functions.values()):
            inputs["columns"] = columns
        check_or_write_inputs(config, bool(journal.lines), inputs)
        if missing := journal.resume(blocks):
            sampled = {id(row): Sampled(own, None) for row, own in zip(rows, columns, strict=True)}
            compare = _reward_judge(config, functions, sampled) if config.reward else _model_judge(config, prompt)
            journal.fill(missing, compare, "pair")
        _write_results(config.out, pairs, journal.lines)
    return 0


def _blocks(pairs: Sequence[Pair], whole_rows: bool) -> Iterator[list[Pair]]:
    """The pairs in order, PAIRS_PER_BLOCK together. whole_rows: do not divide the pairs of a row; such a block may be
    larger."""
    block: list[Pair] = []
    for pair in pairs:
        if len(block) >= PAIRS_PER_BLOCK and not (whole_rows and pair.row is block[-1].row):
            yield block
            block = []
        block.append(pair)
    if block:
        yield block


def _model_judge(config: JudgeConfig, prompt: JudgePrompt) -> ModelJudge:
    host, chat = _load(config, _adapters(config))
    stack = load_policy(host, _adapters(config), config.allow_base_mismatch)
    return ModelJudge(host, chat, stack, prompt, config)


def _reward_judge(
    config: JudgeConfig, functions: dict[str, FunctionReward], sampled: dict[int, Sampled]
) -> RewardJudge:
    """functions: of --reward. sampled: what they may ask for, by id of the row."""
    _, runs = files_and_runs(config.reward)
    if runs and config.model is None:
        raise UserError(f"--reward {runs[0]} is a reward run; give its base with --model M")
    host, chat = _load(config, runs) if runs else (None, None)
    options = RewardOptions(config.allow_base_mismatch, config.allow_training_spread)
    rewards = load_rewards(config.reward, host, chat, options, functions)
    return RewardJudge(rewards, chat, config, sampled)


def _adapters(config: JudgeConfig) -> tuple[str, ...]:
    return (config.adapter,) if config.adapter else ()


def _load(config: JudgeConfig, adapters: Sequence[str]) -> tuple[Host, Chat]:
    base = Base.load(config.model, **vars(config.base))
    chat = Chat(base.tokenizer, adapter_template(adapters))
    chat.positions = usable_positions(base.folder, None, adapters)
    return Host(base), chat


def _write_results(out: Path, pairs: Sequence[Pair], lines: Sequence[VerdictLine]) -> None:
    """Write pairs.jsonl, disagreements.jsonl and report.json, and log the report."""
    preferences = preferences_of(pairs, lines)
    disagreements = [
        line | {"prompt": row.prompt, "completion_a": row.completions[i], "completion_b": row.completions[j]}
        for (row, i, j), line in zip(pairs, lines, strict=True)
        if line["verdict"] in ("changed", "tie")
    ]
    write_jsonl(out / "pairs.jsonl", preferences)
    write_jsonl(out / "disagreements.jsonl", disagreements)
    figures = report(lines)
    write_json(out / "report.json", figures)
    log("\n".join([*report_lines(figures), f"{len(preferences):,} preferences are in {out / 'pairs.jsonl'}"]))


def preferences_of(pairs: Sequence[Pair], lines: Sequence[VerdictLine]) -> list[dict[str, Prompt]]:
    """The rows of pairs.jsonl: the pairs with a winner."""
    decided = [
        (pair, line["verdict"]) for pair, line in zip(pairs, lines, strict=True) if line["verdict"] in ("a", "b")
    ]
    return [
        _preference(row, *(row.completions[k] for k in ((i, j) if verdict == "a" else (j, i))))
        for (row, i, j), verdict in decided
    ]


def _preference(row: Answers, chosen: Prompt, rejected: Prompt) -> dict[str, Prompt]:
    """A row of pairs.jsonl: plain text as it is, else everything as messages."""
    if row.plain_text:
        return {"prompt": row.prompt, "chosen": chosen, "rejected": rejected}
    answers = {"chosen": as_messages(chosen, "assistant"), "rejected": as_messages(rejected, "assistant")}
    return {"prompt": as_messages(row.prompt), **answers}
