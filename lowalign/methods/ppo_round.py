"""A round of PPO before its updates: sample, score, compare with the reference, compute advantages.

    reward of token t    r_t = -β (log π - log π_ref)(y_t) + [t is the last] (R(x, y) - penalties)     arXiv 1909.08593 eq. 2
    gae                  A_t from r and V                                                             arXiv 1506.02438
    group, rloo          A_t = the completion's reward compared with the other samples of its prompt

Old log-probs, reference log-probs and values are computed in the packs that the updates train on, not while sampling,
which differs by up to 0.03 in 16 bit. So in the first step the ratio is exactly 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowalign import processes
from lowalign.config.training import PPOConfig
from lowalign.data.micro_batches import in_micro_batches, own_share
from lowalign.errors import UserError
from lowalign.methods.advantages import RunningMoments, gae, group, rloo, whiten
from lowalign.methods.rollout import Rollout, supervised_values
from lowalign.model.forward.packed import TokenOutputs, TokenRequest
from lowalign.model.host import Host
from lowalign.model.policy import Stack
from lowalign.model.sampling.batcher import Completion

ScoreFunction = Callable[[Sequence[int], list[list[list[int]]]], list[list[float]]]
"""The numbers of the prompts, and for each the ids of its completions -> for each prompt its completions' rewards."""


@dataclass(frozen=True)
class Roles:
    """Stacks of adapters on one base. value: its last adapter has the scalar head; the policy's stack when the head is
    on the policy, None without a value function."""

    policy: Stack
    reference: Stack
    value: Stack | None

    @property
    def shared(self) -> bool:
        """Whether the value head is on the policy."""
        return self.value == self.policy


def sample(host: Host, roles: Roles, config: PPOConfig, prompts: Sequence[Sequence[int]], number: int) -> list[Rollout]:
    """Completions of these prompts under the policy in round `number`."""
    n = config.rollout.samples
    # Seeds by round and place: a prompt gets new samples in each round, and twice in a round that repeats it.
    seeds = range(number * len(prompts), (number + 1) * len(prompts))
    samples = generate(host, roles, config, prompts, n, seeds)
    rollouts = []
    for prompt, completions in zip(prompts, samples, strict=True):
        masks = [[c.stopped or config.rollout.missing_eos != "mask"] * len(c.ids) for c in completions]
        stopped = [c.stopped for c in completions]
        logps = [c.logprobs for c in completions]
        rollouts.append(
            Rollout(list(prompt), [c.ids for c in completions], masks, stopped=stopped, sampler_logps=logps)
        )
    if config.rollout.missing_eos != "keep" and not any(s for r in rollouts for s in r.stopped):
        raise UserError(
            f"none of the {n * len(rollouts):,} completions of this round ended within {config.sampling.max_new_tokens} tokens; "
            "raise --sampling.max-new-tokens, start from an SFT run that ends its answers (--init), or allow it with "
            "--rollout.missing-eos keep"
        )
    return rollouts


def generate(
    host: Host, roles: Roles, config: PPOConfig, prompts: Sequence[Sequence[int]], n: int, seeds: Sequence[int]
) -> list[list[Completion]]:
    """n completions of each prompt under the policy; each process samples its share."""
    own = processes.share([len(prompt) for prompt in prompts])
    with host.use(*roles.policy):
        samples = host.generate([prompts[i] for i in own], n, config.sampling, [seeds[i] for i in own])
    if processes.count() == 1:
        return samples
    plain = [[(c.ids, c.logprobs.tolist(), c.stopped) for c in group] for group in samples]
    whole = processes.gather_shares(own, plain, len(prompts))
    return [[Completion(ids, torch.tensor(logps), stopped) for ids, logps, stopped in group] for group in whole]


def shape_rewards(
    rollouts: Sequence[Rollout], scores: Sequence[Sequence[float]], config: PPOConfig, moments: RunningMoments
) -> None:
    """Set each completion's reward: its score, normalised and clipped, minus the penalties; or what replaces it."""
    c = config.rollout
    if c.normalise == "running":
        moments.update([x for values in scores for x in values])
    for r, values in zip(rollouts, scores, strict=True):
        r.rewards = []
        for value, ids, stopped in zip(values, r.completions, r.stopped, strict=True):
            value = value / moments.std if c.normalise == "running" else value
            value = max(-c.reward_clip, min(c.reward_clip, value)) if c.reward_clip else value
            value -= c.eos_penalty if c.missing_eos == "penalise" and not stopped else 0.0
            value -= c.length_penalty * len(ids)
            r.rewards.append(c.eos_score if c.missing_eos == "replace" and not stopped else value)


