"""Matrix products of 16-bit tensors: in fp32 on CPUs without instructions for bf16, which emulate them two to three times slower.

Sums are in fp32 either way, and the result is rounded to the dtype of the input once, so both agree to rounding.
"""

from functools import cache

import torch
from torch import Tensor

from lowalign.model.attention.device import device_type

SLICE = 2**22  # weights that are in fp32 at a time


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, in), weight (in, out), often the transpose of one that is stored -> (N, out), in the dtype of x."""
    if not emulated(x):
        return x @ weight
    x32, y = x.float(), x.new_empty(len(x), weight.shape[1])
    step = max(64, SLICE // max(len(weight), 1))
    for start in range(0, weight.shape[1], step):
        part = slice(start, start + step)
        y[:, part] = x32 @ weight[:, part].float()
    return y


def emulated(x: Tensor) -> bool:
    """Whether products of x would be emulated. One row is limited by memory, not by its product."""
    return x.dtype == torch.bfloat16 and device_type(x) == "cpu" and len(x) > 1 and not has_bf16()


@cache
def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself. Unknown CPUs do."""
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        return True
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(test is None or test() for test in tests)
