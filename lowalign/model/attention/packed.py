"""Attention over a Pack: a prompt is computed once, however many completions hang on it.

One implementation, "lowalign", is registered with transformers. What it does is told by a keyword of the model's forward,
never by a switch, so a recomputation during the backward does what its forward did:
`layout=` the segments of a Pack; `rollout=` the sampler's state; neither: ordinary causal attention.
"""

import contextlib
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen as torch_varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowalign.data.pack import Segment
from lowalign.log import log
from lowalign.model.attention.blockwise import cumulative, visible
from lowalign.model.attention.sampler_cache import rollout_attention
from lowalign.model.attention.soft_prompt import NO_SOFT_PROMPT, KeysValues, SoftPrompt

NAME = "lowalign"
SCORES = 2**20  # on the CPU: most attention scores of a head that are written out in the backward

# What models hand to every attention function and what does not change the result here.
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "is_causal"}


class UnsupportedAttentionError(Exception):
    """The model asks its attention for something the packed kernel does not do."""


@dataclass
class Layout:
    """What a packed forward tells each attention layer.

    segments: in row order. soft: its keys and values are put before every prompt here, its embeddings are in the row.
    """

    segments: tuple[Segment, ...]
    soft: SoftPrompt = NO_SOFT_PROMPT
    masks: dict[tuple, Tensor] = field(default_factory=dict)
    _gather: dict[torch.device, tuple] = field(default_factory=dict)

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """(queries, keys) bool: which keys each query sees; the last query sees the last key."""
        key = (queries, keys, window)
        if key not in self.masks:
            places = torch.arange(keys, device=device)
            self.masks[key] = visible(places[keys - queries :], places, window)
        return self.masks[key]

    def gather(self, device: torch.device) -> tuple[Tensor | None, Tensor, Tensor, int, int]:
        """For one varlen call: key index (or None: the row as it stands), cumulative query and key lengths, longest ones."""
        if device not in self._gather:
            prefix = self.soft.prefix_length
            starts, index, lengths, at = [], [], [], prefix
            for segment in self.segments:
                starts.append(at)
                own = range(at, at + segment.length)
                parent = segment.parent
                before = () if parent is None else range(starts[parent], starts[parent] + self.segments[parent].length)
                keys = [*range(prefix), *before, *own]
                index += keys
                lengths.append(len(keys))
                at += segment.length
            as_is = not prefix and all(s.parent is None for s in self.segments)
            bounds = [cumulative(x, device) for x in ([s.length for s in self.segments], lengths)]
            longest = max(s.length for s in self.segments), max(lengths)
            self._gather[device] = (None if as_is else torch.tensor(index, device=device), *bounds, *longest)
        return self._gather[device]


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """(B, H, Q, D) on (B, Hkv, K, D) -> (B, H, Q, D). mask (Q, K) bool; None: causal, Q = K."""
    if softcap is None:
        on_cpu = query.device.type == "cpu" and query.shape[2] * key.shape[2] <= SCORES
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
        b, heads, n, d = query.shape
        kv, k = key.shape[1:3]
        if mask is None:
            mask = torch.ones(n, k, dtype=torch.bool).tril()
        bias = torch.zeros(n, k, dtype=query.dtype).masked_fill_(~mask, float("-inf")).repeat(heads // kv, 1)
        # The heads that share keys stand beside each other, as rows of one product.
        rows = lambda x: x.reshape(b * kv, heads // kv * n, d)  # noqa: E731
        q, g, (keys, values) = rows(query), rows(grad), (x.reshape(b * kv, k, d) for x in (key, value))
        p = torch.baddbmm(bias, q, keys.mT, alpha=ctx.scale).softmax(-1)
        d_scores = torch._softmax_backward_data(g @ values.mT, p, -1, p.dtype).mul_(ctx.scale)
        d_key, d_value = (d_scores.mT @ q).view_as(key), (p.mT @ g).view_as(value)
        return (d_scores @ keys).view_as(query), d_key, d_value, None, None


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D).

    A segment attends causally to itself and to all that stands before it: the prefix, then its prompt.
    """
    prefix = layout.soft.layer(layer, key.dtype)
    if _varlen_works(query, softcap):
        return _varlen(query, key, value, layout, prefix, scale, window)
    lengths = [s.length for s in layout.segments]
    # split, never slice: the backward of a slice is a full-size zero tensor for every segment.
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    outputs = []
    for i, segment in enumerate(layout.segments):
        seen = [] if prefix is None else [prefix]
        if segment.parent is not None:
            seen.append((keys[segment.parent], values[segment.parent]))
        seen.append((keys[i], values[i]))
        k, v = seen[0] if len(seen) == 1 else (torch.cat(x, 2) for x in zip(*seen, strict=True))
        n, total = segment.length, k.shape[2]
        whole = n == total and not (window and window < total)
        mask = None if whole else layout.mask(n, total, window, k.device)
        outputs.append(attend(queries[i], k, v, mask, scale, softcap))
    return torch.cat(outputs, 2).transpose(1, 2)


def _varlen_works(query: Tensor, softcap: float | None) -> bool:
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if softcap is not None or query.shape[-1] > 256:
        _notice("the flash kernel has no soft cap and heads of at most 256")
        return False
    return True


@cache
def _notice(reason: str) -> None:
    log(f"attention is computed segment by segment, slower with the same results: {reason}")


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    prefix: KeysValues | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """All segments in one call of the flash kernel: queries as they stand, keys gathered per segment."""
    if prefix is not None:
        key, value = (torch.cat([p, x], 2) for p, x in zip(prefix, (key, value), strict=True))
    index, cu_q, cu_k, longest_q, longest_k = layout.gather(query.device)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if index is not None:
        key, value = key.index_select(0, index), value.index_select(0, index)
    groups, options = query.shape[1] // key.shape[1], {}
    if groups > 1 and "enable_gqa" in inspect.signature(torch_varlen.varlen_attn).parameters:
        options["enable_gqa"] = True
    elif groups > 1:  # torch before 2.13
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # The kernel's window counts the tokens to the left, ours counts the token itself too.
    window_size = (window - 1 if window else -1, 0)
    out = torch_varlen.varlen_attn(
        query, key, value, cu_q, cu_k, longest_q, longest_k, scale=scale, window_size=window_size, **options
    )
    return out[None]


_without_mask: ContextVar[bool] = ContextVar("without_mask", default=False)


@contextlib.contextmanager
def no_mask() -> Iterator[None]:
    """Around a forward with `layout=` or `rollout=`: transformers would build a T x T mask that nobody reads."""
    token = _without_mask.set(True)
    try:
        yield
    finally:
        _without_mask.reset(token)


def _mask(*args, **kwargs) -> Tensor | None:
    return None if _without_mask.get() else sdpa_mask(*args, **kwargs)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    rollout=None,
    **kwargs,
) -> tuple[Tensor, None]:
    if rollout is not None:
        keep = {k: kwargs.get(k) for k in ("sliding_window", "softcap", "s_aux")}
        return rollout_attention(module, query, key, value, scaling, **keep, rollout=rollout)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, softcap = kwargs.pop("sliding_window", None), kwargs.pop("softcap", None)
    if layout is None:
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        mask = attention_mask if attention_mask is None or attention_mask.dtype == torch.bool else attention_mask == 0
        return attend(query, key, value, mask, scale, softcap).transpose(1, 2).contiguous(), None
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS)
    if unknown or dropout:
        raise UnsupportedAttentionError(f"the attention keyword {', '.join(unknown) or 'dropout'}")
    return packed_attention(query, key, value, layout, module.layer_idx, scale, window, softcap), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
