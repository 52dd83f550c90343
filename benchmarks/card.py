"""GPU memory: release it, and read its peaks."""

import gc

import torch


def release() -> None:
    """Free unused memory, and count peaks from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """GiB since `release`: peak of the tensors, and peak of what PyTorch reserved for them; {} on the CPU."""
    if not torch.cuda.is_available():
        return {}
    sizes = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
    return {name: round(size / 2**30, 2) for name, size in sizes.items()}
