"""PPO's arithmetic: against numbers worked by hand, and against the formulas written out in fp64."""

import math
import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lowalign.config.training import PPOConfig, PPOLossConfig, RolloutConfig
from lowalign.methods import losses, ppo_round
from lowalign.methods.advantages import AdaptiveKL, RunningMoments, gae, group, rloo, whiten
from lowalign.methods.rollout import Rollout, from_tensors, to_tensors


def config(rollout=None, **ppo) -> PPOConfig:
    return PPOConfig(model="", out=None, rollout=RolloutConfig(**rollout or {}), ppo=PPOLossConfig(**ppo))


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- advantages -------------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    advantages, returns = gae(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.2, 0.4]), gamma=0.9, gae_lambda=0.8)
    # δ = 0.9·0.2 - 0.5, 0.9·0.4 - 0.2, 1 - 0.4 = -0.32, 0.16, 0.6;  A = δ_t + 0.72 A_t+1
    assert advantages.tolist() == pytest.approx([0.10624, 0.592, 0.6])
    assert returns.tolist() == pytest.approx([0.60624, 0.792, 1.0])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.97, 0.0), (0.97, 1.0)])
def test_gae_is_the_double_sum(gamma, lam):
    """A_t = Σ_l (γλ)^l δ_(t+l): no recursion."""
    rewards, values = draw(9), draw(9, seed=1)
    at = lambda t: values[t].item() if t < 9 else 0.0  # noqa: E731
    delta = [rewards[t].item() + gamma * at(t + 1) - at(t) for t in range(9)]
    want = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, 9)) for t in range(9)]
    advantages, returns = gae(rewards, values, gamma, lam)
    assert advantages.tolist() == pytest.approx(want, rel=1e-12)
    assert returns.tolist() == pytest.approx([a + at(t) for t, a in enumerate(want)], rel=1e-12)
    if lam == 1.0:  # then the returns are the discounted rewards to go, whatever the values
        to_go = [sum(gamma ** (k - t) * rewards[k].item() for k in range(t, 9)) for t in range(9)]
        assert returns.tolist() == pytest.approx(to_go, rel=1e-9)


def test_whitening_is_over_all_tokens():
    first, second = whiten([torch.tensor([1.0, 3.0]), torch.tensor([5.0])])
    assert first.tolist() == pytest.approx([-1.0, 0.0]) and second.tolist() == pytest.approx([1.0])  # mean 3, spread 2
    values = [draw(7) * 3 + 1, draw(2, seed=1), draw(11, seed=2)]
    white = torch.cat(whiten(values)).tolist()
    everything = torch.cat(values).tolist()
    mean, spread = statistics.fmean(everything), statistics.stdev(everything)
    assert white == pytest.approx([(v - mean) / spread for v in everything], rel=1e-7)
    assert whiten([torch.tensor([4.0])])[0].item() == 4.0  # a single token has no spread


def test_group():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])  # mean 1/2, variance 4 · (1/4) / 3 = 1/3
    side = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert group(rewards).tolist() == pytest.approx([side, -side, -side, side])
    assert group(rewards, std=False).tolist() == [0.5, -0.5, -0.5, 0.5]
    assert group(torch.full((4,), 0.1)).tolist() == pytest.approx([0.0] * 4, abs=1e-3)  # nothing to choose between


def test_rloo_compares_with_the_others():
    assert rloo(torch.tensor([1.0, 0.0, 0.0])).tolist() == pytest.approx([1.0, -0.5, -0.5])
    rewards = draw(6)
    others = [statistics.fmean(rewards[torch.arange(6) != i].tolist()) for i in range(6)]
    assert rloo(rewards).tolist() == pytest.approx([r - o for r, o in zip(rewards.tolist(), others, strict=True)])


# -- losses -----------------------------------------------------------------------------------------------------------


def surrogate_by_cases(ratio: float, a: float, clip: float, dual: float) -> tuple[float, float]:
    """(loss, its derivative by log π) of one token."""
    if a >= 0:
        return (-ratio * a, -ratio * a) if ratio < 1 + clip else (-(1 + clip) * a, 0.0)
    if ratio < 1 - clip:
        return -(1 - clip) * a, 0.0
    return (-dual * a, 0.0) if dual and ratio > dual else (-ratio * a, -ratio * a)


