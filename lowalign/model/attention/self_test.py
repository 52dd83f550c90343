"""A self-test of the attention that trains: its forward and backward on a device, against plain masked attention.

A kernel that ignores a window, a prompt or the grouping of heads gives finite numbers and a falling loss. So each kernel is
compared once, on the device and in the precision that it runs in, before it computes anything that is kept.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowalign.data.pack import Segment
from lowalign.model.attention.blockwise import LayerAttention
from lowalign.model.attention.soft_prompt import KeysValues

Attend = Callable[[Tensor, Tensor, Tensor, Sequence[Segment], KeysValues | None, LayerAttention], Tensor]

TOLERANCE = 0.04  # of the norm; rounding to bf16 gives 0.009, a window that is one key too long 0.13
# Over 300 keys, which the flash kernel reads in several blocks; a completion of one token; an Example without a prompt.
FAMILY = (Segment(150), Segment(160, 0), Segment(1, 0), Segment(40), Segment(5), Segment(30, 4))
ALONE = (Segment(310), Segment(40))
PREFIX = 6
CASES = [(FAMILY, 0, None), (FAMILY, PREFIX, 64), (ALONE, 0, 64), (ALONE, PREFIX, None)]


def attention_error(
    attend: Attend, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int, value_size: int
) -> float:
    """The largest distance of an output or a gradient from plain attention in fp32, relative to its norm.

    attend: (query (1, H, T, D), key (1, Hkv, T, D), value (1, Hkv, T, Dv), segments, prefix, layer) -> (1, T, H, Dv).
    """
    generator, errors = torch.Generator().manual_seed(0), []
    for segments, prefix, window in CASES:
        tokens = sum(s.length for s in segments)
        counts = (heads, tokens, size), (kv_heads, prefix + tokens, size), (kv_heads, prefix + tokens, value_size)
        numbers = [torch.randn(1, *count, generator=generator) for count in counts]
        numbers[0] *= 3  # so that a few keys decide, and each matters to someone
        weight = torch.randn(1, tokens, heads, value_size, generator=generator).to(device)
        layer = LayerAttention(0, size**-0.5, window)

        def split(query: Tensor, key: Tensor, value: Tensor, segments=segments, prefix=prefix, layer=layer) -> Tensor:
            before = (key[:, :, :prefix], value[:, :, :prefix]) if prefix else None
            return attend(query, key[:, :, prefix:], value[:, :, prefix:], segments, before, layer)

        def plain(query: Tensor, key: Tensor, value: Tensor, segments=segments, prefix=prefix, window=window) -> Tensor:
            return _plain(query, key, value, sees(segments, prefix, window).to(query.device))

        rounded = [x.to(device, dtype) for x in numbers]
        results, expected = (
            _with_gradients(f, rounded, weight, t) for f, t in ((split, dtype), (plain, torch.float32))
        )
        errors += [(x.float() - y).norm() / y.norm() for x, y in zip(results, expected, strict=True)]
    return torch.stack(errors).max().item()  # NaN, if one of them is


def sees(segments: Sequence[Segment], prefix: int, window: int | None) -> Tensor:
    """(T, prefix + T) bool: a token sees the prefix, its segment's parent, and its segment up to itself; with a window, the
    last `window` of these."""
    lengths = torch.tensor([s.length for s in segments])
    own = torch.arange(len(segments)).repeat_interleave(lengths)
    parent = torch.tensor([-1 if s.parent is None else s.parent for s in segments])[own]
    place = torch.cat([torch.arange(n) for n in lengths])
    place += prefix + torch.where(parent < 0, 0, lengths[parent])  # in the keys that its segment sees
    distance = place[:, None] - torch.cat([torch.arange(prefix), place])
    shared = (own[:, None] == own) | (parent[:, None] == own)
    seen = torch.cat([torch.ones(len(own), prefix, dtype=torch.bool), shared], 1) & (distance >= 0)
    return seen & (distance < window) if window else seen


def _plain(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _with_gradients(
    function: Callable[..., Tensor], numbers: Sequence[Tensor], weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The output, and the gradients of query, key and value."""
    with torch.enable_grad():
        inputs = [x.to(dtype).detach().requires_grad_() for x in numbers]
        out = function(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, weight.to(dtype))
