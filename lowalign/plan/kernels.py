"""What a kernel costs that its tensors do not show: FLOPs, and memory that it allocates inside."""

from math import prod

from torch.utils.flop_counter import flop_registry

from lowalign.model.attention.device import device_type

# Operations that launch no kernel.
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "detach", "slice", "select", "alias", "expand", "unsqueeze", "squeeze", "split",
    "as_strided", "permute", "reshape", "unbind", "split_with_sizes", "empty", "empty_like", "empty_strided", "unflatten",
    "diagonal", "unfold", "lift_fresh", "new_empty",
}  # fmt: skip
FUSED_ROWS = 64  # on a card; for more rows, bitsandbytes dequantizes the weight and multiplies with it


def flops(func, args, kwargs, out) -> int:
    """Floating-point operations of matrix products and attention; 0 for the rest, which memory bandwidth bounds."""
    name = func._schema.name
    if name == "bitsandbytes::gemm_4bit":
        return 2 * args[0].numel() * args[2][0]
    if name.startswith("torch_attn::_varlen_attn"):
        return _varlen_flops(name, args)
    packet = func.overloadpacket
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0


def workspace(name: str, args) -> int:
    """Bytes that a kernel allocates inside and frees when it ends.

    gemm_4bit (bitsandbytes): the dequantized weight. The flash kernel's backward: the gradient of the queries in fp32, and
    with grouped heads the gradients of keys and values for every query head (flash_api.cpp of PyTorch).
    """
    if name == "gemm_4bit":
        rows = args[0].numel() // args[0].shape[-1]
        fused = rows <= FUSED_ROWS and device_type(args[0]) != "cpu"
        return 0 if fused else prod(args[2]) * args[0].element_size()
    if name == "_varlen_attn_backward":
        query, key = args[1], args[2]
        grouped = 2 * key.shape[0] * query.shape[1] * query.shape[2] * key.element_size()
        return 4 * query.numel() + (grouped if key.shape[1] != query.shape[1] else 0)
    return 0


def _varlen_flops(name: str, args) -> int:
    """Two products forward, five backward; causal, so half of the scores. The lengths of sequences are data, which a dry run
    does not have: all have the longest one's."""
    if name.endswith("backward"):
        query, longest_key, products = args[1], args[9], 5
    else:
        query, longest_key, products = args[0], args[6], 2
    tokens, heads, size = query.shape
    return products * tokens * longest_key * heads * size
