"""The device that a tensor is computed on.

A dry run (lowalign.plan) computes on the meta device, where tensors have a shape and no data. There a tensor stands for one of
the planned device, and the attention must take that device's path.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

_planned_device: ContextVar[str] = ContextVar("planned_device", default="cuda")


def device_type(tensor: Tensor) -> str:
    """ "cpu", "cuda" …; of a meta tensor, the type of the planned device."""
    return _planned_device.get() if tensor.is_meta else tensor.device.type


@contextlib.contextmanager
def planned_device(kind: str) -> Iterator[None]:
    """Within it, meta tensors stand for tensors on a device of this type: "cpu" or "cuda"."""
    token = _planned_device.set(kind)
    try:
        yield
    finally:
        _planned_device.reset(token)
