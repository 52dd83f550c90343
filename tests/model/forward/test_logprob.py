"""The log-prob kernel against autograd in fp64."""

import pytest
import torch
from torch import nn

from lowalign.model.forward.logprob import LMHead, token_logprobs


def reference(hidden, layer, labels, scale, softcap, temperature):
    z = layer(hidden) * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    logp = (z / temperature).log_softmax(-1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale,temperature,bias", [(1.0, 1.0, False), (0.25, 0.7, True)])
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_gradients_in_fp64(softcap, scale, temperature, bias, entropy):
    torch.manual_seed(0)
    layer = nn.Linear(16, 50, bias=bias).double().requires_grad_(False)
    hidden = torch.randn(600, 16, dtype=torch.float64) * 3  # more than two chunks
    labels = torch.randint(0, 50, (600,))
    g1, g2 = torch.randn(2, 600, dtype=torch.float64)
    head = LMHead(layer, scale, softcap)
    grads, values = [], []
    for which in (0, 1):
        h = hidden.clone().requires_grad_()
        if which:
            logp, ent = token_logprobs(h, head, labels, temperature, entropy)
        else:
            logp, ent = reference(h, layer, labels, scale, softcap, temperature)
        (logp @ g1 + (ent @ g2 if entropy else 0)).backward()
        grads.append(h.grad)
        values.append((logp.detach(), ent.detach() if entropy else None))
    assert torch.allclose(values[0][0], values[1][0], rtol=0, atol=1e-13)
    if entropy:
        assert torch.allclose(values[0][1], values[1][1], rtol=0, atol=1e-13)
    assert (grads[0] - grads[1]).norm() <= 1e-13 * grads[0].norm()


def test_a_trained_head_gets_its_gradients():
    """A trained LM head takes the plain path: the gradients of its weights equal those of autograd."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(300, 8, dtype=torch.float64), torch.randint(0, 20, (300,))
    grads = []
    for which in (0, 1):
        torch.manual_seed(1)
        layer = nn.Linear(8, 20).double()
        h = hidden.clone().requires_grad_()
        if which:
            logp, _ = token_logprobs(h, LMHead(layer), labels)
        else:
            logp, _ = reference(h, layer, labels, 1.0, None, 1.0)
        logp.sum().backward()
        grads.append((h.grad, layer.weight.grad, layer.bias.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_logits_are_not_kept_for_the_backward():
    """No tensor of size N x V is kept between forward and backward."""
    layer = nn.Linear(8, 1000).requires_grad_(False)
    kept = []
    hidden = torch.randn(700, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        token_logprobs(hidden, LMHead(layer), torch.zeros(700, dtype=torch.long))
    assert max(kept) <= hidden.numel()
