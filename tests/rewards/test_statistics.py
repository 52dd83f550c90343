"""Win rates, intervals, sign test, length control and ratings, against hand-worked values and plain Python formulas."""

import math

import pytest
import torch

from lowalign.rewards.statistics import (
    ELO,
    estimates,
    length_controlled,
    logistic,
    outcomes,
    ratings,
    sign_test,
    win_rate,
    won_prompts,
)


def pairs(values, lengths=None, prompts=None):
    """Of policy 0 and policy 1; each pair has a prompt of its own unless `prompts` says."""
    lengths = lengths if lengths is not None else [0.0] * len(values)
    prompts = prompts if prompts is not None else range(len(values))
    rows = [(v, d, 0, 1, p) for v, d, p in zip(values, lengths, prompts, strict=True)]
    return outcomes(rows, len(set(prompts)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
        (5, 0, 2 / 2**5),
        (3, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_the_sign_test_is_the_binomial_tail(wins, losses, p):
    assert sign_test(wins, losses) == p


def test_a_tie_counts_half():
    (estimate,) = estimates(pairs([1, 1, 0.5, 0]), win_rate, 0)
    assert estimate.value == 2.5 / 4
    assert 0 <= estimate.low < estimate.value < estimate.high <= 1


def test_the_interval_of_a_fair_coin():
    """95 % of the intervals contain the truth, and their width is that of the normal approximation."""
    generator = torch.Generator().manual_seed(0)
    contained, widths = 0, []
    for seed in range(100):
        values = (torch.rand(200, generator=generator) < 0.5).double().tolist()
        (e,) = estimates(pairs(values), win_rate, seed)
        contained += e.low <= 0.5 <= e.high
        widths.append(e.high - e.low)
    assert contained >= 88  # 95 expected, with an error of 2.2
    assert sum(widths) / 100 == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.03)


def test_the_same_seed_gives_the_same_interval():
    values = [1, 0, 0.5, 1, 1, 0, 1]
    assert estimates(pairs(values), win_rate, 3) == estimates(pairs(values), win_rate, 3)


def test_pairs_of_one_prompt_are_drawn_together():
    """Ten copies of each pair, as if they were samples: no more is known than before."""
    values = [1, 1, 0, 1, 0, 1, 1, 0]
    (once,) = estimates(pairs(values), win_rate, 0)
    copies = pairs(values * 10, prompts=[*range(8)] * 10)
    (tenfold,) = estimates(copies, win_rate, 0)
    assert tenfold.low == pytest.approx(once.low, abs=1e-12) and tenfold.high == pytest.approx(once.high, abs=1e-12)
    assert won_prompts(copies) == won_prompts(pairs(values)) == (5, 3)


def biased(quality, bias, n=2000):
    """Outcomes that depend on `quality`, and by `bias` on the length: the first answer is usually longer."""
    generator = torch.Generator().manual_seed(7)
    length = 100 + 150 * torch.randn(n, generator=generator, dtype=torch.float64)
    logit = quality + bias * torch.tanh(length / length.std(correction=0))
    values = (torch.rand(n, generator=generator, dtype=torch.float64) < logit.sigmoid()).double()
    return pairs(values.tolist(), length.tolist())


def test_a_bias_for_length_is_removed():
    """Equally good policies, one of which writes more, under a judge that likes long answers."""
    world = biased(quality=0.0, bias=2.0)
    (raw,), (controlled,) = (estimates(world, statistic, 0) for statistic in (win_rate, length_controlled))
    assert raw.low > 0.6
    assert controlled.low < 0.5 < controlled.high


def test_what_is_not_length_stays():
    (controlled,) = estimates(biased(quality=1.0, bias=2.0), length_controlled, 0)
    assert controlled.low < sigmoid(1.0) < controlled.high and controlled.low > 0.6
    (unbiased,) = estimates(biased(quality=1.0, bias=0.0), length_controlled, 0)
    assert unbiased.low < sigmoid(1.0) < unbiased.high


def test_equal_lengths_change_nothing():
    values = [1, 1, 1, 0.5, 0, 1, 0.5, 1]
    (raw,), (controlled,) = (estimates(pairs(values), s, 0) for s in (win_rate, length_controlled))
    assert controlled.value == pytest.approx(raw.value, abs=0.002)  # the prior moves it a little


def test_the_regression_is_at_its_maximum():
    """The gradient of the formula, summed in plain Python, is zero; for each row of weights by itself."""
    torch.manual_seed(0)
    x, y, weight = torch.randn(30, 2).double(), torch.randint(3, (30,)).double() / 2, torch.randint(4, (2, 30)).double()
    for beta, w in zip(logistic(x, y, weight, 0.5).tolist(), weight.tolist(), strict=True):
        for k in range(2):
            total = -0.5 * beta[k]
            for row, outcome, times in zip(x.tolist(), y.tolist(), w, strict=True):
                total += times * (outcome - sigmoid(row[0] * beta[0] + row[1] * beta[1])) * row[k]
            assert abs(total) < 1e-8


def round_robin(counts):
    """counts[i, j]: how often policy i beat policy j."""
    rows = []
    for (i, j), wins in counts.items():
        rows += [(1.0, 0.0, i, j, len(rows) + k) if i < j else (0.0, 0.0, j, i, len(rows) + k) for k in range(wins)]
    return outcomes(rows, len(rows))


def test_two_ratings_are_the_log_odds():
    world = round_robin({(0, 1): 30, (1, 0): 10})
    a, b = ratings(world, world.unit_weights, 2, precision=1e-9)[0].tolist()
    assert a - b == pytest.approx(400 * math.log10(3), abs=1e-4) and a + b == pytest.approx(2000)


def test_ratings_equal_the_classic_iteration():
    """Zermelo's, as in Hunter 2004 (MM algorithms for generalized Bradley-Terry models), eq. 3: s_i = W_i / Σ n_ij / (s_i + s_j)."""
    counts = {
        (0, 1): 7,
        (1, 0): 3,
        (0, 2): 9,
        (2, 0): 4,
        (1, 2): 5,
        (2, 1): 5,
        (3, 0): 2,
        (0, 3): 8,
        (3, 2): 6,
        (2, 3): 1,
    }
    s = [1.0] * 4
    for _ in range(5000):
        for i in range(4):
            won = sum(w for (a, _), w in counts.items() if a == i)
            played = sum(w / (s[a] + s[b]) for (a, b), w in counts.items() if i in (a, b))
            s[i] = won / played
    strength = [math.log(x) for x in s]
    expected = [1000 + ELO * (x - sum(strength) / 4) for x in strength]
    world = round_robin(counts)
    assert ratings(world, world.unit_weights, 4, precision=1e-9)[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_policy_that_wins_always_has_finite_figures():
    world = pairs([1.0] * 50, [3.0, -3.0] * 25)
    for statistic in (win_rate, length_controlled):
        (e,) = estimates(world, statistic, 0)
        assert 0.99 < e.low <= e.high <= 1
    a, b = ratings(world, world.unit_weights, 2)[0].tolist()
    assert 700 < a - b < 3000