@pytest.mark.parametrize("dual", [0.0, 1.5])
def test_clipped_surrogate(dual):
    ratios = [0.2, 0.79, 0.81, 1.0, 1.19, 1.21, 1.49, 1.51, 4.0]
    cells = [(r, a) for r in ratios for a in (-2.0, -0.3, 0.7, 3.0)]
    old = draw(len(cells))
    logp = (old + torch.tensor([r for r, _ in cells], dtype=torch.float64).log()).requires_grad_()
    advantage = torch.tensor([a for _, a in cells], dtype=torch.float64)
    loss = losses.clipped_surrogate(logp, old, advantage, 0.2, dual)
    loss.sum().backward()
    want = [surrogate_by_cases(r, a, 0.2, dual) for r, a in cells]
    assert loss.tolist() == pytest.approx([value for value, _ in want], rel=1e-12)
    assert logp.grad.tolist() == pytest.approx([slope for _, slope in want], rel=1e-12)


def test_the_upper_bound_of_its_own():
    """DAPO's clip-higher, by cases: a ratio between 1.2 and 1.5 is clipped only where the bound is 1.2."""
    ratios = [0.5, 0.79, 0.81, 1.0, 1.21, 1.4, 1.49, 1.51, 3.0]
    cells = [(r, a) for r in ratios for a in (-2.0, 0.7)]
    old = draw(len(cells))
    logp = (old + torch.tensor([r for r, _ in cells], dtype=torch.float64).log()).requires_grad_()
    advantage = torch.tensor([a for _, a in cells], dtype=torch.float64)
    loss = losses.clipped_surrogate(logp, old, advantage, 0.2, clip_high=0.5)
    loss.sum().backward()
    want = [-min(r * a, min(max(r, 0.8), 1.5) * a) for r, a in cells]
    slope = [0.0 if (a > 0 and r > 1.5) or (a < 0 and r < 0.8) else -r * a for r, a in cells]
    assert loss.tolist() == pytest.approx(want, rel=1e-12)
    assert logp.grad.tolist() == pytest.approx(slope, rel=1e-12)


def test_the_ratio_of_a_sequence():
    """GSPO: with one advantage a completion, value and gradient are those of s = (π(y)/π_old(y))^(1/|y|), as its section 4.1 has it;
    with one for each token, a token's gradient is s A ∇log π of its own (section 4.3)."""
    lengths = [3, 1, 4]
    new, old = draw(8).requires_grad_(), draw(8, seed=1)
    log_ratio = losses.sequence_log_ratio(new - old, torch.tensor(lengths))
    starts = [0, 3, 4, 8]
    parts = [slice(a, b) for a, b in pairwise(starts)]
    s = [math.exp(sum((new[t] - old[t]).item() for t in range(a, b)) / (b - a)) for a, b in pairwise(starts)]
    per_token = [value for value, n in zip(s, lengths, strict=True) for _ in range(n)]
    assert log_ratio.exp().tolist() == pytest.approx(per_token, rel=1e-12)
    advantages = torch.tensor([0.3] * 3 + [-2.0] + [1.7] * 4, dtype=torch.float64)
    (got,) = torch.autograd.grad(losses.sequence_mean(log_ratio.exp() * advantages, torch.tensor(lengths), 3), new)
    other = new.detach().clone().requires_grad_()
    whole = sum((other[p] - old[p]).mean().exp() * advantages[p][0] for p in parts) / 3
    (want,) = torch.autograd.grad(whole, other)
    assert got.tolist() == pytest.approx(want.tolist(), rel=1e-12)
    own = draw(8, seed=2)
    (got,) = torch.autograd.grad((losses.sequence_log_ratio(new - old, torch.tensor(lengths)).exp() * own).sum(), new)
    assert got.tolist() == pytest.approx([x * a for x, a in zip(per_token, own.tolist(), strict=True)], rel=1e-12)


def test_the_mean_of_sequences():
    values, lengths = draw(8), [3, 1, 4]
    want = (sum(values[:3].tolist()) / 3 + values[3].item() + sum(values[4:].tolist()) / 4) / 5
    assert losses.sequence_mean(values, torch.tensor(lengths), 5).item() == pytest.approx(want, rel=1e-12)


