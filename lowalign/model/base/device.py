"""The device of --base.device."""

import torch

from lowalign import processes
from lowalign.errors import UserError


def device_of(name: str) -> str:
    """The device that a name means: auto is the GPU of this process if there is one, else the CPU.

    Raises UserError for one that is unknown or absent.
    """
    if name == "auto":
        return processes.device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--base.device {name} is no device; use auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UserError(f"--base.device {name}: there is no GPU that PyTorch can use (`lowalign doctor`); use cpu")
        if (device.index or 0) >= count:
            raise UserError(f"--base.device {name}: there are {count} GPUs, cuda:0 to cuda:{count - 1}")
    elif device.type != "cpu" and not getattr(getattr(torch, device.type, None), "is_available", bool)():
        raise UserError(f"--base.device {name}: this machine has no such device; use auto, cpu or cuda")
    return name
