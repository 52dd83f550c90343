"""Drawing a token: exact against the definition, in fp64, by sorting."""

import pytest
import torch

from lowalign.model.sampling.draw import TOKENS_PER_BLOCK, _invert, draw_tokens, uniforms

ALMOST_ONE = 1 - 2**-24
TRUNCATIONS = [(0, 1.0), (7, 1.0), (1, 1.0), (0, 0.6), (0, 0.999), (20, 0.7), (10**6, 1.0)]


def truncated(logits, temperature, top_k, top_p):
    """(V,) probabilities by the definition: top-k, then the smallest set of the likeliest that holds top_p of the rest."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p < 1:
        mass = 0.0
        for token in order.tolist():
            if mass >= top_p:
                p[token] = 0
            mass += float(p[token])
        p /= p.sum()
    return p


@pytest.mark.parametrize("vocabulary", [5, TOKENS_PER_BLOCK, 1000])
@pytest.mark.parametrize("top_k,top_p", TRUNCATIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_grid_of_uniform_numbers_gives_each_token_its_share(temperature, top_k, top_p, vocabulary):
    """N numbers evenly spread over [0, 1): a token of probability p is drawn N p times, but for the two at its ends."""
    logits = 3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    n = 2**12
    u = (torch.arange(n) + 0.5) / n
    tokens, logp = draw_tokens(logits.expand(n, -1), u, temperature, top_k, top_p)
    want = truncated(logits, temperature, top_k, top_p)
    counts = torch.bincount(tokens, minlength=vocabulary)
    assert (counts - n * want).abs().max() <= 1.01
    assert not counts[want == 0].any()
    whole = (logits.double() / temperature).log_softmax(-1)
    assert (logp - whole[tokens]).abs().max() <= 1e-5


def test_greedy_takes_the_likeliest_at_temperature_one():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    tokens, logp = draw_tokens(logits, torch.full((50,), 0.9), temperature=0)
    assert torch.equal(tokens, logits.argmax(-1))
    assert (logp - logits.double().log_softmax(-1).amax(-1)).abs().max() <= 1e-5  # 4.3e-7 seen


@pytest.mark.parametrize("top_k,top_p", [(0, 1.0), (50, 1.0), (0, 0.9999999), (30, 0.999)])
def test_probability_zero_is_never_drawn(top_k, top_p):
    """At both ends of the uniform numbers, with whole blocks of the vocabulary impossible and others almost."""
    vocabulary = 6 * TOKENS_PER_BLOCK + 5
    u = torch.tensor([0.0, 2**-24, 0.5, ALMOST_ONE])
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        logits = 5 * torch.randn(vocabulary, generator=g)
        logits[torch.rand(vocabulary, generator=g) < 0.7] = -torch.inf
        logits[:TOKENS_PER_BLOCK] = -torch.inf
        logits[-TOKENS_PER_BLOCK - 5 :] = -200.0  # underflows to 0 beside the others
        logits[3 * TOKENS_PER_BLOCK] = 1.0
        tokens, _ = draw_tokens(logits.expand(len(u), -1), u, 1.0, top_k, top_p)
        assert (logits.double().softmax(-1)[tokens] > 1e-40).all()


def test_a_point_on_the_total_finds_the_last_place_that_added_something():
    cumulative = torch.tensor([[0.0, 0.3, 0.3, 1.0, 1.0], [0.0, 0.0, 2.0, 2.0, 2.0]])
    assert _invert(cumulative, torch.tensor([[1.0], [2.0]])).tolist() == [[3], [2]]
    assert _invert(cumulative, torch.zeros(2, 1)).tolist() == [[1], [2]]


def test_banned_tokens_give_up_their_share_but_not_their_log_prob():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    logits[7] += 12  # nearly all of the mass
    banned = torch.zeros(2, 300, dtype=torch.bool)
    banned[0, [7, 130]] = True
    n = 2**11
    u = ((torch.arange(n) + 0.5) / n).repeat(2)
    how = {"logits": logits.expand(2 * n, -1), "uniform": u, "banned": banned.repeat_interleave(n, 0)}
    for temperature, top_k, top_p in [(1.0, 0, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.5)]:
        tokens, logp = draw_tokens(**how, temperature=temperature, top_k=top_k, top_p=top_p)
        for row, allowed in enumerate((logits.masked_fill(banned[0], -torch.inf), logits)):
            counts = torch.bincount(tokens[row * n : (row + 1) * n], minlength=300)
            assert (counts - n * truncated(allowed, temperature, top_k, top_p)).abs().max() <= 1.01
        assert (logp - logits.double().log_softmax(-1)[tokens]).abs().max() <= 1e-5
    greedy, _ = draw_tokens(**how, temperature=0)
    assert greedy[0] == logits.masked_fill(banned[0], -torch.inf).argmax()
    assert greedy[-1] == 7


def test_uniforms_are_uniform_and_a_function_of_their_arguments():
    u = uniforms(3, 5, 7, 200)
    assert u[:50] == uniforms(3, 5, 7, 50)
    others = [uniforms(4, 5, 7, 200), uniforms(3, 6, 7, 200), uniforms(3, 5, 8, 200), uniforms(-3, 5, 7, 200)]
    assert all(not set(u) & set(other) for other in [*others, uniforms(35, 7, 7, 200), uniforms(3, 57, 7, 200)])
    many = torch.tensor([uniforms(0, i, j, 25) for i in range(20) for j in range(20)], dtype=torch.float64)
    assert many.min() >= 0
    assert many.max() <= ALMOST_ONE
    # Kolmogorov-Smirnov on 10 000 numbers: 1.63 / sqrt(n) is passed by one honest set in a hundred; the set is fixed.
    flat = many.flatten().sort().values
    ranks = torch.arange(len(flat), dtype=torch.float64) / len(flat)
    assert (flat - ranks).abs().max() < 1.63 / len(flat) ** 0.5
    # The numbers of one sample say nothing about the next one's, nor a token's about the next token's.
    for a, b in ((many[:-1], many[1:]), (many[:, :-1], many[:, 1:])):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 4 / a.numel() ** 0.5
