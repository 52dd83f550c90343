"""PPO: the policy learns from its own scored samples (arXiv 1707.06347; 1909.08593; 2203.02155; 2403.17031).

L = -E min(ρ A, clip(ρ, 1-ε, 1+ε) A)  +  c_v E ½ max((V - R)², (V_clip - R)²)  +  β E k3(π, π_ref)  -  c_H E H(π)
    + γ E_pretraining -log π                            ρ = π/π_old; E: mean over the step's tokens (--ppo.loss-mean)

A round: sample completions of some prompts, then `epochs` passes over them in minibatches. Policy, reference, value and
reward are adapters on one base. The samples of a prompt share one forward, in which the prompt is computed once.
"""

import time
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from lowalign.config.training import PPOConfig
from lowalign.data.pack import Example, step_order, total_supervised, total_weight
from lowalign.methods import losses, ppo_round
from lowalign.methods.advantages import AdaptiveKL, RunningMoments
from lowalign.methods.ppo_loss import StepMeans, policy_loss, supervised_lengths
from lowalign.methods.ppo_round import Roles, ScoreFunction
from lowalign.methods.rollout import Rollout, from_tensors, supervised_values, to_tensors
from lowalign.methods.sft import weighted
from lowalign.model.host import Host


class PPO:
    """The method of `lowalign ppo`.

    prompts: token ids. score: completions -> rewards. ptx: rows whose own loss is added to every step. on_round: called
    with each new round: its number, the numbers of its prompts, and its rollouts; it may return more metrics of the round.
    Held-out prompts have the numbers from len(prompts) on.
    """

    def __init__(
        self,
        host: Host,
        roles: Roles,
        prompts: Sequence[Sequence[int]],
        score: ScoreFunction,
        config: PPOConfig,
        ptx: Sequence[Example] = (),
        on_round: Callable[[int, list[int], list[Rollout]], dict[str, float] | None] = lambda *_: None,
    ) -> None:
        self.host, self.roles, self.config = host, roles, config
        self.prompts, self.score, self.ptx, self.on_round = prompts, score, ptx, on_round
        self.lr_multipliers = {roles.policy[-1]: 1.0}
        if roles.value and roles.value != roles.policy:
            self.lr_multipliers[roles.value[-1]] = config.value.learning_rate
        self.token_budget = config.train.token_budget
        self.kl = AdaptiveKL(config.ppo.kl, config.ppo.kl_target, config.ppo.kl_horizon)
        self.moments = RunningMoments()
        self.value_bias = 0.0  # added to the value head's output; set in the first round
        self.rollouts: list[Rollout] = []
        self.round_metrics: dict[str, float] = {}
        self.round, self.first_step = -1, 0  # number of the round, and its first step
        self.last_step = -1  # step of the last `batch`
        self.last_metrics: dict[str, float] = {}
        self.step_started: tuple[float, int] | None = None  # time and number of tokens of the last `batch`
        self.speeds: dict[str, float] = {}  # of the last sampling, and of the last step
        self.unit_ratio_packs: set[tuple[int, ...]] = set()  # packs whose ratio must be 1 in the round's first step

    @property
    def minibatches(self) -> int:
        """Steps per epoch."""
        return self.config.rollout.prompts // self.config.train.batch_size

    def batch(self, step: int) -> list[Example]:
        """A minibatch of the round and rows of the pretraining mix. Samples a new round when the last one is over."""
        now = time.perf_counter()
        if self.step_started is not None:
            since, tokens = self.step_started
            self.speeds["training_tokens_per_second"] = tokens / (now - since)
        if self.round_over(step):
            self._start_round(step)
        at = step - self.first_step
        self.last_step, self.last_metrics = step, {}
        epoch, k = divmod(at, self.minibatches)
        size, seed = self.config.train.batch_size, self.config.train.seed
        order = step_order(self.minibatches, self.minibatches, seed + self.round, epoch)
        rollouts = self._minibatches(self._shuffled(epoch))[order[k]]
        ptx = [self.ptx[i] for i in step_order(len(self.ptx), size, seed, step)] if self.ptx else []
        self.step_started = time.perf_counter(), sum(e.length for e in (*rollouts, *ptx))
        return [*rollouts, *ptx]

    def epoch(self, steps: int) -> float:
        """Passes over the prompts, the present round included."""
        return (self.round + 1) * self.config.rollout.prompts / len(self.prompts)

    def round_over(self, step: int) -> bool:
        """Whether `step` begins a new round."""
        done = step - self.first_step >= self.config.ppo.epochs * self.minibatches
        return self.round < 0 or done or (step > self.last_step and self._kl_exceeded())

    def _kl_exceeded(self) -> bool:
        return 0 < self.config.ppo.target_kl < self.last_metrics.get("approx_kl", 0.0)

    def _shuffled(self, epoch: int) -> list[Rollout]:
        """The round's rollouts in the order that an epoch divides. It is the same in every epoch, so that each minibatch
        keeps its packs; with --ppo.reshuffle only the first epoch has it, whose first step is checked."""
        if not (self.config.ppo.reshuffle and epoch):
            return self.rollouts
        count = len(self.rollouts)
        return [self.rollouts[i] for i in step_order(count, count, self.config.train.seed + self.round, epoch)]

    def _minibatches(self, rollouts: list[Rollout]) -> list[list[Rollout]]:
        """The rollouts of each step of an epoch."""
        size = self.config.train.batch_size
        return [rollouts[k : k + size] for k in range(0, len(rollouts), size)]

    def _start_round(self, step: int) -> None:
        """Sample and score a new round. If that raises, the state stays that of the last finished step."""
        c, number = self.config, self.round + 1
        kl, moments = copy(self.kl), copy(self.moments)
        if self.rollouts:
            kl.update(self.round_metrics["kl"], len(self.rollouts) * c.rollout.samples)
        prompt_numbers = step_order(len(self.prompts), c.rollout.prompts, c.train.seed, number)
        since = time.perf_counter()
        rollouts = ppo_round.sample(self.host, self.roles, c, [self.prompts[i] for i in prompt_numbers], number)
        sampling_speed = sum(len(ids) for r in rollouts for ids in r.completions) / (time.perf_counter() - since)
        scores = self.score(prompt_numbers, [r.completions for r in rollouts])
        ppo_round.shape_rewards(rollouts, scores, c, moments)
        minibatches, temperature = self._minibatches(rollouts), c.sampling.temperature
        entropy, packs = ppo_round.compute_logps_and_values(
            self.host, self.roles, minibatches, self.token_budget, temperature
        )
        first = self.roles.value and self.round < 0
        bias = ppo_round.value_bias(rollouts, c, kl.beta) if first else self.value_bias
        ppo_round.set_advantages(rollouts, c, kl.beta, bias)
        self.speeds["sampling_tokens_per_second"] = sampling_speed
        metrics = ppo_round.round_metrics(rollouts, scores, kl.beta, entropy)
        metrics |= self.on_round(number, prompt_numbers, rollouts) or {}
        for rollout in rollouts:
            rollout.sampler_logps = []
        self.kl, self.moments, self.rollouts, self.round_metrics = kl, moments, rollouts, metrics
        self.round, self.first_step, self.unit_ratio_packs, self.value_bias = number, step, packs, bias

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Rollouts, their supervised tokens, their completions with such tokens, and the weight of the pretraining mix."""
        rollouts = [e for e in examples if isinstance(e, Rollout)]
        others = [e for e in examples if not isinstance(e, Rollout)]
        tokens, ptx = total_supervised(rollouts) or 1, total_weight(others) or 1
        completions = len(supervised_lengths(rollouts)) or 1
        return {"rollouts": len(rollouts), "tokens": tokens, "completions": completions, "ptx": ptx}

    def loss(self, examples: Sequence[Example], normalizers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch, as its share of the step's; it holds rollouts only, or pretraining rows only."""
        if not isinstance(examples[0], Rollout):
            return self._ptx_loss(examples, normalizers["ptx"])
        c, temperature = self.config.ppo, self.config.sampling.temperature
        own = ppo_round.policy_tokens(self.host, self.roles, examples, temperature, c.entropy > 0)
        gather = lambda rows: torch.cat([supervised_values(e, row) for e, row in zip(examples, rows, strict=True)])  # noqa: E731
        logp, old = gather(own.logps), gather([e.old for e in examples])
        self._assert_unit_ratio(examples, logp, old)
        advantage = gather([e.advantages for e in examples])
        lengths = torch.tensor(supervised_lengths(examples), device=logp.device)
        means = StepMeans(self.config, lengths, normalizers["tokens"], normalizers["completions"])
        mean = means.of_loss
        loss, metrics = policy_loss(logp, old, advantage, means)
        with torch.no_grad():
            log_ratio = logp - old
            kl = log_ratio.exp() - 1 - log_ratio
        metrics["approx_kl"] = means.over_tokens(kl)
        if self.roles.value:
            value = gather(ppo_round.value_function(self.host, self.roles, examples, own)) + self.value_bias
            old_value, target = gather([e.values for e in examples]), gather([e.returns for e in examples])
            errors = losses.clipped_value(value, old_value, target, c.value_clip)
            error = mean(errors)
            loss = loss + c.value_coef * error
            held = (errors > 0.5 * (value - target) ** 2).float()
            metrics |= {"value_loss": error.detach(), "value_clipfrac": means.over_tokens(held).detach()}
        if c.kl_in_loss:
            loss = loss + self.kl.beta * mean(losses.k3(logp, gather([e.reference_logps for e in examples])))
        if c.entropy:
            loss = loss - c.entropy * mean(gather(own.entropies))
        # So that summed over micro-batches they are the round's metrics.
        share = len(examples) / normalizers["rollouts"]
        for name, value in (self.round_metrics | self.speeds).items():
            metrics[name] = torch.tensor(value if name.endswith("_max") else value * share)
        return loss, metrics | {"loss": loss.detach()}

    @torch.no_grad()
    def evaluate(self, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
        """Sample one completion of each held-out prompt, with the same random numbers every time -> metrics, among them
        `reward`, the mean score."""
        samples = ppo_round.generate(self.host, self.roles, self.config, prompts, 1, range(len(prompts)))
        numbers = list(range(len(self.prompts), len(self.prompts) + len(prompts)))
        scores = [values[0] for values in self.score(numbers, [[c.ids for c in group] for group in samples])]
        first = [group[0] for group in samples]
        return {
            "reward": sum(scores) / len(scores),
            "reward_std": ppo_round.std(scores),
            "length": sum(len(c.ids) for c in first) / len(first),
            "eos_share": sum(c.stopped for c in first) / len(first),
        }

    def evaluation_due(self, step: int) -> bool:
        """Whether the last of --rollout.eval-every rounds ended before `step`."""
        every = self.config.rollout.eval_every
        return every > 0 and self.round >= 0 and self.round_over(step) and (self.round + 1) % every == 0

    def _ptx_loss(self, examples: Sequence[Example], weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        with self.host.use(*self.roles.policy):
            logps = self.host.logprobs(examples, supervised_only=True)
        nll = losses.negative_log_likelihood(weighted(logps, examples), weight)
        loss = self.config.ppo.ptx_coef * nll
        return loss, {"loss": loss.detach(), "ptx_loss": nll.detach()}

    def _assert_unit_ratio(self, examples: Sequence[Example], logp: Tensor, old: Tensor) -> None:
        """In a round's first step the policy is still the one that sampled. In the same pack log-probs have the same bits."""
        first = self.last_step == self.first_step and tuple(map(id, examples)) in self.unit_ratio_packs
        if first and not torch.equal(logp.detach(), old):
            worst = (logp.detach() - old).abs().max().item()
            raise RuntimeError(f"before a round's first step the ratio must be 1; log-probs differ by {worst:.1e}")

    def state(self) -> dict[str, Any]:
        """The round, its rollouts and statistics."""
        m = self.moments
        numbers = {  # the keys stay as they are: they are in the checkpoints of users
            "round": self.round,
            "began": self.first_step,
            "asked": self.last_step,
            "approx_kl": self.last_metrics.get("approx_kl", 0.0),
            "told": self.round_metrics,
            "kl_coef": self.kl.beta,
            "bias": self.value_bias,
            "moments": [m.count, m.mean, m.m2],
        }
        return numbers | (to_tensors(self.rollouts) if self.rollouts else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.round, self.first_step, self.last_step = state["round"], state["began"], state["asked"]
        self.last_metrics, self.round_metrics = {"approx_kl": state["approx_kl"]}, state["told"]
        self.kl.beta, self.value_bias, self.moments = state["kl_coef"], state["bias"], RunningMoments(*state["moments"])
        self.rollouts = from_tensors(state, self.host.base.device) if "ids" in state else []
