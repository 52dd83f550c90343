"""PPO: the policy samples, is scored, and learns from what it did (arXiv 1707.06347; 1909.08593; 2203.02155; 2403.17031).

L = -E min(ρ A, clip(ρ, 1-ε, 1+ε) A)  +  c_v E ½ max((V - R)², (V_clip - R)²)  +  β E k3(π, π_ref)  -  c_H E H(π)
    + γ E_pretraining -log π                                                    ρ = π/π_old, means over the step's tokens

A round: sample completions of some prompts, then `epochs` passes over them in minibatches. Policy, reference, value and
reward are adapters on one base; the samples of a prompt go through the model together, the prompt once.
"""

import time
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from lowalign.config.training import PPOConfig
from lowalign.data.pack import Example, step_order, total_supervised
from lowalign.methods import losses, ppo_round
from lowalign.methods.advantages import AdaptiveKL, RunningMoments
from lowalign.methods.ppo_round import Roles, ScoreFunction
from lowalign.methods.rollout import Rollout, from_tensors, supervised, to_tensors
from lowalign.model.forward.packed import TokenRequest
from lowalign.model.host import Host


class PPO:
    """The method of `lowalign ppo`.

    prompts: token ids. score: what completions earn. ptx: rows whose own loss is mixed into every step. tell: is given
    each new round: its number, the numbers of its prompts, and its rollouts.
    """

    def __init__(
        self,
        host: Host,
        roles: Roles,
        prompts: Sequence[Sequence[int]],
        score: ScoreFunction,
        config: PPOConfig,
        ptx: Sequence[Example] = (),
        tell: Callable[[int, list[int], list[Rollout]], None] = lambda *_: None,
    ) -> None:
        self.host, self.roles, self.config = host, roles, config
        self.prompts, self.score, self.ptx, self.tell = prompts, score, ptx, tell
        self.lr_multipliers = {roles.policy[-1]: 1.0}
        if roles.value and roles.value != roles.policy:
            self.lr_multipliers[roles.value[-1]] = config.value.learning_rate
        self.token_budget = config.train.token_budget
        self.kl = AdaptiveKL(config.ppo.kl, config.ppo.kl_target, config.ppo.kl_horizon)
        self.moments = RunningMoments()
        self.bias = 0.0  # what is added to the value head's numbers, from the first round on
        self.rollouts: list[Rollout] = []
        self.told: dict[str, float] = {}  # the round in numbers
        self.round, self.began = -1, 0  # its number, and the step it began with
        self.asked = -1  # the step that batch was last asked for
        self.moved: dict[int, float] = {}  # its approx_kl by example, some of which may come again when memory runs out
        self.given: tuple[float, int] | None = None  # when the last step was handed out, and its tokens
        self.speeds: dict[str, float] = {}  # of the last sampling, and of the step before without any
        self.packs: set[tuple[int, ...]] = set()  # packs whose ratio must be 1 in the first step

    @property
    def minibatches(self) -> int:
        """Steps of an epoch."""
        return self.config.rollout.prompts // self.config.train.batch_size

    def batch(self, step: int) -> list[Example]:
        """A minibatch of the round, and the rows of the pretraining mix; samples anew when a round begins."""
        now = time.perf_counter()
        if self.given is not None:
            since, tokens = self.given
            self.speeds["training_tokens_per_second"] = tokens / (now - since)
        at = step - self.began
        if self.round < 0 or at >= self.config.ppo.epochs * self.minibatches or (step > self.asked and self._too_far()):
            self._begin(step)
            at = 0
        self.asked, self.moved = step, {}
        epoch, k = divmod(at, self.minibatches)
        rollouts = self._cut(self.rollouts)[self._order(epoch)[k]]
        size = self.config.train.batch_size
        seed = self.config.train.seed
        ptx = [self.ptx[i] for i in step_order(len(self.ptx), size, seed, step)] if self.ptx else []
        self.given = time.perf_counter(), sum(e.length for e in (*rollouts, *ptx))
        return [*rollouts, *ptx]

    def _too_far(self) -> bool:
        return 0 < self.config.ppo.target_kl < sum(self.moved.values())

    def _cut(self, rollouts: list[Rollout]) -> list[list[Rollout]]:
        """A round's minibatches. They stay what they are, so each keeps its packs; only their order changes."""
        size = self.config.train.batch_size
        return [rollouts[k : k + size] for k in range(0, len(rollouts), size)]

    def _order(self, epoch: int) -> list[int]:
        """In which order the minibatches of the round are trained on."""
        return step_order(self.minibatches, self.minibatches, self.config.train.seed + self.round, epoch)

    def _begin(self, step: int) -> None:
        """A new round, as a whole or not at all: where the score fails, the state is that of the last finished step."""
        c, number = self.config, self.round + 1
        kl, moments = copy(self.kl), copy(self.moments)
        if self.rollouts:
            kl.update(self.told["kl"], len(self.rollouts) * c.rollout.samples)
        asked = step_order(len(self.prompts), c.rollout.prompts, c.train.seed, number)
        since = time.perf_counter()
        found = ppo_round.sample(self.host, self.roles, c, [self.prompts[i] for i in asked], number)
        drawn = sum(len(ids) for r in found for ids in r.completions) / (time.perf_counter() - since)
        raw = self.score(asked, [r.completions for r in found])
        ppo_round.shape_rewards(found, raw, c, moments)
        minibatches = self._cut(found)
        how = self.token_budget, c.sampling.temperature
        entropy, packs = ppo_round.compute_logps_and_values(self.host, self.roles, minibatches, *how)
        bias = ppo_round.value_bias(found, c, kl.beta) if self.roles.value and self.round < 0 else self.bias
        ppo_round.advantages(found, c, kl.beta, bias)
        self.speeds["sampling_tokens_per_second"] = drawn
        told = ppo_round.round_metrics(found, raw, kl.beta, entropy)
        self.tell(number, asked, found)
        self.kl, self.moments, self.rollouts, self.told = kl, moments, found, told
        self.round, self.began, self.packs, self.bias = number, step, packs, bias

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Rollouts, their tokens, and those of the pretraining mix."""
        rollouts = [e for e in examples if isinstance(e, Rollout)]
        others = [e for e in examples if not isinstance(e, Rollout)]
        tokens, ptx = total_supervised(rollouts) or 1, total_supervised(others) or 1
        return {"rollouts": len(rollouts), "tokens": tokens, "ptx": ptx}

    def loss(self, examples: Sequence[Example], normalizers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the step's loss; it is all rollouts, or all pretraining rows."""
        if not isinstance(examples[0], Rollout):
            return self._ptx_loss(examples, normalizers["ptx"])
        c, shared = self.config.ppo, self.roles.value == self.roles.policy
        with self.host.use(*self.roles.policy):
            head = self.host.head(self.roles.value[-1]) if shared else None
            temperature = self.config.sampling.temperature
            wanted = TokenRequest(entropy=c.entropy > 0, head=head, supervised_only=True, temperature=temperature)
            own = self.host.tokens(examples, wanted)
        gather = lambda rows: torch.cat([supervised(e, row) for e, row in zip(examples, rows, strict=True)])  # noqa: E731
        logp, old = gather(own.logps), gather([e.old for e in examples])
        self._assert_start(examples, logp, old)
        advantage = gather([e.advantages for e in examples])
        mean = lambda values: values.sum() / normalizers["tokens"]  # noqa: E731
        loss = surrogate = mean(losses.clipped_surrogate(logp, old, advantage, c.clip, c.dual_clip))
        with torch.no_grad():
            log_ratio = logp - old
            moved = log_ratio.exp() - 1 - log_ratio
            clipped = mean(((log_ratio.exp() - 1).abs() > c.clip).float())
        metrics = {"policy_loss": surrogate.detach(), "approx_kl": mean(moved), "clipfrac": clipped}
        if c.target_kl:
            parts = torch.stack([part.sum() for part in moved.split([e.supervised for e in examples])])
            self.moved |= zip(map(id, examples), (parts / normalizers["tokens"]).tolist(), strict=True)
        if self.roles.value:
            values = own.values if shared else ppo_round.value_function(self.host, self.roles, examples)
            value = gather(values) + self.bias
            error = mean(losses.clipped_value(value, gather([e.values for e in examples]), gather([e.returns for e in examples]), c.value_clip))  # fmt: skip
            loss = loss + c.value_coef * error
            metrics["value_loss"] = error.detach()
        if c.kl_in == "loss":
            loss = loss + self.kl.beta * mean(losses.k3(logp, gather([e.reference_logps for e in examples])))
        if c.entropy:
            loss = loss - c.entropy * mean(gather(own.entropies))
        share = len(examples) / normalizers["rollouts"]  # the round's numbers, so that they add up to themselves
        metrics |= {name: torch.tensor(value * share) for name, value in (self.told | self.speeds).items()}
        return loss, metrics | {"loss": loss.detach()}

    def _ptx_loss(self, examples: Sequence[Example], tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        with self.host.use(*self.roles.policy):
            logps = self.host.logprobs(examples, supervised_only=True)
        nll = losses.negative_log_likelihood([torch.cat(row) for row in logps], tokens)
        loss = self.config.ppo.ptx_coef * nll
        return loss, {"loss": loss.detach(), "ptx_loss": nll.detach()}

    def _assert_start(self, examples: Sequence[Example], logp: Tensor, old: Tensor) -> None:
        """Until the first step of a round the policy is the one that sampled: bit for bit, in the same pack."""
        if self.asked == self.began and tuple(map(id, examples)) in self.packs and not torch.equal(logp.detach(), old):
            worst = (logp.detach() - old).abs().max().item()
            raise RuntimeError(f"before a round's first step the ratio must be 1; log-probs differ by {worst:.1e}")

    def state(self) -> dict[str, Any]:
        """The round, its rollouts and statistics."""
        m = self.moments
        numbers = {"round": self.round, "began": self.began, "asked": self.asked}
        numbers |= {
            "approx_kl": sum(self.moved.values()),
            "told": self.told,
            "kl_coef": self.kl.beta,
            "bias": self.bias,
            "moments": [m.count, m.mean, m.m2],
        }
        return numbers | (to_tensors(self.rollouts) if self.rollouts else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.round, self.began, self.asked = state["round"], state["began"], state["asked"]
        self.moved, self.told = {0: state["approx_kl"]}, state["told"]
        self.kl.beta, self.bias, self.moments = state["kl_coef"], state["bias"], RunningMoments(*state["moments"])
        self.rollouts = from_tensors(state, self.host.base.device) if "ids" in state else []
