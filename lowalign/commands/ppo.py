"""`lowalign ppo`: PPO with policy, reference, value function and rewards on one base.

OUT/samples.jsonl   some completions of each round with their rewards; the other files as in lowalign.train.run
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowalign import processes
from lowalign.config.training import PPOConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import heldout_count, load_examples
from lowalign.data.pack import Example
from lowalign.data.prompt_format import formats_of
from lowalign.data.prompts import Prompts, distinct_prompts
from lowalign.log import log
from lowalign.methods.ppo import PPO
from lowalign.methods.ppo_round import Roles, std
from lowalign.methods.rollout import Rollout
from lowalign.model.adapters import files as adapter_files
from lowalign.model.adapters.kinds import BY_OPTION
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import Stack, add_fresh, load_stack
from lowalign.plan.fit import fitted
from lowalign.rewards.function import Samples, same_columns
from lowalign.rewards.reward_run import RunReward, check_reward_runs
from lowalign.rewards.rewards import CompletionScore, RewardOptions, Rewards, load_functions, load_rewards
from lowalign.rewards.spec import files_and_runs, parse_spec, require_flags
from lowalign.train.engine import OnStep
from lowalign.train.run import Job, RunRows, check_and_log_start, reference_run, reference_stack, run
from lowalign.train.run_folder import Journal

VALUE = "value"


def ppo(config: PPOConfig, base: Base | None = None, on_step: OnStep | None = None) -> int:
    """Run `lowalign ppo`; `base` is one that is loaded already, `on_step` is called after each step. Returns the exit code."""
    config, predict = fitted(config, base)
    require_flags(prompts=config.data.files, reward=config.reward)
    setup = PPOSetup(config)
    _, runs = files_and_runs(config.reward)  # the files may change: functions can be corrected before --resume
    adapters = (*reference_run(config.reference), *runs)
    job = Job("ppo", setup.read, setup.start, data=config.ppo.ptx_data, adapters=adapters, steps=setup.steps)
    return run(config, job, base, on_step, predict)


class PPOSetup:
    """The steps of one run; `read` keeps for `start` the chat, the held-out prompts, the columns of the rows, the rewards
    that are functions, and the ptx Examples."""

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.ptx: list[Example] = []
        self.heldout: Prompts = []

    def read(self, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> RunRows:
        """The prompts with their ids, and the ids of the held-out prompts."""
        data, c = self.config.data, self.config
        self.chat = chat
        read = partial(distinct_prompts, chat=chat, limit=data.limit, max_tokens=data.max_length)
        read = partial(read, prompt_format=data.prompt_format, data=data)
        prompts = read(data.files)
        if data.eval:
            self.heldout = read(data.eval)
        elif data.eval_rows:
            prompts, self.heldout = _split(prompts, data.eval_rows, c.train.seed)
        rows = [row for row, _ in (*prompts, *self.heldout)]
        formats = formats_of(row.prompt for row in rows)
        check_reward_runs(files_and_runs(c.reward)[1], formats)
        self.columns = same_columns([row.columns for row in rows])
        self.functions = load_functions(c.reward, self.columns[0])
        if c.ppo.ptx_data:
            own_columns = replace(data, preset=(), columns=(), prompt=None, completion=None, system=None)
            self.ptx = load_examples(c.ppo.ptx_data, chat, own_columns).examples
        return RunRows(prompts, [ids for _, ids in self.heldout], formats)

    def start(self, host: Host, rows: list, _: list, policy: Stack, initial: Stack) -> PPO:
        """The method, with its roles on the host. rows: the prompts with their ids."""
        c, base = self.config, host.base
        base.end_at(self.chat.end_of_turn)
        check_and_log_start(host, policy, initial, [Example(ids, [ids[-8:]]) for _, ids in rows[:4]], c)
        reference = reference_stack(host, c.reference, initial, c.allow_base_mismatch)
        options = RewardOptions(c.allow_base_mismatch, c.allow_training_spread)
        rewards = load_rewards(c.reward, host, self.chat, options, self.functions)
        value = add_value(host, c, policy, initial) if c.ppo.advantage == "gae" else None
        scoring = Scoring(c, base, rewards, [*rows, *self.heldout], self.columns)
        _log_roles(host, policy, reference, value, rewards)
        if c.sampling.top_k or c.sampling.top_p < 1:
            log(
                "samples are drawn with top-k or top-p, but old log-probs, ratios and KL are those of the full vocabulary: "
                "the policy that is optimised is not exactly the one that samples"
            )
        roles = Roles(policy, reference, value)
        return PPO(host, roles, [ids for _, ids in rows], scoring, c, self.ptx, scoring.on_round)

    def steps(self, prompts: int) -> int:
        """Optimizer steps of --train.epochs passes over the prompts, in whole rounds."""
        r = self.config.rollout
        rounds = math.ceil(self.config.train.epochs * prompts / r.prompts)
        return rounds * self.config.ppo.epochs * (r.prompts // self.config.train.batch_size)


class Scoring:
    """Rewards of sampled completions, and what is written and logged of a round.

    prompts: with their ids, those to train on and then the held-out ones. columns: of their rows.
    """

    def __init__(
        self, config: PPOConfig, base: Base, rewards: Rewards, prompts: Prompts, columns: list[dict[str, Any]]
    ) -> None:
        self.config, self.base, self.rewards, self.prompts, self.columns = config, base, rewards, prompts, columns
        self.decode = partial(base.tokenizer.decode, skip_special_tokens=True)
        self.last: list[CompletionScore] = []  # of the last call

    def __call__(self, numbers: Sequence[int], completions: list[list[list[int]]]) -> list[list[float]]:
        """The rewards of completions of the prompts with these numbers; each process computes its share."""
        own = processes.share([sum(map(len, group)) for group in completions])
        scores = self._scores([numbers[i] for i in own], [completions[i] for i in own]) if own else []
        if processes.count() > 1:
            plain = [[(s.total, s.parts) for s in group] for group in scores]
            whole = processes.gather_shares(own, plain, len(numbers))
            scores = [[CompletionScore(*s) for s in group] for group in whole]
        self.last = [s for group in scores for s in group]
        return [[s.total for s in group] for group in scores]

    def _scores(self, numbers: Sequence[int], completions: list[list[list[int]]]) -> list[list[CompletionScore]]:
        prompts, ids = zip(*((self.prompts[i][0].prompt, self.prompts[i][1]) for i in numbers), strict=True)
        texts = [[self.decode(c) for c in group] for group in completions]
        stopped = [[c[-1] in self.base.eos_ids for c in group] for group in completions]
        samples = Samples([self.columns[i] for i in numbers], stopped)
        return self.rewards(prompts, ids, texts, completions, samples)

    def on_round(self, number: int, numbers: list[int], rollouts: list[Rollout]) -> dict[str, float]:
        """Write some of a round's completions to OUT/samples.jsonl -> mean and spread of each reward, before its weight."""
        shown = list(zip(numbers, rollouts, strict=True))[: self.config.rollout.log_samples]
        lines = [
            {
                "round": number,
                "prompt": self.prompts[i][0].prompt,
                "completion": self.decode(r.completions[0]),
                "reward": r.rewards[0],
            }
            for i, r in shown
        ]
        journal = Journal(self.config.out / "samples.jsonl")
        journal.keep(sum(line["round"] < number for line in journal.lines))  # a resumed run repeats rounds
        journal.add(lines)
        metrics = {}
        for name, short in short_names(list(self.rewards.parts)).items():
            values = [score.parts[name] for score in self.last]
            metrics |= {f"rewards/{short}/mean": sum(values) / len(values), f"rewards/{short}/std": std(values)}
        return metrics


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The last part of each path, "brevity:short" of "rewards/brevity.py:short"; a whole name where two would be equal."""
    short = {name: Path(name).name.replace(".py:", ":") for name in names}
    return {name: s if list(short.values()).count(s) == 1 else name for name, s in short.items()}


def _split(prompts: Prompts, eval_rows: float, seed: int) -> tuple[Prompts, Prompts]:
    """The prompts to train on, and the held-out ones, both in their order. Raises UserError when none is left to train on."""
    rows = heldout_count(eval_rows, len(prompts))
    heldout = set(random.Random(seed).sample(range(len(prompts)), rows))
    return [p for i, p in enumerate(prompts) if i not in heldout], [p for i, p in enumerate(prompts) if i in heldout]


def add_value(host: Host, config: PPOConfig, policy: Stack, initial: Stack) -> Stack:
    """Add the value function to the host -> its stack.

    It is the policy with a head (--value.share); or a copy of the reward run, when there is one reward and its adapter is
    of the same kind (arXiv 2009.01325, appendix); or a fresh adapter with a zero head, on the stack that the policy
    starts from.
    """
    if config.value.share:
        host.add_scalar_head(policy[-1], zero=True)
        return policy
    kind = BY_OPTION[config.value.adapter.kind]
    spec, *others = map(parse_spec, config.reward)
    if not others and spec.is_run:
        adapter, meta = adapter_files.read(adapter_files.locate(spec.name))
        if adapter.kind is kind:
            stack = load_stack(host, VALUE, spec.name, config.allow_base_mismatch)
            weight = spec.weight
            if config.rollout.normalise == "running":  # the rewards are divided by their spread
                weight = math.copysign(1 / (meta.get("reward", {}).get("std") or 1.0), weight)
            host.scalar_head(VALUE).data.mul_(weight)
            return stack
    under = tuple(name for name in initial if not (kind.soft and host.adapters[name].soft))  # one soft prompt at a time
    add_fresh(host, VALUE, config.value.adapter, under)
    host.add_scalar_head(VALUE, zero=True)
    return (*under, VALUE)


def _log_roles(host: Host, policy: Stack, reference: Stack, value: Stack | None, rewards: Rewards) -> None:
    """Log which adapters each role has."""

    def written(stack: Stack) -> str:
        return " + ".join(["base", *(f"{name} ({host.adapters[name].title})" for name in stack)])

    log(f"policy: {written(policy)}; reference: {written(reference)}; value: {written(value) if value else 'none'}")
    for name, (weight, reward) in rewards.parts.items():
        what = written(reward.stack) if isinstance(reward, RunReward) else "a function"
        log(f"reward: {weight:g} * {name}, which is {what}")
