"""FlatWeights against plain parameters."""

import pytest
import torch
from torch import nn

from lowalign.errors import UserError
from lowalign.model.adapters.flat import FlatWeights

X = torch.linspace(-1, 1, 5 * 7).view(5, 7)


def _module(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 300), nn.Tanh(), nn.Linear(300, 3)).to(dtype)


def _backward(module: nn.Module, scale: float = 1.0) -> None:
    (module(X.to(next(module.parameters()).dtype)).float().square().sum() * scale).backward()


def test_parameters_keep_identity_and_value_and_start_at_multiples_of_256():
    module, untouched = _module(), _module()
    before = dict(module.named_parameters())
    flat = FlatWeights(before)
    assert all(a is b for a, b in zip(module.parameters(), before.values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), untouched.parameters(), strict=True))
    # 2100 -> 2304, 300 -> 512, 900 -> 1024, 3 -> 256
    assert flat.master.shape == (2304 + 512 + 1024 + 256,)
    offsets = [t.storage_offset() for t in flat.tensors().values()]
    assert offsets == [0, 2304, 2816, 3840]
    flat.master.data.fill_(0.5)
    assert all((p == 0.5).all() for p in module.parameters())


def test_fp32_gradients_are_those_of_plain_parameters_and_add_up():
    module, plain = _module(), _module()
    flat = FlatWeights(dict(module.named_parameters()))
    for scale in (1.0, 0.25, -2.0):
        _backward(module, scale)
        flat.accumulate()
        _backward(plain, scale)
    for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(flat.gradients()[name], q.grad)
        assert p.grad.data_ptr() == flat.gradients()[name].data_ptr()
    flat.zero_grad()
    assert not flat.master.grad.any() and not any(p.grad.any() for p in module.parameters())


def test_low_precision_gradients_are_summed_in_fp32():
    module, plain = _module(torch.bfloat16), _module(torch.bfloat16)
    flat = FlatWeights(dict(module.named_parameters()), torch.bfloat16)
    expected = [torch.zeros_like(p, dtype=torch.float32) for p in plain.parameters()]
    for scale in (1.0, 1e-3, 1e-3):  # in bf16 the small ones would vanish beside the large one
        _backward(module, scale)
        flat.accumulate()
        plain.zero_grad()
        _backward(plain, scale)
        expected = [total + p.grad.float() for total, p in zip(expected, plain.parameters(), strict=True)]
    assert all(p.grad is None for p in module.parameters())
    for got, want in zip(flat.gradients().values(), expected, strict=True):
        assert torch.equal(got, want)


def test_working_copy_follows_only_on_sync():
    module = _module()
    flat = FlatWeights(dict(module.named_parameters()), torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    before = [p.clone() for p in module.parameters()]
    flat.master.data.add_(1 / 3)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    flat.sync_working_copy()
    for p, view in zip(module.parameters(), flat.tensors().values(), strict=True):
        assert torch.equal(p, view.bfloat16()) and view.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_that_was_not_accumulated_leaves_nothing(dtype):
    module = _module()
    flat = FlatWeights(dict(module.named_parameters()), dtype)
    _backward(module)  # never accumulated
    flat.zero_grad()
    flat.accumulate()
    assert not flat.master.grad.any()
    assert not any(p.grad is not None and p.grad.any() for p in module.parameters())


def test_has_gradient_counts_zero_gradients_but_not_missing_ones():
    a, b, idle = (nn.Parameter(torch.ones(4)) for _ in range(3))
    b.data.zero_()
    flat = FlatWeights({"a": a, "b": b, "idle": idle})
    (a * b).sum().backward()  # da = b = 0, as for a LoRA's A while its B is zero
    flat.accumulate()
    assert not flat.gradients()["a"].any() and flat.gradients()["b"].any()
    assert flat.has_gradient == {"a", "b"}


def test_load_wants_exactly_the_adapters_tensors():
    module, other = _module(), _module()
    flat = FlatWeights(dict(module.named_parameters()), torch.bfloat16)
    tensors = {name: torch.randn_like(p) for name, p in other.named_parameters()}
    with pytest.raises(UserError, match=r"missing \['2.bias'\], unknown \['3.bias'\]"):
        flat.load({name.replace("2.bias", "3.bias"): t for name, t in tensors.items()})
    with pytest.raises(UserError, match=r"0.bias has shape \(299,\); the adapter has \(300,\)"):
        flat.load(tensors | {"0.bias": torch.zeros(299)})
    flat.load(tensors)
    for name, p in module.named_parameters():
        assert torch.equal(flat.tensors()[name], tensors[name]) and torch.equal(p, tensors[name].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_takes_weights_and_gradients_along_and_training_goes_on(dtype):
    modules = _module(), _module()
    moved, stayed = (FlatWeights(dict(m.named_parameters()), dtype) for m in modules)
    for module, flat in zip(modules, (moved, stayed), strict=True):
        _backward(module)
        flat.accumulate()
    old = moved.master.data_ptr(), modules[0][0].weight.data_ptr()
    moved.move("cpu")  # to where it is: new buffers all the same
    assert moved.master.data_ptr() != old[0] and modules[0][0].weight.data_ptr() != old[1]
    assert torch.equal(moved.master.grad, stayed.master.grad)
    for module, flat in zip(modules, (moved, stayed), strict=True):
        _backward(module)
        flat.accumulate()
        flat.master.data.add_(flat.master.grad, alpha=-0.1)
        flat.sync_working_copy()
    assert torch.equal(moved.master.grad, stayed.master.grad)
    for a, b in zip(*(m.parameters() for m in modules), strict=True):
        assert torch.equal(a, b)
