"""4-bit weights kept in the dtype that they are computed in, for as long as completions are sampled."""

import contextlib
from collections.abc import Callable, Iterator

import bitsandbytes as bnb
import psutil
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from lowalign.config.cards import GIB
from lowalign.log import log
from lowalign.model.attention.device import compute_device
from lowalign.model.attention.product import has_bf16

ops = torch.ops.mkldnn
PACKED_ROWS = 32  # of activations, for which oneDNN chooses the layout
SHARE_OF_FREE_MEMORY = {"auto": 0.5, "on": 0.9}  # that dequantized weights may take


@contextlib.contextmanager
def dequantized(model: nn.Module, choice: str) -> Iterator[None]:
    """Within it, and without gradient, 4-bit layers multiply with dequantized weights that are made once.

    choice: "on", "off", or "auto": on the CPU, where memory allows. It takes the bytes of `dequantized_bytes` for as long as it
    lasts. On the CPU bitsandbytes multiplies with the same weights, made anew for each product: results are equal, bit for
    bit where the weights are not packed.
    """
    layers = _four_bit(model) if _dequantizes(model, choice) else []
    try:
        for layer in layers:
            layer.forward = _dequantized_forward(layer)  # of this layer alone
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def dequantized_bytes(model: nn.Module) -> int:
    """Memory of the model's 4-bit weights in the dtype that they are multiplied in."""
    return sum(m.weight.quant_state.shape.numel() * _kept_dtype(m).itemsize for m in _four_bit(model))


def _four_bit(model: nn.Module) -> list[bnb.nn.Linear4bit]:
    layers = (m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    return [m for m in layers if getattr(m.weight, "quant_state", None) is not None and m.compute_dtype is not None]


def _dequantizes(model: nn.Module, choice: str) -> bool:
    """Whether to dequantize, given the choice and the free memory."""
    device = compute_device(model)
    if choice == "off" or device.type == "meta" or (choice == "auto" and device.type != "cpu"):
        return False
    need = dequantized_bytes(model)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if need <= SHARE_OF_FREE_MEMORY[choice] * free:
        return need > 0
    if choice == "on":
        log(
            f"--sampling.dequantize on needs {need / GIB:.1f} GiB and {free / GIB:.1f} GiB are free: sampling with 4-bit "
            "weights, slower with the same results"
        )
    return False


def _dequantized_forward(layer: bnb.nn.Linear4bit) -> Callable:
    """The product with the dequantized weight, which this function's result holds."""
    dtype, kept = layer.compute_dtype, _kept_dtype(layer)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype).to(kept)
    bias = None if layer.bias is None else layer.bias.to(dtype).to(kept)
    if _packs(weight):
        packed = ops._reorder_linear_weight(weight, PACKED_ROWS)
        return lambda x: ops._linear_pointwise(x.to(dtype), packed, bias, "none", [], "").to(x.dtype)
    return lambda x: F.linear(x.to(dtype).to(kept), weight, bias).to(x.dtype)


def _kept_dtype(layer: bnb.nn.Linear4bit) -> torch.dtype:
    """fp32 where the CPU would emulate products of bf16 (lowalign.model.attention.product)."""
    slow = layer.compute_dtype == torch.bfloat16 and layer.weight.device.type == "cpu" and not has_bf16()
    return torch.float32 if slow else layer.compute_dtype


def _packs(weight: Tensor) -> bool:
    """Whether oneDNN can keep a weight in the layout of the matrix unit: bf16 on CPUs that have one (AVX512-BF16, AMX)."""
    try:
        return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported()
    except AttributeError:  # operators of torch.compile, which another version of torch may not have
        return False
