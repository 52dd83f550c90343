"""Products of bf16 in fp32, as CPUs without bf16 instructions take them: the same numbers to one rounding."""

import pytest
import torch

from lowalign.model.adapters import lora_step
from lowalign.model.attention import product as product_module
from lowalign.model.attention.product import emulated, product
from lowalign.model.forward import logprob
from lowalign.model.forward.logprob import LMHead, token_logprobs

ROUNDING = 2.0**-8  # of bf16, relative


@pytest.fixture
def without_bf16(monkeypatch):
    """A CPU without bf16 instructions, whatever this one is."""
    monkeypatch.setattr(product_module, "has_bf16", lambda: False)


@pytest.mark.parametrize("weights_at_a_time", [2**22, 64 * 50])
def test_it_is_the_product_rounded_once(without_bf16, monkeypatch, weights_at_a_time):
    monkeypatch.setattr(product_module, "SLICE", weights_at_a_time)
    torch.manual_seed(0)
    x, weight = torch.randn(5, 48).bfloat16(), torch.randn(200, 48).bfloat16()
    assert emulated(x) and not emulated(x[:1]) and not emulated(x.float())
    want = x.double() @ weight.double().T
    got = product(x, weight.T)
    assert got.dtype == torch.bfloat16 and got.shape == (5, 200)
    assert ((got.double() - want).abs() <= ROUNDING * want.abs() + 1e-6).all()


def test_a_cpu_with_bf16_multiplies_in_bf16(monkeypatch):
    monkeypatch.setattr(product_module, "has_bf16", lambda: True)
    x, weight = torch.randn(5, 48).bfloat16(), torch.randn(48, 200).bfloat16()
    assert not emulated(x) and torch.equal(product(x, weight), x @ weight)


def test_log_probs_of_a_head(without_bf16):
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 100).bfloat16().requires_grad_(False)
    hidden = torch.randn(7, 32).bfloat16().requires_grad_()
    labels = torch.arange(7)
    assert logprob.emulated(hidden)
    logps, _ = token_logprobs(hidden, LMHead(head), labels)
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    want = (exact @ head.weight.double().T + head.bias.double()).log_softmax(-1)[labels, labels]
    (want_gradient,) = torch.autograd.grad(want.sum(), exact)
    # Logits of size 2 are rounded to bf16, as the layer's own product would be; so are gradients of size 1.
    assert (logps.double() - want).abs().max() < 0.03 and (gradient.double() - want_gradient).abs().max() < 0.03


def test_the_gradient_of_a_base_layer(without_bf16):
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 24).bfloat16().requires_grad_(False)
    gradient = torch.randn(6, 24).bfloat16()
    want = gradient.double() @ layer.weight.double()
    assert (lora_step._times_weight(gradient, layer).double() - want).abs().max() < 0.03
