"""Attention to one block of keys that also returns its log-sum-exp, so that several blocks can be joined exactly."""

import inspect
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from lowalign.log import log


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """(B, H, Q, D) on (B, H, K, D) -> (B, H, Q, D) and the log-sum-exp of the scores (B, H, Q) in fp32 (fp64 for fp64).

    mask: bool, broadcast to (B, H, Q, K); where a query sees nothing the result is 0 and the log-sum-exp -inf.
    """
    if query.device.type == "cpu" and not softcap and key.shape[-1] == value.shape[-1]:
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(query, key, value, attn_mask=bias, scale=scale)
        # The kernel says 0 where nothing is seen.
        return out, lse if mask is None else lse.masked_fill(~mask.any(-1), -torch.inf)
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(exact) @ key.to(exact).mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ value.to(exact)).to(query.dtype), scores.logsumexp(-1)


def varlen_applies(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> bool:
    """Whether the flash kernel for ragged batches can stand in for `attend`: on CUDA, in 16 bit, without a soft cap."""
    if not query.is_cuda or softcap or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    same = key.shape[-1] == value.shape[-1]
    return same and _varlen_is_right(query.device, query.dtype, query.shape[1], key.shape[1], key.shape[-1])


def varlen(query, key, value, query_bounds, key_bounds, longest_query, longest_key, scale, window, used=None):
    """(T, H, D) on (S, Hkv, D) -> (T, H, D), log-sum-exp (T, H). used (sequences,): how many of its keys count."""
    out, lse = torch_varlen.varlen_attn(
        query, key, value, query_bounds, key_bounds, longest_query, longest_key,
        return_aux=torch_varlen.AuxRequest(lse=True), scale=scale, window_size=window,
        enable_gqa=query.shape[1] != key.shape[1], seqused_k=used,
    )  # fmt: skip
    return out, lse.T


@lru_cache(maxsize=8)
def _varlen_is_right(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> bool:
    """Whether this torch has the kernel with all that is asked of it, and it agrees with `attend` on random numbers."""
    why = f"torch {torch.__version__} has no varlen_attn with enable_gqa and seqused_k"
    if {"return_aux", "enable_gqa", "seqused_k"} <= set(inspect.signature(torch_varlen.varlen_attn).parameters):
        try:
            error = _varlen_error(device, dtype, heads, kv_heads, dim)
            why = f"varlen_attn is off by {error:.1e}"
        except (RuntimeError, ValueError, TypeError) as refused:
            error, why = torch.inf, f"varlen_attn refuses: {str(refused).splitlines()[0]}"
        if error < 0.05:  # 16-bit rounding of numbers around 1 gives a few thousandths
            return True
    log(f"sampling computes attention prompt by prompt, slower with the same results ({why})")
    return False


def _varlen_error(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> float:
    """Largest difference from `attend` over the four ways it is called, on two sequences each."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for queries, lengths, used, window in [
        ([1, 1], [6, 6], [2, 5], None),  # a sample's own tokens: one query, part of a buffer
        ([1, 1], [6, 6], [2, 5], 3),
        ([3, 2], [5, 4], None, None),  # samples on their prompt
        ([3, 2], [5, 4], None, 3),  # a prompt behind a prefix: causal, bottom right
    ]:
        shapes = (sum(queries), heads, dim), *2 * [(sum(lengths), kv_heads, dim)]
        q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        bounds = cumulative(queries, device), cumulative(lengths, device), max(queries), max(lengths)
        counts = None if used is None else torch.tensor(used, device=device, dtype=torch.int32)
        got = varlen(q, k, v, *bounds, dim**-0.5, (window - 1, 0) if window else (-1, -1), counts)
        at = 0
        split = zip(q.split(queries), k.split(lengths), v.split(lengths), used or lengths, strict=True)
        for q_one, k_one, v_one, count in split:
            places = torch.arange(count, device=device)
            mask = visible(places[count - len(q_one) :], places, window) if window else None
            each = [x.repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)[None] for x in (q_one, k_one, v_one)]
            out, lse = attend(each[0], each[1][:, :, :count], each[2][:, :, :count], dim**-0.5, mask)
            for mine, theirs in zip(got, (out[0].transpose(0, 1), lse[0].T), strict=True):
                worst = max(worst, float((mine[at : at + len(q_one)] - theirs).abs().max()))
            at += len(q_one)
    return worst


def visible(at: Tensor, places: Tensor, window: int | None) -> Tensor:
    """(queries, keys) bool: whether a query at one place sees the key at another: not a later one, none outside the window."""
    behind = at[:, None] - places
    return (behind >= 0) & (behind < window) if window else behind >= 0


def cumulative(lengths: list[int], device: torch.device) -> Tensor:
    """(sequences + 1,) int32: where each begins, and the end."""
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device)
