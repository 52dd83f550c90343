"""Attention over a Pack: a prompt is computed once, however many completions continue it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen
from transformers import PretrainedConfig

from lowalign.data.pack import Segment
from lowalign.log import log
from lowalign.model.attention.blockwise import LayerAttention, VarlenBounds, flash_has_shape, visible
from lowalign.model.attention.device import device_type
from lowalign.model.attention.product import emulated
from lowalign.model.attention.self_test import TOLERANCE, attention_error
from lowalign.model.attention.soft_prompt import NO_SOFT_PROMPT, KeysValues, SoftPrompt

MAX_SCORES = 2**20  # on the CPU: the backward writes out all scores of a head, at most this many


@dataclass
class Layout:
    """The segments of a Pack in row order, and the soft prompt whose prefix stands before every prompt."""

    segments: tuple[Segment, ...]
    soft: SoftPrompt = NO_SOFT_PROMPT
    masks: dict[tuple, Tensor] = field(default_factory=dict)
    _gather: dict[torch.device, tuple[Tensor | None, VarlenBounds]] = field(default_factory=dict)

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """(queries, keys) bool: which keys each query sees; the last query sees the last key."""
        key = (queries, keys, window)
        if key not in self.masks:
            places = torch.arange(keys, device=device)
            self.masks[key] = visible(places[keys - queries :], places, window)
        return self.masks[key]

    def gather(self, device: torch.device) -> tuple[Tensor | None, VarlenBounds]:
        """For one call of the flash kernel: indices of the keys (None: the keys as they are), and the bounds."""
        if device not in self._gather:
            prefix = self.soft.prefix_length
            starts, index, key_lengths, start = [], [], [], prefix
            for segment in self.segments:
                starts.append(start)
                own = range(start, start + segment.length)
                parent = segment.parent
                prompt = () if parent is None else range(starts[parent], starts[parent] + self.segments[parent].length)
                keys = [*range(prefix), *prompt, *own]
                index += keys
                key_lengths.append(len(keys))
                start += segment.length
            unchanged = not prefix and all(s.parent is None for s in self.segments)
            bounds = VarlenBounds.of([s.length for s in self.segments], key_lengths, device)
            self._gather[device] = None if unchanged else torch.tensor(index, device=device), bounds
        return self._gather[device]


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """(B, H, Q, D) on (B, Hkv, K, D) -> (B, H, Q, D). mask (Q, K) bool; None: causal, Q = K."""
    if softcap is None:
        on_cpu = device_type(query) == "cpu" and query.shape[2] * key.shape[2] <= MAX_SCORES
        return (_OnCPU.apply if on_cpu and torch.is_grad_enabled() else _fused)(query, key, value, mask, scale)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.mT * scale / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype) @ value


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    causal, grouped = mask is None, query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


class _OnCPU(torch.autograd.Function):
    """torch's fused kernel with another backward: on the CPU its own takes twice as long as these five products."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return _fused(query, key, value, mask, scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, mask = ctx.saved_tensors
        b, heads, n = query.shape[:3]
        kv, k = key.shape[1:3]
        if mask is None:
            mask = torch.ones(n, k, dtype=torch.bool, device=query.device).tril()
        dtype = torch.float32 if emulated(query[0, 0]) else query.dtype
        bias = (
            torch.zeros(n, k, dtype=dtype, device=query.device)
            .masked_fill_(~mask, float("-inf"))
            .repeat(heads // kv, 1)
        )
        # Heads that share keys are adjacent: their queries are the rows of one product.
        rows = lambda x: x.reshape(b * kv, heads // kv * n, x.shape[-1]).to(dtype)  # noqa: E731
        q, g, (keys, values) = (
            rows(query),
            rows(grad),
            (x.reshape(b * kv, k, x.shape[-1]).to(dtype) for x in (key, value)),
        )
        p = torch.baddbmm(bias, q, keys.mT, alpha=ctx.scale).softmax(-1)
        d_scores = torch._softmax_backward_data(g @ values.mT, p, -1, p.dtype).mul_(ctx.scale)
        d_key, d_value = (d_scores.mT @ q).view_as(key), (p.mT @ g).view_as(value)
        d_query = (d_scores @ keys).view_as(query)
        return *(d.to(query.dtype) for d in (d_query, d_key, d_value)), None, None


def packed_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, layer: LayerAttention) -> Tensor:
    """query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D).

    A segment attends causally to itself and to everything before it: the prefix, then its prompt.
    """
    prefix = layout.soft.layer(layer.index, key.dtype)
    attend = _varlen if _varlen_works(query, key, value, layer.softcap) else _by_segment
    return attend(query, key, value, layout, prefix, layer)


def check_attention(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Test the attention that a model of this config trains with, forward and backward. -> why it must not be used; "" if
    it is right. Where only the flash kernel is not, one line is logged and the segments are computed one by one."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = size, getattr(config, "v_head_dim", None) or size
    query, key, value = (
        torch.empty(1, count, 1, width, device=device, dtype=dtype)
        for count, width in ((heads, size), (kv_heads, size), (kv_heads, sizes[1]))
    )
    if _varlen_works(query, key, value, getattr(config, "attn_logit_softcapping", None)):
        return ""
    if device.type == "cpu":  # whose kernels are the same for heads of every size
        sizes = (16, 16) if sizes[0] == sizes[1] else (24, 16)
    return _why_wrong(_by_segment, device, dtype, heads // kv_heads, *sizes)


@lru_cache(maxsize=16)
def _why_wrong(
    attend: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, groups: int, size: int, value_size: int
) -> str:
    """What the self-test says against a way to compute attention; "" if it is right."""

    def call(query, key, value, segments, prefix, layer) -> Tensor:
        soft = SoftPrompt(keys_values=None if prefix is None else [prefix])
        return attend(query, key, value, Layout(tuple(segments), soft), prefix, layer)

    try:
        error = attention_error(call, device, dtype, 2 * groups, 2, size, value_size)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError) as refusal:
        return f"it refuses: {str(refusal).splitlines()[0]}"
    return "" if error < TOLERANCE else f"it is off by {error:.1e} of the norm"


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, prefix: KeysValues | None, layer: LayerAttention
) -> Tensor:
    """Segment by segment, in torch's own attention."""
    lengths = [s.length for s in layout.segments]
    # split, not slices: the backward of a slice makes a full-size zero tensor for every segment.
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    outputs = []
    for i, segment in enumerate(layout.segments):
        blocks = [] if prefix is None else [prefix]
        if segment.parent is not None:
            blocks.append((keys[segment.parent], values[segment.parent]))
        blocks.append((keys[i], values[i]))
        k, v = blocks[0] if len(blocks) == 1 else (torch.cat(x, 2) for x in zip(*blocks, strict=True))
        n, total = segment.length, k.shape[2]
        plain_causal = n == total and not (layer.window and layer.window < total)
        mask = None if plain_causal else layout.mask(n, total, layer.window, k.device)
        outputs.append(dense_attention(queries[i], k, v, mask, layer.scale, layer.softcap))
    return torch.cat(outputs, 2).transpose(1, 2)


def _varlen_works(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> bool:
    if device_type(query) != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if softcap is not None or not flash_has_shape(query, value):
        _log_slow_path("the flash kernel has no soft cap, and heads of at most 256 in multiples of 8, equal for values")
        return False
    if query.is_meta:  # a dry run has no numbers to compare
        return True
    groups, size = query.shape[1] // key.shape[1], query.shape[-1]
    why_wrong = _why_wrong(_varlen, query.device, query.dtype, groups, size, value.shape[-1])
    if why_wrong:
        _log_slow_path(f"the flash kernel was tested, and {why_wrong}")
    return not why_wrong


@cache  # reading a signature takes 29 µs, in every layer of every forward
def _takes_groups(kernel: Callable) -> bool:
    """Whether this torch's kernel takes fewer heads of keys than of queries."""
    return "enable_gqa" in inspect.signature(kernel).parameters


@cache
def _log_slow_path(reason: str) -> None:
    log(f"attention is computed segment by segment, slower with the same results: {reason}")


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, prefix: KeysValues | None, layer: LayerAttention
) -> Tensor:
    """All segments in one call of the flash kernel: queries as they are, keys gathered per segment."""
    if prefix is not None:
        key, value = (torch.cat([p, x], 2) for p, x in zip(prefix, (key, value), strict=True))
    index, bounds = layout.gather(query.device)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if index is not None:
        key, value = key.index_select(0, index), value.index_select(0, index)
    groups, options = query.shape[1] // key.shape[1], {}
    if groups > 1 and _takes_groups(torch_varlen.varlen_attn):
        options["enable_gqa"] = True
    elif groups > 1:  # torch before 2.13
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch_varlen.varlen_attn(
        query, key, value, *bounds, scale=layer.scale, window_size=layer.window_size, **options
    )
    return out[None]
