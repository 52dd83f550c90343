"""How much of a card's memory may be used: all but what is left free, for fragmentation and other programs."""

import torch

from lowalign.config.cards import GIB


def usable(device: torch.device | str | int, leave_free: float) -> int:
    """Bytes that tensors may take on a CUDA device, those of this process that are there already included.

    leave_free: GiB.
    """
    index = _index(device)
    return torch.cuda.mem_get_info(index)[0] + torch.cuda.memory_reserved(index) - int(leave_free * GIB)


def limit(device: torch.device | str, leave_free: float) -> None:
    """Let PyTorch's allocator say that memory has run out before the card is full. A lower limit is kept.

    Without it the drivers of Windows and WSL2 move memory to the system's, and say nothing.
    """
    index = _index(device)
    fraction = max(0.0, usable(index, leave_free) / torch.cuda.mem_get_info(index)[1])
    torch.cuda.set_per_process_memory_fraction(min(torch.cuda.get_per_process_memory_fraction(index), fraction), index)


def free(device: torch.device | str, leave_free: float) -> int:
    """Bytes that more tensors may take."""
    return usable(device, leave_free) - torch.cuda.memory_allocated(_index(device))


def _index(device: torch.device | str | int) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index
