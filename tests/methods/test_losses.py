"""Losses against formulas written out in fp64 with plain Python, and against worked numbers."""

import math

import pytest
import torch

from lowalign.methods import losses

CHOSEN = [0.3, -1.2, 4.0, 0.0, -30.0]
REJECTED = [-0.5, 0.7, 1.0, 0.0, 25.0]
w, l = (torch.tensor(v, dtype=torch.float64) for v in (CHOSEN, REJECTED))  # noqa: E741


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -700 else x


def close(values: torch.Tensor, want: list[float]) -> None:
    assert values.tolist() == pytest.approx(want, rel=1e-12, abs=1e-12)


def test_bradley_terry():
    close(losses.bradley_terry(w, l, 0.5), [-log_sigmoid(a - b - 0.5) for a, b in zip(CHOSEN, REJECTED, strict=True)])
    assert losses.bradley_terry(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(math.log(2), rel=1e-6)


def test_tie_is_half_a_win_each_and_least_when_equal():
    want = [-(log_sigmoid(a - b) + log_sigmoid(b - a)) / 2 for a, b in zip(CHOSEN, REJECTED, strict=True)]
    close(losses.bradley_terry_tie(w, l), want)
    assert losses.bradley_terry_tie(w, l).min() == losses.bradley_terry_tie(w, l)[3]


def test_plackett_luce_is_picking_in_turn():
    r, rank = torch.tensor([0.2, 1.5, -0.7, 0.9], dtype=torch.float64), [2, 0, 3, 1]
    order = sorted(range(4), key=rank.__getitem__)
    probability = 1.0
    for at in range(4):
        rest = [math.exp(r[i]) for i in order[at:]]
        probability *= math.exp(r[order[at]]) / sum(rest)
    want = -math.log(probability) / math.log2(24)
    assert losses.plackett_luce(r, torch.tensor(rank)).item() == pytest.approx(want, rel=1e-12)


def test_plackett_luce_weighs_a_ranking_of_8_as_a_pair():
    """Its loss at equal scores is log 2 at any length; the complete order of 8 has log 8! = 10.6 nats, 15 times a pair's."""
    for k in (2, 3, 8):
        equal = losses.plackett_luce(torch.zeros(k, dtype=torch.float64), torch.arange(k))
        assert equal.item() == pytest.approx(math.log(2), rel=1e-12)


def test_plackett_luce_keeps_the_margin():
    """A pair: that of Bradley-Terry. Three: at each choice the worse ones are ahead by the margin."""
    pair = torch.stack([w[0], l[0]])
    expected = losses.bradley_terry(w[:1], l[:1], 0.7)[0]
    torch.testing.assert_close(losses.plackett_luce(pair, torch.tensor([0, 1]), 0.7), expected)
    a, b, c = 0.2, -0.4, 1.1
    r = torch.tensor([b, c, a], dtype=torch.float64)  # a > b > c
    first = math.exp(a) / (math.exp(a) + math.exp(b + 0.7) + math.exp(c + 0.7))
    second = math.exp(b) / (math.exp(b) + math.exp(c + 0.7))
    want = -(math.log(first) + math.log(second)) / math.log2(6)
    assert losses.plackett_luce(r, torch.tensor([1, 2, 0]), 0.7).item() == pytest.approx(want, rel=1e-12)


def test_plackett_luce_of_two_is_bradley_terry_and_ties_pick_from_one_set():
    pair = torch.stack([w[0], l[0]])
    torch.testing.assert_close(losses.plackett_luce(pair, torch.tensor([0, 1])), losses.bradley_terry(w[:1], l[:1])[0])
    r = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)
    e = [math.exp(x) for x in r]
    want = -math.log(e[0] / sum(e)) - math.log(e[1] / sum(e))  # two share the first place
    want /= 2 * math.log2(3)
    tie = losses.plackett_luce(pair, torch.tensor([0, 0]))
    torch.testing.assert_close(tie, losses.bradley_terry_tie(w[:1], l[:1])[0])
    assert losses.plackett_luce(r, torch.tensor([0, 0, 1])).item() == pytest.approx(want, rel=1e-12)


def test_centring():
    close(losses.centring(w, l), [(a + b) ** 2 for a, b in zip(CHOSEN, REJECTED, strict=True)])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo(smoothing):
    h = (w - l).tolist()
    yes, no = [log_sigmoid(0.3 * x) for x in h], [log_sigmoid(-0.3 * x) for x in h]
    close(
        losses.dpo(w - l, 0.3, smoothing), [-(1 - smoothing) * a - smoothing * b for a, b in zip(yes, no, strict=True)]
    )
    want = [(-(1 - smoothing) * a + smoothing * b) / (1 - 2 * smoothing) for a, b in zip(yes, no, strict=True)]
    close(losses.dpo(w - l, 0.3, smoothing, robust=True), want)


def test_robust_dpo_is_unbiased_under_flipped_preferences():
    h, flips = w - l, 0.3
    expected = (1 - flips) * losses.dpo(h, 0.1, flips, robust=True) + flips * losses.dpo(-h, 0.1, flips, robust=True)
    torch.testing.assert_close(expected, losses.dpo(h, 0.1))


def test_hinge_and_ipo():
    h = (w - l).tolist()
    close(losses.hinge(w - l, 0.3), [max(0.0, 1 - 0.3 * x) for x in h])
    close(losses.ipo(w - l, 0.3), [(x - 1 / 0.6) ** 2 for x in h])


def test_simpo():
    want = [-log_sigmoid(2.0 * (a - b) - 0.5) for a, b in zip(CHOSEN, REJECTED, strict=True)]
    close(losses.simpo(w, l, 2.0, 0.5), want)


def test_odds_ratio():
    p_w, p_l = torch.tensor([0.5, 0.9, 1e-6], dtype=torch.float64), torch.tensor([0.2, 0.95, 1e-3], dtype=torch.float64)
    odds = lambda p: p / (1 - p)  # noqa: E731
    want = [-log_sigmoid(math.log(odds(a) / odds(b))) for a, b in zip(p_w.tolist(), p_l.tolist(), strict=True)]
    close(losses.odds_ratio(p_w.log(), p_l.log()), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_of_a_certain_completion_have_a_gradient(dtype):
    """A mean log-prob of exactly 0: log odds are bounded, and the rejected one is still pushed down."""
    for values in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)):
        chosen, rejected = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in values)
        loss = losses.odds_ratio(chosen, rejected)
        loss.sum().backward()
        assert loss.isfinite() and chosen.grad.isfinite() and rejected.grad.isfinite()
        assert chosen.grad <= 0 <= rejected.grad and (values[1] < 0 or rejected.grad > 0.1)


def test_kto():
    ratio, up = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.tensor([True, False, False])
    want = [1 - sigmoid(0.1 * (1.0 - 0.4)), 1 - sigmoid(0.1 * (0.4 + 2.0)), 1 - sigmoid(0.1 * (0.4 - 0.5))]
    close(losses.kto(ratio, up, 0.4, 0.1), want)


def test_far_scores_stay_finite():
    far = torch.tensor([1e4, -1e4])
    for value in (losses.bradley_terry(far, -far), losses.dpo(far, 1.0), losses.simpo(far, -far, 1.0, 0.0)):
        assert value.isfinite().all()
