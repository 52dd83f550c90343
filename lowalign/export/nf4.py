"""The weights that a 4-bit base computes with: quantized as `Base.load` does, and converted back to 16 bit."""

import json
from collections.abc import Callable

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor

from lowalign.errors import UserError
from lowalign.export.weight_files import PlannedTensor, StoredTensor

QUANT_STATE = ".quant_state.bitsandbytes__nf4"  # what a bitsandbytes checkpoint calls a weight's shape and dtype
STATE_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", QUANT_STATE)


def round_trip(weight: Tensor, transposed: bool = False) -> Tensor:
    """A 16-bit weight after quantization and conversion back. transposed: a Conv1D's weight, quantized as its transpose."""
    matrix = weight.T.contiguous() if transposed else weight
    packed, state = quantize_4bit(matrix, blocksize=64, compress_statistics=True, quant_type="nf4")
    plain = dequantize_4bit(packed, state)
    return plain.T.contiguous() if transposed else plain


def dequantized_checkpoint(tensors: dict[str, StoredTensor]) -> dict[str, PlannedTensor]:
    """The tensors of a bitsandbytes 4-bit checkpoint, those in 4 bit converted to 16 bit when they are made.

    Raises UserError for a scheme other than NF4.
    """
    planned = {}
    for name, stored in tensors.items():
        if name.endswith(STATE_PARTS):
            continue
        state = tensors.get(name + QUANT_STATE)
        if state is None and f"{name}.absmax" in tensors:
            raise UserError(f"{stored.file}: {name} is quantized, but not in NF4")
        if state is None:
            planned[name] = PlannedTensor(name, stored.dtype, stored.shape, stored.read)
            continue
        known = json.loads(bytes(state.read().tolist()))
        dtype = getattr(torch, known["dtype"])
        planned[name] = PlannedTensor(name, dtype, tuple(known["shape"]), _dequantize(stored, tensors))
    return planned


def _dequantize(stored: StoredTensor, tensors: dict[str, StoredTensor]) -> Callable[[], Tensor]:
    def make() -> Tensor:
        parts = {name: tensors[stored.name + name].read() for name in STATE_PARTS if stored.name + name in tensors}
        state = QuantState.from_dict(
            {stored.name + name: part for name, part in parts.items()}, device=torch.device("cpu")
        )
        return dequantize_4bit(stored.read(), state)

    return make
