"""torch's fused attention kernels on the meta device, where scaled_dot_product_attention would compute all scores."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lowalign.model.attention.device import device_type

ops = torch.ops.aten


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Within it scaled_dot_product_attention of meta tensors calls the kernel that the planned device would use.

    A TorchFunctionMode would not do: it is off in a backward, and so in the recomputation of activations.
    """
    stock = F.scaled_dot_product_attention

    def attention(query: Tensor, *args, **kwargs) -> Tensor:
        return _fused(query, *args, **kwargs) if query.is_meta else stock(query, *args, **kwargs)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock


def _fused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    bias = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
    if device_type(query) == "cpu":
        kernel = ops._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale)[0]
    groups = query.shape[1] // key.shape[1]
    if enable_gqa and groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    if bias is None and query.dtype != torch.float32:
        return ops._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if bias is not None:
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    arguments = (query, key, value, bias, query.requires_grad or key.requires_grad, dropout_p, is_causal)
    return ops._scaled_dot_product_efficient_attention(*arguments, scale=scale)[0]
