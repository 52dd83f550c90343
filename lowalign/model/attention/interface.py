"""The attention function "lowalign", registered with transformers.

A keyword of the model's forward chooses what it computes, never a global switch, so a recomputation during the backward
repeats its forward: `layout=` the segments of a Pack; `sampler_cache=` the sampler's keys and values; neither: ordinary
causal attention. `layer_part=` takes the place of the computation, for a layer in tiles (lowalign.model.forward.tiled).
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowalign.model.attention.blockwise import LayerAttention
from lowalign.model.attention.packed import dense_attention, packed_attention
from lowalign.model.attention.sampler_cache import sampler_attention

ATTN_IMPLEMENTATION = "lowalign"

# Keywords that models pass to every attention function and that do not change the result here.
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "is_causal"}


class UnsupportedAttentionError(Exception):
    """The model passes its attention a keyword that packed attention does not implement."""


_without_mask: ContextVar[bool] = ContextVar("without_mask", default=False)


@contextlib.contextmanager
def no_mask() -> Iterator[None]:
    """For a forward with `layout=` or `sampler_cache=`: keeps transformers from building a T x T mask that is not used."""
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
    **kwargs,
) -> tuple[Tensor, None]:
    if (part := kwargs.pop("layer_part", None)) is not None:
        attend = lambda q, k, v: _attention(module, q, k, v, attention_mask, scaling, dropout, **kwargs)[0]  # noqa: E731
        return part(module, attend, query, key, value), None
    layout, sampler_cache = kwargs.pop("layout", None), kwargs.pop("sampler_cache", None)
    window, softcap = kwargs.pop("sliding_window", None), kwargs.pop("softcap", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None and sampler_cache is None:
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        mask = attention_mask if attention_mask is None or attention_mask.dtype == torch.bool else attention_mask == 0
        return dense_attention(query, key, value, mask, scale, softcap).transpose(1, 2).contiguous(), None
    layer = LayerAttention(module.layer_idx, scale, window, softcap)
    if sampler_cache is not None:
        return sampler_attention(query, key, value, sampler_cache, layer, sinks=kwargs.get("s_aux")), None
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS)
    if unknown or dropout:
        raise UnsupportedAttentionError(f"the attention keyword {', '.join(unknown) or 'dropout'}")
    return packed_attention(query, key, value, layout, layer), None


AttentionInterface.register(ATTN_IMPLEMENTATION, _attention)
AttentionMaskInterface.register(ATTN_IMPLEMENTATION, _mask)