@torch.no_grad()
def compute_logps_and_values(
    host: Host, roles: Roles, minibatches: Sequence[Sequence[Rollout]], token_budget: int, temperature: float
) -> tuple[float, set[tuple[int, ...]]]:
    """Set old and reference log-probs and values, in the micro-batches (and so the packs) of the updates.

    -> the policy's mean entropy in nats per token, and the micro-batches, each as the id() of its rollouts.
    """
    entropies, packs = [], set()

    def compute(rollouts: list[Rollout]) -> None:
        own = policy_tokens(host, roles, rollouts, temperature, entropy=True)
        with host.use(*roles.reference):
            reference = host.logprobs(rollouts, supervised_only=True, temperature=temperature)
        values = value_function(host, roles, rollouts, own)
        for i, r in enumerate(rollouts):
            r.old, r.reference_logps = own.logps[i], reference[i]
            r.values = values[i] if values else []
        entropies.extend(e.sum().item() for row in own.entropies for e in row)
        packs.add(tuple(map(id, rollouts)))

    for minibatch in minibatches:
        in_micro_batches(own_share(minibatch), token_budget, compute)
    rollouts = [r for minibatch in minibatches for r in minibatch]
    if processes.count() > 1:
        _exchange(rollouts, host.base.device)
    tokens = sum(r.supervised for r in rollouts)
    return sum(processes.gather(sum(entropies))) / max(1, tokens), packs


def _exchange(rollouts: Sequence[Rollout], device: torch.device) -> None:
    """Give every rollout the log-probs and values that one of the processes has computed."""
    names = ("old", "reference_logps", "values")
    own = [i for i, r in enumerate(rollouts) if r.old]
    values = [[[t.tolist() for t in getattr(rollouts[i], name)] for name in names] for i in own]
    for r, by_name in zip(rollouts, processes.gather_shares(own, values, len(rollouts)), strict=True):
        for name, tensors in zip(names, by_name, strict=True):
            setattr(r, name, [torch.tensor(t, device=device) for t in tensors])


def policy_tokens(
    host: Host, roles: Roles, rollouts: Sequence[Rollout], temperature: float, entropy: bool
) -> TokenOutputs:
    """Log-probs under the policy, with `entropy` its entropies, and the values if the value head is on the policy."""
    with host.use(*roles.policy):
        head = host.scalar_head(roles.value[-1]) if roles.shared else None
        request = TokenRequest(entropy=entropy, scalar_head=head, supervised_only=True, temperature=temperature)
        return host.tokens(rollouts, request)


def value_function(
    host: Host, roles: Roles, rollouts: Sequence[Rollout], own: TokenOutputs
) -> list[list[Tensor]] | None:
    """V(s_t): for each rollout, for each completion, (its length,). None without a value function. own: policy_tokens."""
    if roles.shared or not roles.value:
        return own.values
    with host.use(*roles.value):
        request = TokenRequest(logps=False, scalar_head=host.scalar_head(roles.value[-1]), supervised_only=True)
        return host.tokens(rollouts, request).values


def value_bias(rollouts: Sequence[Rollout], config: PPOConfig, beta: float) -> float:
    """The constant b that makes V + b right on average: the mean over all supervised tokens of return - V.

    A value function that starts at 0 is clipped, so it needs rounds to learn the level of the rewards. Until then GAE
    would over-credit late tokens.
    """
    errors = []
    for r in rollouts:
        returns = [gae(x, torch.zeros_like(x), config.ppo.gamma, 1.0)[1] for x in _rewards(r, config, beta)]
        errors.append(supervised_values(r, returns) - supervised_values(r, r.values))
    return torch.cat(errors).mean().item()


