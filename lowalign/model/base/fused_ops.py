"""RMSNorm, rotary embedding and SwiGLU as one step each, forward and backward, for frozen weights.

Autograd keeps their inputs, and of a norm one number a row. Where they are compiled (torch.compile) each is one kernel that
reads its inputs once, computes in fp32 and rounds once; a dry run counts it as such. Elsewhere they are a few operations of
torch. In fp32 both equal transformers' modules to rounding (1e-6).
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lowalign.log import log
from lowalign.model.attention.device import device_type

Compile = Literal["auto", "on", "off"]


# -- the arithmetic: rows first, gradients by hand ------------------------------------------------------------------------


def norm_forward(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x (N, H) -> (x r (weight + offset), r (N, 1)) with r = 1/sqrt(mean x² + eps); fp32 inside (fp64 for fp64 input)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + eps)
    return (wide * r).mul_(_scale(weight, offset, wide.dtype)).to(x.dtype), r


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, r: Tensor, offset: float) -> Tensor:
    """With n = x r and g = grad (weight + offset): r (g - n mean(g n))."""
    n = x.to(r.dtype) * r
    g = grad.to(r.dtype) * _scale(weight, offset, r.dtype)
    return g.addcmul(n, (g * n).mean(-1, keepdim=True), value=-1).mul_(r).to(x.dtype)


def _scale(weight: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) + offset if offset else weight.to(dtype)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up."""
    return F.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """x (N, heads, D), cos and sin (N, D) -> x cos + (-x₂, x₁) sin for the halves x₁, x₂ (arXiv 2104.09864); or, from the
    gradient of that, the gradient of x."""
    first, second = sin[:, None].chunk(2, -1)
    sin = torch.cat((second, -first) if backward else (-first, second), -1)
    return (x * cos[:, None]).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


# -- how it is run --------------------------------------------------------------------------------------------------------

_FUNCTIONS: dict[str, Callable] = {f.__name__: f for f in (norm_forward, norm_backward, swiglu_forward, swiglu_backward, rotate)}  # fmt: skip

# On the meta device a compiled function is an operation of its own: a dry run sees one kernel, and nothing inside.
_LIBRARY = torch.library.Library("lowalign", "DEF")
for _schema in (
    "norm_forward(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
    "norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor r, float offset) -> Tensor",
    "swiglu_forward(Tensor gate, Tensor up) -> Tensor",
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    "rotate(Tensor x, Tensor cos, Tensor sin, bool backward) -> Tensor",
):
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema.partition("(")[0], _FUNCTIONS[_schema.partition("(")[0]], "Meta")


def run(name: str, compile: Compile, x: Tensor, *args):
    """A function of above. compile: "auto" where it runs on a GPU."""
    if compile == "off" or (compile == "auto" and device_type(x) != "cuda"):
        return _FUNCTIONS[name](x, *args)
    if x.is_meta:
        return getattr(torch.ops.lowalign, name)(x, *args)
    for tensor in (x, *args):
        if isinstance(tensor, Tensor) and len(tensor) == len(x) > 1 and tensor.ndim > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # one kernel for all numbers of rows
    return _compiled(name)(x, *args)


@cache
def _compiled(name: str) -> Callable:
    """The compiled function; where this machine cannot compile it, the function as it is, with a line in the log."""
    kernel, works = torch.compile(_FUNCTIONS[name]), False

    def call(*args):
        nonlocal kernel, works
        if works:
            return kernel(*args)
        try:
            result = kernel(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            log(
                f"{name} cannot be compiled here ({type(error).__name__}: {reason}); it runs slower, with the same results"
            )
            kernel = _FUNCTIONS[name]
            result = kernel(*args)
        works = True
        return result

    return call


# -- as autograd steps ----------------------------------------------------------------------------------------------------


class RMSNorm(torch.autograd.Function):
    """x (…, H), frozen weight (H,) -> (…, H) (arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, offset: float, compile: Compile) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, r = run("norm_forward", compile, rows, weight, eps, offset)
        ctx.save_for_backward(rows, weight, r)
        ctx.offset, ctx.compile = offset, compile
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight, r = ctx.saved_tensors
        d_x = run("norm_backward", ctx.compile, grad.reshape(rows.shape), rows, weight, r, ctx.offset)
        return d_x.view(grad.shape), None, None, None, None


class SwiGLU(torch.autograd.Function):
    """gate, up (…, I) -> silu(gate) · up (arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, compile: Compile) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.compile = compile
        return run("swiglu_forward", compile, _rows(gate), _rows(up)).view(gate.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        d_gate, d_up = run("swiglu_backward", ctx.compile, _rows(grad), _rows(gate), _rows(up))
        return d_gate.view(gate.shape), d_up.view(up.shape), None


class Rotary(torch.autograd.Function):
    """x (B, heads, T, D), cos and sin (B or 1, T, D) without gradient -> (B, heads, T, D)."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, compile: Compile) -> Tensor:
        b, _, t, d = x.shape
        cos, sin = (c.expand(b, t, d).reshape(-1, d) for c in (cos, sin))
        ctx.save_for_backward(cos, sin)
        ctx.compile = compile
        return _rotated(x, cos, sin, False, compile)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _rotated(grad, *ctx.saved_tensors, True, ctx.compile), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, backward: bool, compile: Compile) -> Tensor:
    b, heads, t, d = x.shape
    rows = x.transpose(1, 2).reshape(-1, heads, d)  # as the projections lay them out, and as attention wants them
    return run("rotate", compile, rows, cos, sin, backward).view(b, t, heads, d).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
