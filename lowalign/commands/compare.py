"""`lowalign compare`: policies answer the same prompts on one base, and a judge says whose answers are better.

OUT/answers.jsonl    one line a prompt: the answers of all policies; `lowalign judge` reads it too
OUT/verdicts.jsonl   one line for each two answers, as in `lowalign judge`
OUT/pairs.jsonl      prompt, chosen, rejected of the pairs with a winner: for `lowalign reward` and `lowalign dpo`
OUT/result.json      win rate with its interval, length-controlled too, counts; ratings where there are more than two
OUT/result.md        the same, to read
"""

import contextlib
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

from lowalign.commands.judge import preferences_of
from lowalign.commands.policies import PolicyAnswers, adapters_of, base_named_by, prompts_for, read_policies
from lowalign.config.evaluation import CompareConfig
from lowalign.data.chat import Chat
from lowalign.data.prompt_format import formats_of
from lowalign.data.rows.answers import Answers
from lowalign.durable import write_file, write_json, write_jsonl
from lowalign.log import log
from lowalign.model.adapters.files import adapter_template, refuse_reward_runs
from lowalign.model.base.base import Base
from lowalign.model.base.hub import load_tokenizer
from lowalign.model.host import Host
from lowalign.model.positions import usable_positions
from lowalign.rewards.comparison import Judged, figures, markdown
from lowalign.rewards.function import same_columns
from lowalign.rewards.judge_prompt import JudgePrompt
from lowalign.rewards.pairwise import ModelJudge, Pair, RewardJudge, Sampled, report, report_lines
from lowalign.rewards.reward_run import check_reward_runs
from lowalign.rewards.rewards import RewardOptions, load_functions, load_rewards
from lowalign.rewards.spec import RewardSpec
from lowalign.train.lock import lock_folder
from lowalign.train.output_file import stoppable
from lowalign.train.run_folder import RECIPE_FILE, Journal, announce_start, check_or_write_inputs, input_hashes

PROMPTS_PER_BLOCK = 64  # prompts that all policies answer before these answers are written
PAIRS_PER_BLOCK = 32  # pairs that are judged and written together, unless a prompt has more


def compare(config: CompareConfig, base: Base | None = None) -> int:
    """Run the command; `base` is one that is loaded already. Returns the exit code."""
    return stoppable(partial(_run, base=base), config)


def _run(config: CompareConfig, base: Base | None) -> None:
    with lock_folder(config.out):
        announce_start(config.resume, config.out / RECIPE_FILE)
        with contextlib.closing(_Comparison(config, base)) as work:
            work.run()


