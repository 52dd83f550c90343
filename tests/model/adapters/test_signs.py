"""Packed signs and their product, against dense matrices in fp64."""

import pytest
import torch

from lowalign.model.adapters import signs
from lowalign.model.adapters.signs import SignProduct, pack_signs, unpack_signs


def test_bits_of_a_byte_by_hand():
    row = torch.tensor([[True, False, False, True, False, False, False, False, True, True]])
    assert pack_signs(row).tolist() == [[0b00001001, 0b00000011]]
    assert unpack_signs(pack_signs(row), 10, torch.float32).tolist() == [[1, -1, -1, 1, -1, -1, -1, -1, 1, 1]]


@pytest.mark.parametrize("columns", [1, 8, 13, 64])
def test_packed_and_unpacked_is_the_same(columns):
    positive = torch.rand(5, columns) > 0.5
    packed = pack_signs(positive)
    assert packed.shape == (5, -(-columns // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_signs(packed, columns, torch.bfloat16) > 0, positive)


@pytest.mark.parametrize("tile", [1, 40, 2**22])
@pytest.mark.parametrize("per_row", [False, True], ids=["matrix", "rows"])
@pytest.mark.parametrize("columns", [16, 21])
def test_product_and_gradients_equal_those_of_the_dense_matrix(columns, per_row, tile, monkeypatch):
    """exp(s) · x Sᵀ by autograd on the dense matrix, in fp64: value, gradient to x, gradient to the log-scale."""
    monkeypatch.setattr(signs, "TILE_WEIGHTS", tile)
    torch.manual_seed(0)
    positive = torch.rand(11, columns) > 0.5
    dense = torch.where(positive, 1.0, -1.0).double()
    x = torch.randn(2, 3, columns, dtype=torch.float64, requires_grad=True)
    s = torch.randn(11 if per_row else 1, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 11, dtype=torch.float64)
    expected = x @ (s.exp()[:, None] * dense).T
    wanted = torch.autograd.grad((expected * weight).sum(), (x, s))
    found = SignProduct.apply(x, pack_signs(positive), s)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(torch.autograd.grad((found * weight).sum(), (x, s)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("trained", ["x", "scale"])
def test_only_what_is_asked_for_gets_a_gradient(trained):
    x, s = torch.randn(4, 8, requires_grad=trained == "x"), torch.zeros(1, requires_grad=trained == "scale")
    SignProduct.apply(x, pack_signs(torch.rand(3, 8) > 0.5), s).sum().backward()
    assert (x.grad is not None) == (trained == "x") and (s.grad is not None) == (trained == "scale")


def test_memory_stays_at_a_tile(monkeypatch):
    """The largest tensor that forward and backward make, seen by a dispatch mode: a tile, never the matrix."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(signs, "TILE_WEIGHTS", 4096)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.extend(
                t.numel() for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)
            )
            return result

    packed, x, s = (
        pack_signs(torch.rand(512, 1024) > 0.5),
        torch.randn(3, 1024, requires_grad=True),
        torch.zeros(1, requires_grad=True),
    )
    with Watch():
        y = SignProduct.apply(x, packed, s)
        y.backward(torch.ones_like(y))
    tile = max(n for n in seen if n != packed.numel())
    assert tile <= 4096 < 512 * 1024