def test_clipped_value():
    # V_old = 0, R = 1: within ±0.2 the error itself; beyond, the worse of it and of the clipped value's.
    cases = {0.1: 0.9**2, 0.5: 0.8**2, 1.0: 0.8**2, 2.5: 1.5**2, -0.5: 1.5**2}
    values = torch.tensor(list(cases), dtype=torch.float64, requires_grad=True)
    zeros, ones = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    loss = losses.clipped_value(values, zeros, ones, 0.2)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.5 * e for e in cases.values()])
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, 0.0, 1.5, -1.5])  # none where the clip holds
    plain = losses.clipped_value(values, zeros, ones, 0.0)
    assert plain.tolist() == pytest.approx([0.5 * (v - 1) ** 2 for v in cases])


def test_k3_has_the_mean_and_the_least_of_a_divergence():
    """Its mean over tokens drawn from π is KL(π ‖ π_ref), exactly; it is never negative; its slope is 1 - π_ref/π."""
    log_p, log_q = draw(50).log_softmax(-1).requires_grad_(), draw(50, seed=1).log_softmax(-1)
    estimate = losses.k3(log_p, log_q)
    p, q = log_p.detach().exp().tolist(), log_q.exp().tolist()
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert (log_p.exp() * estimate).sum().item() == pytest.approx(kl, rel=1e-12)
    assert (estimate >= 0).all() and losses.k3(log_p, log_p).abs().max() == 0
    estimate.sum().backward()
    assert log_p.grad.tolist() == pytest.approx([1 - b / a for a, b in zip(p, q, strict=True)])


# -- coefficient and statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "beta"), [(6.6, 0.101), (9.0, 0.102), (600.0, 0.102), (6.0, 0.1), (5.4, 0.099), (0.0, 0.098), (-3.0, 0.098)]
)
def test_adaptive_kl(kl, beta):
    """Target 6, 100 samples of a horizon of 1,000: a tenth of the relative error, which counts for 0.2 at most."""
    controller = AdaptiveKL(0.1, 6.0, 1000)
    controller.update(kl, 100)
    assert controller.beta == pytest.approx(beta, rel=1e-12)


def test_a_fixed_coefficient_stays():
    controller = AdaptiveKL(0.1, None, 1000)
    controller.update(100.0, 100)
    assert controller.beta == 0.1


def test_running_moments_are_those_of_all_that_was_seen():
    moments, seen = RunningMoments(), []
    assert moments.std == 1.0
    for n in (5, 1, 8):
        batch = (1e3 + draw(n, seed=n)).tolist()
        seen += batch
        moments = RunningMoments(moments.count, moments.mean, moments.m2)  # as a checkpoint has it
        moments.update(batch)
    assert moments.mean == pytest.approx(statistics.fmean(seen), rel=1e-12)
    assert moments.std == pytest.approx(statistics.pstdev(seen), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e3])
def test_what_never_varies_is_not_blown_up(value):
    """The mean of equal numbers is off by their rounding; that is no spread to divide by."""
    moments = RunningMoments()
    for _ in range(3):
        moments.update([value] * 7)
    assert moments.std == 1.0


# -- from rewards to advantages ---------------------------------------------------------------------------------------


def rollout(lengths=(2, 3), stopped=(True, False), **signals) -> Rollout:
    return Rollout([1, 2], [[5] * n for n in lengths], stopped=list(stopped), **signals)


def test_what_completions_earn():
    """Normalised, then clipped, then less what a missing end and each token cost."""
    r, moments = rollout(), RunningMoments()
    options = {"normalise": "running", "reward_clip": 1.5, "eos_penalty": 0.25, "length_penalty": 0.1}
    ppo_round.shape_rewards([r], [[4.0, 0.0]], config(options), moments)  # spread 2
    assert r.rewards == pytest.approx([1.5 - 0.2, 0.0 - 0.25 - 0.3])
    ppo_round.shape_rewards([r], [[4.0, 0.0]], config({"missing_eos": "keep"}), moments)
    assert r.rewards == [4.0, 0.0] and moments.count == 2
    fixed = options | {"missing_eos": "replace", "eos_score": -0.7}  # instead of score and penalties
    ppo_round.shape_rewards([r], [[4.0, 9.0]], config(fixed), RunningMoments(2, 0.0, 8.0))
    assert r.rewards == pytest.approx([min(1.5, 4 / statistics.pstdev([2.0, -2.0, 4.0, 9.0])) - 0.2, -0.7])


