"""The device that a tensor is computed on.

A dry run (lowalign.plan) computes on the meta device, where tensors have a shape and no data. There a tensor stands for one of
the planned device, and the attention must take that device's path.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_planned_device: ContextVar[str] = ContextVar("planned_device", default="cuda")


def device_type(tensor: Tensor) -> str:
    """ "cpu", "cuda" …; of a meta tensor, the type of the planned device."""
    return _planned_device.get() if tensor.is_meta else tensor.device.type


def compute_device(model: nn.Module) -> torch.device:
    """The device that a model computes on. Its embedding may be in CPU memory; its LM head is not."""
    return model.get_output_embeddings().weight.device


@contextlib.contextmanager
def planned_device(kind: str) -> Iterator[None]:
    """Within it, meta tensors stand for tensors on a device of this type: "cpu" or "cuda"."""
    token = _planned_device.set(kind)
    try:
        yield
    finally:
        _planned_device.reset(token)
