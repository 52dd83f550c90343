"""Memory of the card."""

import gc

import torch


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """The most memory that tensors took since `release`, and that PyTorch held for them; nothing on the CPU."""
    if not torch.cuda.is_available():
        return {}
    held = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
    return {name: round(size / 2**30, 2) for name, size in held.items()}
