"""The phases of each command that can be planned, in a dry run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lowalign.config.commands import BestOfNConfig
from lowalign.config.sections import Sampling
from lowalign.config.training import DPOConfig, PPOConfig, RewardConfig, RunConfig, SFTConfig
from lowalign.data.pack import Example
from lowalign.methods import ppo_round
from lowalign.methods.dpo import DPO
from lowalign.methods.kto import KTO
from lowalign.methods.ppo import PPO
from lowalign.methods.ppo_round import Roles
from lowalign.methods.reward_model import RewardModel
from lowalign.methods.rollout import Rollout
from lowalign.methods.sft import SFT
from lowalign.model.policy import POLICY, Stack
from lowalign.model.sampling.batcher import SampledModel
from lowalign.model.sampling.sample import prompt_tasks
from lowalign.plan import examples
from lowalign.plan.dry_run import UNBOUNDED, DryRun
from lowalign.plan.marks import ADAPTERS, KV_CACHE
from lowalign.plan.sampler import PlannedSampler
from lowalign.rewards.reward_run import TOKEN_BUDGET, score_examples

REWARD, VALUE = "reward", "value"
Config = RunConfig | BestOfNConfig


def run_phases(
    run: DryRun, config: Config, length: int, token_budget: int, micro_batch: Sequence[Example] | None = None
) -> int:
    """Run the phases of one step (PPO, best-of-n: of one round). -> the tokens by which its speed is measured: of the step,
    or those that are sampled.

    length: tokens of an example as --data.max-length counts them (ppo, best-of-n: of a prompt). micro_batch: of sft, dpo and
    reward; default: as many Examples of that length as fit in the token budget.
    """
    phases: dict[type, Callable[..., int]] = {
        SFTConfig: _sft, DPOConfig: _dpo, RewardConfig: _reward, PPOConfig: _ppo, BestOfNConfig: _best_of_n,
    }  # fmt: skip
    plan = next(plan for kind, plan in phases.items() if isinstance(config, kind))
    with run.counting():
        return plan(run, config, length, token_budget, *(() if micro_batch is None else (micro_batch,)))


def _sft(run: DryRun, config: SFTConfig, length: int, token_budget: int, batch: Sequence[Example] | None = None) -> int:
    policy, _ = run.add_policy(config)
    batch = batch or examples.as_many_as_fit(examples.conversation(length, _vocabulary(run)), token_budget)
    return _fixed_data(run, SFT(run.host, batch, policy, config.train), batch)


def _reward(
    run: DryRun, config: RewardConfig, length: int, token_budget: int, batch: Sequence[Example] | None = None
) -> int:
    policy, _ = run.add_policy(config)
    with torch.device(run.base.device):
        run.host.add_scalar_head(policy[-1])
    batch = batch or examples.as_many_as_fit(examples.preference(length, _vocabulary(run)), token_budget)
    return _fixed_data(run, RewardModel(run.host, batch, policy, config.reward, config.train), batch)


def _dpo(run: DryRun, config: DPOConfig, length: int, token_budget: int, batch: Sequence[Example] | None = None) -> int:
    policy, initial = run.add_policy(config)
    if config.dpo.loss == "kto":
        both = [examples.rated(length, _vocabulary(run), label) for label in (True, False)]
        batch = batch or (both * max(1, token_budget // both[0].length))[: max(1, token_budget // both[0].length)]
        method = KTO(run.host, batch, policy, initial, config.dpo, config.train)
    else:
        batch = batch or examples.as_many_as_fit(examples.preference(length, _vocabulary(run)), token_budget)
        method = DPO(run.host, batch, policy, initial, config.dpo, config.train)
    if config.reference_cache == "on" and method.needs_reference:
        batch = [replace(e, reference=[0.0] * len(e.completions)) for e in batch]
    return _fixed_data(run, method, batch)


def _fixed_data(run: DryRun, method, batch: Sequence[Example]) -> int:
    micro_batches = math.ceil(run.train.batch_size / len(batch))
    run.update(method, batch, micro_batches)
    return run.train.batch_size * batch[0].length


def _best_of_n(run: DryRun, config: BestOfNConfig, length: int, token_budget: int) -> int:
    run.add_adapter(POLICY, config.sft.adapter, frozen=True)
    run.add_adapter(REWARD, config.sft.adapter, head=True, frozen=True)
    _sample(run, (POLICY,), length, config.n, 1, config.sampling)
    _score(run, (REWARD,), length, config.n, 1, config)
    return config.n * config.sampling.max_new_tokens


def _ppo(run: DryRun, config: PPOConfig, length: int, token_budget: int) -> int:
    policy, initial = run.add_policy(config)
    value = None
    if config.ppo.advantage == "gae":
        value = policy if config.value.share else (VALUE,)
        if config.value.share:
            with torch.device(run.base.device):
                run.host.add_scalar_head(POLICY, zero=True)
        else:
            run.add_adapter(VALUE, config.value.adapter, head=True)
    rewards = [spec for spec in config.reward or ("run",) if ".py:" not in spec]
    stacks = [(f"{REWARD}{i}",) for i in range(len(rewards))]
    for (name,) in stacks:
        run.add_adapter(name, config.adapter, head=True, frozen=True)
    roles, rollouts = Roles(policy, initial, value), config.rollout
    method = PPO(run.host, roles, [], lambda *_: [], config)
    with run.meter.within(ADAPTERS):  # with gradients and working copy, as they are while a round is sampled
        for name in method.lr_multipliers:
            run.host.flat(name)
    _sample(run, policy, length, rollouts.samples, rollouts.prompts, config.sampling)
    for stack in stacks:
        _score(run, stack, length, rollouts.samples, rollouts.prompts, config)
    batch = _rollouts(run, config, length, token_budget)
    round_batches = math.ceil(rollouts.prompts / len(batch))
    with torch.no_grad():
        arguments = (run.host, roles, [batch], UNBOUNDED, config.sampling.temperature)
        run.measure("log-probs and values", lambda: ppo_round.compute_logps_and_values(*arguments), round_batches)
    for rollout in batch:
        rollout.advantages = rollout.returns = [torch.zeros_like(old) for old in rollout.old]
    steps = config.ppo.epochs * method.minibatches
    run.update(method, batch, config.ppo.epochs * round_batches / steps, steps)
    return rollouts.prompts * rollouts.samples * config.sampling.max_new_tokens


def _rollouts(run: DryRun, config: PPOConfig, length: int, token_budget: int) -> list[Rollout]:
    ids = examples.tokens(length + config.sampling.max_new_tokens, _vocabulary(run))
    completions = [ids[length:] for _ in range(config.rollout.samples)]
    size = length + len(completions) * len(completions[0])
    count = min(config.train.batch_size, max(1, token_budget // size))
    return [Rollout(ids[:length], completions, rewards=[0.0] * len(completions)) for _ in range(count)]


def _sample(run: DryRun, stack: Stack, length: int, samples: int, prompts: int, sampling: Sampling) -> None:
    """The phases "prompts" and "sampling" of a batch, as often as a round has such batches."""
    sampling = replace(sampling, top_p=1.0)  # a dry run has no likeliest tokens
    ids, host = examples.tokens(length, _vocabulary(run)), run.host
    with torch.no_grad(), host.use(*stack):
        sampled = SampledModel(host.base.model, (), host.soft_prompt())
        tasks = prompt_tasks(sampled, [ids] * prompts, samples, sampling, None)
        waiting = [(task, j) for task in tasks for j in range(samples)]
        sampler = PlannedSampler(sampled, sampling, waiting, sampling.max_rows)
        run.marks.after_layer = lambda: run.meter.assign(KV_CACHE, sampler.cache.tensors())
        run.measure("prompts", sampler.start)
        batches = len(waiting) / len(sampler.rows)
        run.phases[-1] = replace(run.phases[-1], repeats=batches)
        for generated, tokens in sampler.lengths().items():
            run.measure("sampling", lambda n=generated: sampler.token(n), tokens * batches)
        run.marks.after_layer = lambda: None


def _score(
    run: DryRun, stack: Stack, length: int, samples: int, prompts: int, config: PPOConfig | BestOfNConfig
) -> None:
    ids = examples.tokens(length + config.sampling.max_new_tokens, _vocabulary(run))
    budget = config.token_budget if isinstance(config, BestOfNConfig) else TOKEN_BUDGET
    example = Example(ids[:length], [ids[length:]] * samples)
    batch = [example] * min(prompts, max(1, budget // example.length))
    with torch.no_grad():
        score = lambda: score_examples(run.host, stack, batch, budget)  # noqa: E731
        run.measure("scoring", score, prompts / len(batch))


def _vocabulary(run: DryRun) -> int:
    return run.base.model.config.get_text_config().vocab_size
