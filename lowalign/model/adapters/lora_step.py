"""A linear layer with its LoRAs as one autograd step: y = W x + b + Σ s_i B_i A_i x.

peft's layers add up the same sum from single operations: a copy of the output, the low-rank product, its multiple and the
sum, each of the output's size, and autograd keeps what each of them needs. Here the low-rank product is added into the
output, and only x and the rank-r products A_i x are kept. In fp32 both agree to rounding (1e-6); in 16 bit this one rounds
less often.
"""

from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowalign.model.attention.product import product


class _Update(NamedTuple):
    """One LoRA of a layer. a (r, in), b (out, r). dropout: None without one."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: nn.Module | None


def fuse(layer: nn.Module) -> None:
    """Let a peft layer take one step for its LoRAs, where it is a linear layer and they are plain ones.

    In the dtype of the input and without dropout they are fused; others are added by peft's formula. DoRA and other
    variants, merged layers and autocast stay with peft's forward. Without an active adapter the layer is the base's.
    """
    if type(layer) in (lora.Linear, lora.Linear4bit) and type(layer.base_layer) in (nn.Linear, Linear4bit, Conv1D):
        layer.forward = MethodType(_forward, layer)


def _forward(layer: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    updates = None if args or kwargs else _updates(layer)
    if updates is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    fused = [u for u in updates if u.a.dtype == x.dtype and u.dropout is None]
    if fused:
        weights = [weight for update in fused for weight in (update.a, update.b)]
        y = LoraStep.apply(x, layer.base_layer, [update.scale for update in fused], *weights)
    else:
        y = layer.base_layer(x)
    for a, b, scale, dropout in updates:
        if a.dtype != x.dtype or dropout is not None:
            rows = x.to(a.dtype)
            rows = rows if dropout is None else dropout(rows)
            y = y + (F.linear(F.linear(rows, a), b) * scale).to(y.dtype)
    return y


def _updates(layer: nn.Module) -> list[_Update] | None:
    """The active LoRAs of a layer; None where peft has to compute them."""
    autocast = torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu")
    if layer.merged or autocast:
        return None
    updates = []
    for name in () if layer.disable_adapters else layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant or layer.lora_B[name].bias is not None:
            return None
        dropout = layer.lora_dropout[name]
        dropout = None if isinstance(dropout, nn.Identity) or not dropout.training else dropout
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        updates.append(_Update(a, b, layer.scaling[name], dropout))
    return updates


class LoraStep(torch.autograd.Function):
    """x (…, in), a frozen linear layer, the scale of each LoRA, then its A (r, in) and B (out, r) -> (…, out).

    Gradients of x, and of the matrices that require one.
    """

    @staticmethod
    def forward(ctx, x: Tensor, base: nn.Module, scales: list[float], *weights: Tensor) -> Tensor:
        y = base(x)
        rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        products = []
        for i, scale in enumerate(scales):
            a, b = weights[2 * i : 2 * i + 2]
            product = rows @ a.T
            out.addmm_(product, b.T, alpha=scale)
            products.append(product if ctx.needs_input_grad[4 + 2 * i] else None)
        trains_a = any(ctx.needs_input_grad[3::2])
        ctx.base, ctx.scales, ctx.shape = base, scales, x.shape
        ctx.save_for_backward(rows if trains_a else None, *products, *weights)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, *saved = ctx.saved_tensors
        count = len(ctx.scales)
        products, weights = saved[:count], saved[count:]
        grad = grad.reshape(-1, grad.shape[-1])
        d_x = _times_weight(grad, ctx.base) if ctx.needs_input_grad[0] else None
        d_weights: list[Tensor | None] = []
        for i, scale in enumerate(ctx.scales):
            a, b = weights[2 * i : 2 * i + 2]
            needs_a, needs_b = ctx.needs_input_grad[3 + 2 * i : 5 + 2 * i]
            back = grad @ b if needs_a or d_x is not None else None
            d_weights.append(_scaled(scale, back.T, rows) if needs_a else None)
            d_weights.append(_scaled(scale, grad.T, products[i]) if needs_b else None)
            if d_x is not None:
                d_x.addmm_(back, a, alpha=scale)
        return (None if d_x is None else d_x.view(ctx.shape), None, None, *d_weights)


def _times_weight(grad: Tensor, base: nn.Module) -> Tensor:
    """(N, out) -> (N, in): the gradient of the layer's input."""
    if isinstance(base, Linear4bit):
        state = base.weight.quant_state
        return product(grad, dequantize_4bit(base.weight.view(-1, 1), state).to(grad.dtype))
    return product(grad, base.weight.T if isinstance(base, Conv1D) else base.weight)


def _scaled(scale: float, left: Tensor, right: Tensor) -> Tensor:
    """scale · left @ right, in one kernel."""
    return torch.addmm(right.new_empty(()), left, right, beta=0, alpha=scale)
