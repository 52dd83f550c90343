"""NF4 on disk: the weights that a 4-bit base computes with, and checkpoints in bitsandbytes' 4-bit format.

Quantized as `Base.load` does: blocks of 64, their scales quantized too (arXiv 2305.14314).
"""

import json
import math
from collections.abc import Callable

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor

from lowalign.errors import UserError
from lowalign.export.weight_files import PlannedTensor, StoredTensor
from lowalign.model.base.base import nf4_config

QUANT_STATE = ".quant_state.bitsandbytes__nf4"  # what a bitsandbytes checkpoint calls a weight's shape and dtype
STATE_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", QUANT_STATE)
STATE_BYTES = 512  # of QUANT_STATE, JSON filled up with spaces: a file's header needs its size before it is known


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


def quantized_tensors(weight: PlannedTensor, transposed: bool) -> list[PlannedTensor]:
    """A linear layer's weight as the tensors of a bitsandbytes 4-bit checkpoint. It is quantized when the first of them is
    written, and freed with the last. transposed: a Conv1D's weight, quantized as its transpose."""
    blocks = math.ceil(math.prod(weight.shape) / 64)
    shapes = {
        "": (torch.uint8, (math.ceil(math.prod(weight.shape) / 2), 1)),
        ".absmax": (torch.uint8, (blocks,)),
        ".quant_map": (torch.float32, (16,)),
        ".nested_absmax": (torch.float32, (math.ceil(blocks / 256),)),
        ".nested_quant_map": (torch.float32, (256,)),
        QUANT_STATE: (torch.uint8, (STATE_BYTES,)),
    }
    parts: dict[str, Tensor] = {}

    def take(part: str) -> Tensor:
        if not parts:
            matrix = weight.make().T.contiguous() if transposed else weight.make()
            parts[""], state = quantize_4bit(matrix, blocksize=64, compress_statistics=True, quant_type="nf4")
            parts.update({f".{key}": tensor for key, tensor in state.as_dict(packed=True).items()})
            spaces = torch.full((STATE_BYTES - len(parts[QUANT_STATE]),), ord(" "), dtype=torch.uint8)
            parts[QUANT_STATE] = torch.cat([parts[QUANT_STATE], spaces])
        return parts.pop(part)

    return [PlannedTensor(weight.name + part, *kind, lambda part=part: take(part)) for part, kind in shapes.items()]


def quantization_config(dtype: str, skipped: str) -> dict:
    """What config.json says of a model in NF4. dtype: of its computations. skipped: the head, which stays in 16 bit."""
    return json.loads(nf4_config(getattr(torch, dtype), skipped).to_json_string(use_diff=False))
