"""Attention to one block of keys that also returns its log-sum-exp, so that several blocks can be joined exactly."""

import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from lowalign.log import log
from lowalign.model.attention.device import device_type


@dataclass(frozen=True)
class LayerAttention:
    """How a layer attends. index: of the layer. window: tokens a query sees, with itself. softcap: bound on the scores."""

    index: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    @property
    def window_size(self) -> tuple[int, int]:
        """(tokens to the left, tokens to the right) of a causal call of the flash kernel; -1: no bound."""
        return self.window - 1 if self.window else -1, 0


class VarlenBounds(NamedTuple):
    """Sequences laid end to end, as the flash kernel takes them.

    queries, keys (sequences + 1,) int32: where each sequence starts, and the end of the last one.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, query_lengths: list[int], key_lengths: list[int], device: torch.device) -> "VarlenBounds":
        """From the lengths of the sequences."""
        queries, keys = (cumulative(lengths, device) for lengths in (query_lengths, key_lengths))
        return cls(queries, keys, max(query_lengths), max(key_lengths))


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """(B, H, Q, D) on (B, H, K, D) -> (B, H, Q, D) and the log-sum-exp of the scores (B, H, Q) in fp32 (fp64 for fp64).

    mask: bool, broadcast to (B, H, Q, K). Where a query sees no key the result is 0 and the log-sum-exp -inf.
    """
    if device_type(query) == "cpu" and not softcap and key.shape[-1] == value.shape[-1]:
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(query, key, value, attn_mask=bias, scale=scale)
        # The kernel returns a log-sum-exp of 0 for a query that sees no key.
        return out, lse if mask is None else lse.masked_fill(~mask.any(-1), -torch.inf)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(dtype) @ key.to(dtype).mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ value.to(dtype)).to(query.dtype), scores.logsumexp(-1)


def flash_has_shape(query: Tensor, value: Tensor) -> bool:
    """Whether the flash kernel has these heads: at most 256, a multiple of 8, and of the same size for the values."""
    size = query.shape[-1]
    return size <= 256 and size % 8 == 0 and value.shape[-1] == size


def varlen_applies(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> bool:
    """Whether the flash kernel can replace `block_attention`: on CUDA, in 16 bit, without a soft cap."""
    if device_type(query) != "cuda" or softcap or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not flash_has_shape(query, value):
        return False
    # A dry run has no numbers to compare.
    return query.is_meta or _varlen_is_right(query.device, query.dtype, query.shape[1], key.shape[1], key.shape[-1])


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: VarlenBounds, scale: float, window_size: tuple[int, int],
    keys_used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The flash kernel: (T, H, D) on (S, Hkv, D) -> (T, H, D) and the log-sum-exp (T, H).

    keys_used (sequences,) int32: how many keys of each sequence count; None: all.
    """
    out, lse = torch_varlen.varlen_attn(
        query, key, value, *bounds, return_aux=torch_varlen.AuxRequest(lse=True), scale=scale,
        window_size=window_size, enable_gqa=query.shape[1] != key.shape[1], seqused_k=keys_used,
    )  # fmt: skip
    return out, lse.T


@lru_cache(maxsize=8)
def _varlen_is_right(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> bool:
    """Whether this torch has the kernel with every option we use, and it agrees with `block_attention`."""
    reason = f"torch {torch.__version__} has no varlen_attn with enable_gqa and seqused_k"
    if {"return_aux", "enable_gqa", "seqused_k"} <= set(inspect.signature(torch_varlen.varlen_attn).parameters):
        try:
            error = _varlen_error(device, dtype, heads, kv_heads, dim)
            reason = f"varlen_attn is off by {error:.1e}"
        except (RuntimeError, ValueError, TypeError) as refusal:
            error, reason = torch.inf, f"varlen_attn refuses: {str(refusal).splitlines()[0]}"
        if error < 0.05:  # rounding numbers around 1 to 16 bit gives a few thousandths
            return True
    log(f"sampling computes attention prompt by prompt, slower with the same results ({reason})")
    return False


def _varlen_error(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> float:
    """Largest difference from `block_attention` on random numbers, over the ways the kernel is called, with few keys and with many."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for query_lengths, key_lengths, used, window in [
        ([1, 1], [6, 6], [2, 5], None),  # a sample's own tokens: one query, part of a buffer
        ([1, 1], [6, 6], [2, 5], 3),
        ([3, 2], [5, 4], None, None),  # samples on their prompt
        ([3, 2], [5, 4], None, 3),  # a prompt behind a prefix: causal, the last query sees the last key
        # Over 128 keys the kernel may split them for one query and join the parts.
        ([1, 1], [320, 320], [310, 129], None),
        ([1, 1], [320, 320], [310, 129], 200),
        ([3, 140], [300, 301], None, None),
    ]:
        shapes = (sum(query_lengths), heads, dim), *2 * [(sum(key_lengths), kv_heads, dim)]
        q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        bounds = VarlenBounds.of(query_lengths, key_lengths, device)
        keys_used = None if used is None else torch.tensor(used, device=device, dtype=torch.int32)
        results = varlen_attention(q, k, v, bounds, dim**-0.5, (window - 1, 0) if window else (-1, -1), keys_used)
        start = 0
        sequences = zip(q.split(query_lengths), k.split(key_lengths), v.split(key_lengths), strict=True)
        for sequence, count in zip(sequences, used or key_lengths, strict=True):
            queries = len(sequence[0])
            places = torch.arange(count, device=device)
            mask = visible(places[count - queries :], places, window) if window else None
            q1, k1, v1 = (x.repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)[None] for x in sequence)
            out, lse = block_attention(q1, k1[:, :, :count], v1[:, :, :count], dim**-0.5, mask)
            for result, expected in zip(results, (out[0].transpose(0, 1), lse[0].T), strict=True):
                worst = max(worst, float((result[start : start + queries] - expected).abs().max()))
            start += queries
    return worst


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Positions (Q,) and (K,) -> (Q, K) bool: whether the query sees the key, which is not later and in the window."""
    distance = queries[:, None] - keys
    return (distance >= 0) & (distance < window) if window else distance >= 0


def cumulative(lengths: list[int], device: torch.device) -> Tensor:
    """(sequences + 1,) int32: where each sequence starts, and the end of the last one."""
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device)