KL = {
    "old": [torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0, -3.0])],
    "reference_logps": [torch.tensor([-1.5, -2.0]), torch.tensor([-1.0, -2.0, -2.0])],
}  # log π - log π_ref: 0.5, 0 and 0, 1, -1


def test_the_divergence_is_a_reward_of_each_token():
    """k1 with β = 0.2: rewards -0.1, 0 + 3 and 0, -0.2, 0.2 - 1; without values and discount, the sums to go."""
    values = [torch.zeros(2), torch.zeros(3)]
    r = rollout(rewards=[3.0, -1.0], values=values, **KL)
    ppo_round.set_advantages([r], config(gae_lambda=1.0, whiten=False), 0.2)
    assert r.advantages[0].tolist() == pytest.approx([2.9, 3.0])
    assert r.advantages[1].tolist() == pytest.approx([-1.0, -1.0, -0.8])
    assert [x.tolist() for x in r.returns] == [x.tolist() for x in r.advantages]
    ppo_round.set_advantages([r], config(gae_lambda=1.0, whiten=False, kl_in="loss"), 0.2)
    assert [x.tolist() for x in r.advantages] == [[3.0, 3.0], [-1.0, -1.0, -1.0]]


def test_the_level_of_the_value_function_by_hand():
    """What was still to come is 0.9·(1 - 0.1) - 0.2, 1 - 0.1 and 3; less V, over three tokens."""
    r = rollout((2, 1), (True, True), rewards=[1.0, 3.0], values=[torch.tensor([0.5, 0.2]), torch.tensor([-1.0])])
    r.old = [torch.tensor([2.0, 1.0]), torch.tensor([1.0])]
    r.reference_logps = [torch.tensor([0.0, 0.0]), torch.tensor([1.0])]
    c = config(gamma=0.9, gae_lambda=0.3)
    want = ((0.9 * 0.9 - 0.2) - 0.5 + 0.9 - 0.2 + 3 + 1) / 3
    assert ppo_round.value_bias([r], c, 0.1) == pytest.approx(want)
    ppo_round.set_advantages([r], replace(c, ppo=replace(c.ppo, whiten=False)), 0.1, bias=want)
    assert [v.tolist() for v in r.values] == [pytest.approx([0.5 + want, 0.2 + want]), pytest.approx([-1 + want])]
    assert r.advantages[1].tolist() == pytest.approx([3 - (-1 + want)])
    r.masks = [[True, True], [False]]  # what is not learned from does not count
    r.values = [torch.tensor([0.5, 0.2]), torch.tensor([-1.0])]
    assert ppo_round.value_bias([r], c, 0.1) == pytest.approx(((0.9 * 0.9 - 0.2) - 0.5 + 0.9 - 0.2) / 2)


@pytest.mark.parametrize("beta", [1e-4, 0.2, 10.0])
@pytest.mark.parametrize("name", ["group", "rloo"])
def test_equal_rewards_give_no_advantage_at_any_kl(name, beta):
    """Four completions of one reward: what differs is the noise of their KL, which must not decide which is better."""
    old = [draw(5, seed=i).float() for i in range(4)]
    reference = [o + 0.3 * draw(5, seed=10 + i).float() for i, o in enumerate(old)]
    r = rollout((5,) * 4, (True,) * 4, rewards=[1.5] * 4, old=old, reference_logps=reference)
    ppo_round.set_advantages([r], config(advantage=name), beta)
    assert all(not a.any() for a in r.advantages)


def test_where_the_kl_is_unless_the_option_says_it():
    placed = {name: config(advantage=name).ppo.kl_in_loss for name in ("gae", "group", "rloo")}
    assert placed == {"gae": False, "group": True, "rloo": True}
    assert config(kl_in="loss").ppo.kl_in_loss and not config(advantage="group", kl_in="reward").ppo.kl_in_loss


