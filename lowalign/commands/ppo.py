"""`lowalign ppo`: the four roles on one base, the prompts, the rewards, and what a round tells.

OUT/samples.jsonl   some completions of each round with their rewards; the rest as in lowalign.train.run
"""

import math
from collections.abc import Sequence
from functools import partial

from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from lowalign.config.training import PPOConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import load_examples
from lowalign.data.pack import Example
from lowalign.data.prompts import PromptRow, distinct_prompts
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.methods.ppo import PPO
from lowalign.methods.ppo_round import Roles
from lowalign.methods.rollout import Rollout
from lowalign.model.adapters import files as adapter_files
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import add_fresh, load_stack, peft_config
from lowalign.rewards.rewards import Rewards, RunReward, as_function, load_rewards, named, split_spec
from lowalign.train.run import check_and_log_start, named_run, reference_stack, run
from lowalign.train.run_folder import Journal

VALUE = "value"

Stack = tuple[str, ...]


def ppo(config: PPOConfig, base: Base | None = None) -> int:
    """Run `lowalign ppo`; `base` is one that is loaded already. Returns the exit code."""
    trip = PPOSetup(config)
    _, rewards = named(config.reward)  # a function may be mended on the way
    adapters = (*named_run(config.reference), *rewards)
    return run(
        config, "ppo", trip.read, trip.start, base, data=config.ppo.ptx_data, adapters=adapters, steps=trip.steps
    )


class PPOSetup:
    """One run: what is read before the base is loaded is kept for what begins after."""

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.ptx: list[Example] = []

    def read(self, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[list[tuple[PromptRow, list[int]]], list]:
        """The prompts with their ids; nothing is held out."""
        data, c = self.config.data, self.config
        self.chat = chat
        if not data.files:
            raise UserError("no prompts: give --data FILE…")
        if data.eval or data.eval_rows:
            raise UserError("ppo holds no rows out: its rewards are measured on what it samples; leave --data.eval and --data.eval-rows")  # fmt: skip
        if not c.reward:
            raise UserError("no reward: give --reward RUN or --reward FILE.py:NAME")
        fitting, left_out = distinct_prompts(data.files, chat, data.limit, data.max_length)
        log(f"{len(fitting) + left_out:,} prompts, {left_out:,} of them longer than {data.max_length:,} tokens and left out")  # fmt: skip
        if not fitting:
            raise UserError(f"no prompt of {', '.join(data.files)} is left; see --data.max-length and --data.limit")
        if c.ppo.ptx_data:
            self.ptx = load_examples(c.ppo.ptx_data, chat, data, tokenizer=tokenizer).examples
        return fitting, []

    def start(self, host: Host, prompts: list, _: list, policy: Stack, reference: Stack) -> PPO:
        """The method, with its roles on the host."""
        c, base = self.config, host.base
        base.end_at(self.chat.end_of_turn)
        check_and_log_start(host, policy, reference, [Example(ids, [ids[-8:]]) for _, ids in prompts[:4]], c)
        started = reference
        reference = reference_stack(host, c.reference, reference, c.allow_base_mismatch)
        rewards = load_rewards(c.reward, host, self.chat, c.allow_base_mismatch)
        value = add_value(host, c, policy, started) if c.ppo.advantage == "gae" else None
        asked = [a.prompt for a, _ in prompts]
        ids = [i for _, i in prompts]
        decode = partial(base.tokenizer.decode, skip_special_tokens=True)

        def score(numbers: Sequence[int], completions: list[list[list[int]]]) -> list[list[float]]:
            texts = [[decode(c) for c in group] for group in completions]
            found = rewards([asked[i] for i in numbers], [ids[i] for i in numbers], texts, completions)
            return [[s.total for s in group] for group in found]

        def tell(number: int, numbers: list[int], rollouts: list[Rollout]) -> None:
            lines = [
                {"round": number, "prompt": asked[i], "completion": decode(r.completions[0]), "reward": r.rewards[0]}
                for i, r in list(zip(numbers, rollouts, strict=True))[: c.rollout.show]
            ]
            journal = Journal(c.out / "samples.jsonl")
            journal.keep(sum(line["round"] < number for line in journal.lines))  # a resumed run comes here again
            journal.add(lines)

        _say_roles(host, policy, reference, value, rewards)
        return PPO(host, Roles(policy, reference, value), ids, score, c, self.ptx, tell)

    def steps(self, prompts: int) -> int:
        """--train.epochs passes over the prompts, in whole rounds."""
        r = self.config.rollout
        rounds = math.ceil(self.config.train.epochs * prompts / r.prompts)
        return rounds * self.config.ppo.epochs * (r.prompts // self.config.train.batch_size)


def add_value(host: Host, config: PPOConfig, policy: Stack, started: Stack) -> Stack:
    """The value function's stack: the policy with a head, a copy of the one reward run where its adapter is of the same
    kind (arXiv 2009.01325, appendix), or a fresh adapter with a zero head on what the policy started from."""
    if config.value.share:
        host.add_head(policy[-1], zero=True)
        return policy
    wanted = peft_config(config.value.adapter)
    (weight, source), *others = map(split_spec, config.reward)
    if not others and as_function(source) is None:
        adapter, meta = adapter_files.read(adapter_files.locate(source))
        if type(adapter.config) is type(wanted):
            stack = load_stack(host, VALUE, source, config.allow_base_mismatch)
            if config.rollout.normalise == "running":  # it is to predict rewards over their spread
                weight = 1 / (meta.get("reward", {}).get("std") or 1.0)
            host.head(VALUE).data.mul_(weight)
            return stack
    soft = not isinstance(wanted, LoraConfig)
    under = tuple(name for name in started if not soft or isinstance(host.configs[name], LoraConfig))  # one at a time
    add_fresh(host, VALUE, config.value.adapter, under)
    host.add_head(VALUE, zero=True)
    return (*under, VALUE)


def _say_roles(host: Host, policy: Stack, reference: Stack, value: Stack | None, rewards: Rewards) -> None:
    """Who acts where, in a line each."""
    kind = lambda stack: " + ".join(host.configs[name].peft_type.value for name in stack) or "the bare base"  # noqa: E731
    log(f"policy: {kind(policy)}; reference: {kind(reference)}; value: {kind(value) if value else 'none'}")
    for source, (weight, reward) in rewards.parts.items():
        what = kind(reward.stack) if isinstance(reward, RunReward) else "a function"
        log(f"reward: {weight:g} * {source} ({what})")