def set_advantages(rollouts: Sequence[Rollout], config: PPOConfig, beta: float, bias: float = 0.0) -> None:
    """Set advantages, and with gae the values (plus bias) and the returns that the value function is trained on."""
    c = config.ppo
    for r in rollouts:
        if c.advantage == "gae":
            r.values = [v + bias for v in r.values]
            pairs = [gae(x, v, c.gamma, c.gae_lambda) for x, v in zip(_rewards(r, config, beta), r.values, strict=True)]
            r.advantages, r.returns = [a for a, _ in pairs], [ret for _, ret in pairs]
        else:
            totals = torch.stack([x.sum() for x in _rewards(r, config, beta)])
            advantages = group(totals, c.group_std) if c.advantage == "group" else rloo(totals)
            r.advantages = [torch.full_like(o, x) for o, x in zip(r.old, advantages.tolist(), strict=True)]
    if c.advantage == "gae" and c.whiten:
        white = iter(whiten([a[torch.tensor(r.mask(i))] for r in rollouts for i, a in enumerate(r.advantages)]))
        for r in rollouts:
            for i, a in enumerate(r.advantages):
                a[torch.tensor(r.mask(i))] = next(white)


def round_metrics(
    rollouts: Sequence[Rollout], scores: Sequence[Sequence[float]], beta: float, entropy: float
) -> dict[str, float]:
    """Metrics of the round, which each of its steps logs. kl is the sum over a completion in nats, length in tokens."""
    completions = [(i, r) for r in rollouts for i in range(len(r.completions))]
    flat_scores = [x for values in scores for x in values]
    lengths = [len(r.completions[i]) for i, r in completions]
    ended = sum(r.stopped[i] for i, r in completions) / len(completions)
    supervised = [(i, r) for i, r in completions if any(r.mask(i))]  # the others have no log-probs
    kl = [(r.old[i] - r.reference_logps[i]).sum().item() for i, r in supervised]
    metrics = {
        "reward": sum(flat_scores) / len(flat_scores),
        "reward_std": std(flat_scores),
        "reward_earned": sum(x for r in rollouts for x in r.rewards) / len(flat_scores),
        "kl": sum(kl) / len(kl),
        "kl_coef": beta,
        "entropy": entropy,
        "length": sum(lengths) / len(lengths),
        "eos_share": ended,
        "truncated_share": 1 - ended,
    }
    if rollouts[0].returns:
        returns = torch.cat([supervised_values(r, r.returns) for r in rollouts])
        values = torch.cat([supervised_values(r, r.values) for r in rollouts])
        spread = returns.var().item() if len(returns) > 1 else 0.0
        metrics["explained_variance"] = 1 - (returns - values).var().item() / spread if spread else 0.0
    return metrics | _spread_of_groups(rollouts) | _sampler_difference(rollouts)


def _spread_of_groups(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Of the rewards R of a prompt's completions: mean standard deviation, and share of the prompts without any."""
    if len(rollouts[0].rewards) < 2:
        return {}
    equal = sum(max(r.rewards) == min(r.rewards) for r in rollouts)
    return {
        "group_std": sum(std(r.rewards) for r in rollouts) / len(rollouts),
        "zero_std_share": equal / len(rollouts),
    }


def _sampler_difference(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """|log π_sampler - log π_old| over the supervised tokens, before any update: the sampler's rounding alone."""
    pairs = [(supervised_values(r, r.sampler_logps), supervised_values(r, r.old)) for r in rollouts if r.sampler_logps]
    differences = [(sampler - old.cpu()).abs() for sampler, old in pairs]
    flat = torch.cat(differences) if differences else torch.zeros(0)
    if not len(flat):
        return {}
    return {"sampler_difference": flat.mean().item(), "sampler_difference_max": flat.max().item()}


def std(values: Sequence[float]) -> float:
    """Standard deviation (n - 1); 0 for a single value."""
    mean = sum(values) / len(values)
    return (sum((x - mean) ** 2 for x in values) / max(1, len(values) - 1)) ** 0.5


def _rewards(rollout: Rollout, config: PPOConfig, beta: float) -> list[Tensor]:
    """r_t of each completion: each token's KL penalty, plus the completion's reward on the last token."""
    if config.ppo.kl_in_loss:
        beta = 0.0
    rewards = [-beta * (old - ref) for old, ref in zip(rollout.old, rollout.reference_logps, strict=True)]
    for per_token, reward in zip(rewards, rollout.rewards, strict=True):
        per_token[-1] += reward
    return rewards