@pytest.mark.parametrize(("name", "want"), [("group", 2.0), ("rloo", 4.0)])
def test_a_completion_leads_by_its_reward_less_its_divergence(name, want):
    r = rollout(rewards=[3.0, -1.0], **KL)  # less β·0.5 and β·0: with β = 0.2 the lead is 2.9 + 1 = 3.9
    ppo_round.set_advantages([r], config(advantage=name, group_std=False, kl_in="reward"), 0.2)
    assert r.advantages[0].tolist() == pytest.approx([want * 3.9 / 4] * 2)
    assert r.advantages[1].tolist() == pytest.approx([-want * 3.9 / 4] * 3)
    assert r.returns == []
    ppo_round.set_advantages([r], config(advantage=name, group_std=False, kl_in="loss"), 0.2)
    assert r.advantages[0].tolist() == pytest.approx([want] * 2)


def test_masked_tokens_have_no_part_in_the_whitening():
    values = [torch.tensor([0.5, 0.5]), torch.zeros(3)]
    r = rollout(rewards=[1.0, 100.0], values=values, masks=[[True] * 2, [False] * 3], **KL)
    ppo_round.set_advantages([r], config(gae_lambda=1.0), 0.0)
    assert r.advantages[0].tolist() == [0.0, 0.0]  # 0.5 and 0.5 before
    assert torch.isfinite(r.advantages[1]).all()


def test_a_round_in_numbers():
    values = [torch.tensor([0.0, 1.0]), torch.zeros(3)]
    r = rollout(rewards=[1.0, 2.0], values=values, returns=[torch.tensor([1.0, 2.0]), torch.tensor([0, 0, 3.0])], **KL)
    metrics = ppo_round.round_metrics([r], [[7.0, 9.0]], 0.3, 1.5)
    # returns 1 2 0 0 3: squares about their mean 1.2 add up to 6.8; errors 1 1 0 0 3, about their mean 1, to 6
    assert metrics == pytest.approx(
        {"reward": 8, "reward_earned": 1.5, "kl": 0.25, "kl_coef": 0.3, "entropy": 1.5, "length": 2.5}
        | {"eos_share": 0.5, "truncated_share": 0.5, "explained_variance": 1 - 6 / 6.8}
        | {"reward_std": 2**0.5, "group_std": 0.5**0.5, "zero_std_share": 0}
    )
    same = rollout(rewards=[4.0, 4.0], returns=[], sampler_logps=[torch.tensor([-1.5, -2.0]), torch.zeros(3)], **KL)
    r.sampler_logps, r.returns = [old + 0.25 for old in r.old], []
    metrics = ppo_round.round_metrics([r, same], [[7.0, 9.0], [7.0, 7.0]], 0.3, 1.5)
    assert metrics["zero_std_share"] == 0.5 and metrics["group_std"] == pytest.approx(0.5**0.5 / 2)
    apart = [0.25] * 5 + [abs(a - b) for a, b in zip([-1.5, -2.0, 0, 0, 0], torch.cat(r.old).tolist(), strict=True)]
    assert metrics["sampler_difference"] == pytest.approx(sum(apart) / 10)
    assert metrics["sampler_difference_max"] == pytest.approx(max(apart))
    # A masked completion has no log-probs, so it does not count in the KL.
    r.masks = [[True, True], [False] * 3]
    assert ppo_round.round_metrics([r], [[7.0, 9.0]], 0.3, 1.5)["kl"] == pytest.approx(0.5)


def test_a_round_survives_a_checkpoint():
    signals = {name: [draw(2).float(), draw(3, seed=1).float()] for name in ("values", "advantages", "returns")}
    first = rollout(rewards=[0.1, -7.0], masks=[[True, True], [False] * 3], **KL, **signals)
    second = rollout((1, 4, 2), (False, True, True), rewards=[1.0, 2.0, 3.0])
    for rounds, names in (([first, first], 5), ([first, second], 0), ([second], 0)):
        kept = to_tensors(rounds)
        assert len(kept) == 5 + names
        for original, restored in zip(rounds, from_tensors(kept, torch.device("cpu")), strict=True):
            for name in ("prompt", "completions", "rewards", "stopped"):
                assert getattr(restored, name) == getattr(original, name)
            n = range(len(original.completions))
            assert [restored.mask(i) for i in n] == [original.mask(i) for i in n]
            if names:
                for name in ("old", "reference_logps", "values", "advantages", "returns"):
                    assert all(map(torch.equal, getattr(restored, name), getattr(original, name)))
