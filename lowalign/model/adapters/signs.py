"""Matrices of signs, a bit each, and their product with activations.

Bit i of byte b of a row is the sign of column 8 b + i: 1 for +1, 0 for -1. The product unpacks a tile of the matrix at a
time, in the forward and again in the backward, so the matrix is never in memory as numbers.
"""

from functools import lru_cache

import torch
from torch import Tensor

TILE_WEIGHTS = 2**22  # signs that are unpacked at a time; 8 MiB in 16 bit


def pack_signs(positive: Tensor) -> Tensor:
    """(rows, columns) bool -> (rows, ceil(columns / 8)) uint8. The bits after the last column are 0."""
    rows, columns = positive.shape
    bits = torch.nn.functional.pad(positive.to(torch.uint8), (0, -columns % 8)).view(rows, -1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, bytes) uint8 -> (rows, columns) of +1 and -1."""
    return torch.nn.functional.embedding(packed.int(), _bytes(dtype, packed.device)).flatten(1)[:, :columns]


@lru_cache
def _bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): the signs that each byte stands for."""
    values = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return ((values & 1) * 2 - 1).to(dtype)


class SignProduct(torch.autograd.Function):
    """x (…, columns), packed signs S (rows, bytes), log-scale (1,) or (rows,) -> exp(log-scale) · x Sᵀ, (…, rows).

    The gradient goes to x and to the log-scale.
    """

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, log_scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, log_scale)
        ctx.packed = packed  # a constant: not offloaded with the activations
        flat = x.flatten(0, -2)
        y = flat.new_empty(len(flat), len(packed))
        for rows in _tiles(len(packed), flat.shape[1]):
            product = flat @ unpack_signs(packed[rows], flat.shape[1], x.dtype).T
            y[:, rows] = _scaled(product, log_scale, rows)
        return y.view(*x.shape[:-1], len(packed))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, log_scale = ctx.saved_tensors
        packed, flat = ctx.packed, x.flatten(0, -2)
        columns, per_row = flat.shape[1], len(log_scale) > 1
        scaled = _scaled(gradient.flatten(0, -2), log_scale, slice(None)).to(x.dtype)  # ∂L/∂(x Sᵀ)
        wide = torch.promote_types(x.dtype, torch.float32)
        d_x = torch.empty_like(flat)
        d_scale = torch.zeros_like(log_scale, dtype=wide)
        if ctx.needs_input_grad[0] or not per_row:
            for part in _tiles((columns + 7) // 8, 8 * len(packed)):
                tile = slice(8 * part.start, min(8 * part.stop, columns))
                d_x[:, tile] = scaled @ unpack_signs(packed[:, part], tile.stop - tile.start, x.dtype)
                if not per_row:  # Σ_to g_to α (x Sᵀ)_to = Σ_ti x_ti (α g S)_ti: no product of its own
                    d_scale += (flat[:, tile].to(wide) * d_x[:, tile]).sum()
        if ctx.needs_input_grad[2] and per_row:
            for rows in _tiles(len(packed), columns):
                product = flat @ unpack_signs(packed[rows], columns, x.dtype).T
                d_scale[rows] = (product.to(wide) * scaled[:, rows]).sum(0)
        return d_x.view_as(x), None, d_scale.to(log_scale.dtype)


def _scaled(product: Tensor, log_scale: Tensor, rows: slice) -> Tensor:
    wide = torch.promote_types(product.dtype, torch.float32)
    scale = log_scale.to(wide).exp()
    return product.to(wide) * (scale[rows] if len(scale) > 1 else scale)


def _tiles(count: int, weights_each: int) -> list[slice]:
    size = max(1, TILE_WEIGHTS // weights_each)
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]