class _Comparison:
    """The work of one command. The base is loaded when something is left to compute on it."""

    def __init__(self, config: CompareConfig, base: Base | None) -> None:
        self.config, self.out = config, config.out
        self.model = base_named_by(config.model, config.policies)
        self.question = JudgePrompt(config.template or Path(__file__).with_name("judge.jinja"))
        self.function = None if config.judge == "model" else RewardSpec(1.0, config.judge).function("--judge")
        self.judge_runs = [] if self.function or config.judge == "model" else [config.judge]
        adapters = adapters_of(config.policies)
        refuse_reward_runs(adapters)
        self.tokenizer = base.tokenizer if base else load_tokenizer(self.model, config.base.revision)
        self.positions = usable_positions(
            base.folder if base else self.model, config.base.revision, [*adapters, *self.judge_runs]
        )
        self.policies = read_policies(config.policies, self.tokenizer, self.positions)
        self.prompts = prompts_for(self.policies, config.data.files, config.data)
        check_reward_runs(self.judge_runs, formats_of(row.prompt for row, _ in self.prompts))
        self.columns = same_columns([row.columns for row, _ in self.prompts])
        self.functions = load_functions([config.judge] if self.function else [], self.columns[0])
        self._base = base

    @cached_property
    def host(self) -> Host:
        """The base, with the adapters that were loaded so far."""
        return Host(self._base or Base.load(self.model, **vars(self.config.base)))

    def close(self) -> None:
        """Leave the base without adapters, for a caller that goes on with it."""
        if "host" in vars(self):
            self.host.delete_all()

    def run(self) -> None:
        """Answer, judge, and write the results."""
        config = self.config
        answers, verdicts = Journal(self.out / "answers.jsonl"), Journal(self.out / "verdicts.jsonl")
        check_or_write_inputs(config, bool(answers.lines), self._inputs())
        total = len(self.prompts)
        starts = range(0, total, PROMPTS_PER_BLOCK)
        if blocks := answers.resume([range(i, min(i + PROMPTS_PER_BLOCK, total)) for i in starts]):
            verdicts.keep(0)  # of answers that may be others now
            rows = [row for row, _ in self.prompts]
            mismatch = config.allow_base_mismatch
            answer = PolicyAnswers(self.host, self.policies, rows, config.n, config.sampling, mismatch)
            answers.fill(blocks, answer, "prompt")
        pairs = self._pairs(answers.lines)
        size = len(pairs) // total  # pairs of a prompt; an answer is scored once, so they stay together
        size *= max(1, PAIRS_PER_BLOCK // size)
        if missing := verdicts.resume([pairs[i : i + size] for i in range(0, len(pairs), size)]):
            verdicts.fill(missing, self._judge(answers.lines, pairs), "pair")
        self._write_results(answers, pairs, verdicts)

    def _inputs(self) -> dict[str, object]:
        """What --resume compares: prompts, question, adapters and the judge."""
        files = [str(self.function[0])] if self.function else []
        content = {"data": [row.prompt for row, _ in self.prompts], "template": self.question.text}
        if any(function.parameters.uses_columns for function in self.functions.values()):
            content["columns"] = self.columns
        return content | input_hashes(files, [*adapters_of(self.config.policies), *self.judge_runs])

    def _pairs(self, lines: Sequence[dict[str, Any]]) -> list[Pair]:
        """Answer m of each policy with answer m of each other one, prompt by prompt."""
        n, pairs = self.config.n, []
        for (prompt, _), line in zip(self.prompts, lines, strict=True):
            row = Answers(prompt.prompt, [c["completion"] for c in line["completions"]], prompt.where)
            every_two = combinations(range(len(self.policies)), 2)
            pairs += [Pair(row, i * n + m, j * n + m) for i, j in every_two for m in range(n)]
        return pairs

    def _judge(self, lines: Sequence[dict[str, Any]], pairs: Sequence[Pair]) -> ModelJudge | RewardJudge:
        config = self.config
        if config.judge == "model":
            chat = Chat(self.tokenizer)
            chat.positions = self.positions
            return ModelJudge(self.host, chat, (), self.question, config)
        options = RewardOptions(config.allow_base_mismatch, token_budget=config.token_budget)
        if self.function:
            rewards = load_rewards((config.judge,), None, None, options, self.functions)
            needs_ids = any(f.parameters.takes("completion_ids") for f in self.functions.values())
            return RewardJudge(
                rewards, self.policies[0].chat if needs_ids else None, config, self._sampled(lines, pairs)
            )
        chat = Chat(self.tokenizer, adapter_template((config.judge,)))
        chat.positions = self.positions
        return RewardJudge(load_rewards((config.judge,), self.host, chat, options), chat, config)

    def _sampled(self, lines: Sequence[dict[str, Any]], pairs: Sequence[Pair]) -> dict[int, Sampled]:
        """What the judging function may ask for, by id of the row of a pair."""
        stopped = [[c["stopped"] for c in line["completions"]] for line in lines]
        rows = list({id(pair.row): None for pair in pairs})  # in the order of the prompts
        return {row: Sampled(*known) for row, *known in zip(rows, self.columns, stopped, strict=True)}

    def _write_results(self, answers: Journal, pairs: Sequence[Pair], verdicts: Journal) -> None:
        config, counts = self.config, report(verdicts.lines)
        judged = Judged(config.policies, config.n, pairs, verdicts.lines, config.sampling.seed)
        result = {"judge": config.judge, "prompts": len(answers.lines), "n": config.n, **figures(judged)}
        result["answers"] = [self._described(answers, k) for k in range(len(self.policies))]
        result["first_place"] = counts["first_place"]
        write_jsonl(self.out / "pairs.jsonl", preferences_of(pairs, verdicts.lines))
        write_json(self.out / "result.json", result)
        write_file(self.out / "result.md", markdown(result))
        log("\n".join([*report_lines(counts), "", markdown(result), f"all of it is in {self.out}"]))

    def _described(self, answers: Journal, k: int) -> dict[str, Any]:
        """The answers of policy k: mean length, and the share that ended before the length limit."""
        n = self.config.n
        own = [c for line in answers.lines for c in line["completions"][k * n : (k + 1) * n]]
        mean = lambda values: sum(values) / len(own)  # noqa: E731
        lengths = {"tokens": mean(c["tokens"] for c in own), "characters": mean(len(c["completion"]) for c in own)}
        return {"policy": self.policies[k].name, **lengths, "stopped": mean(c["stopped"] for c in own)}
