"""Which failures of a device count as memory that ran out."""

import pytest
import torch

from lowalign.data.micro_batches import out_of_memory


def failing(error: Exception):
    def compute() -> None:
        raise error

    return compute


def test_every_out_of_memory_is_one():
    """PyTorch's allocator raises OutOfMemoryError; the driver (pinned memory, a kernel that is loaded late) its own error, which
    is no subclass of it."""
    assert not issubclass(torch.AcceleratorError, torch.OutOfMemoryError)
    ours = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    drivers = torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
    assert out_of_memory(failing(ours)) == "CUDA out of memory. Tried to allocate 2 GiB"
    assert out_of_memory(failing(drivers)) == "CUDA error: out of memory"
    assert out_of_memory(lambda: None) is None


def test_other_failures_of_the_device_are_not():
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        out_of_memory(failing(torch.AcceleratorError("CUDA error: an illegal memory access was encountered")))
