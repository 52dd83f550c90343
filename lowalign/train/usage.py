"""What a run has used: tokens, seconds, memory."""

import re
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from lowalign.config.cards import GIB


class Usage:
    """Tokens and wall-clock seconds of a run, over all its resumptions; peak memory of this process on `device`.

    seconds: with evaluations and checkpoints, without loading and the time between a stop and its resume.
    """

    def __init__(self, device: torch.device) -> None:
        self.tokens, self._before, self._started, self._device = 0, 0.0, time.monotonic(), device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def restore(self, metrics: Mapping[str, float]) -> None:
        """Go on from the metrics in a checkpoint."""
        self.tokens, self._before = int(metrics.get("tokens", 0)), metrics.get("seconds", 0.0)

    def metrics(self) -> dict[str, float]:
        """tokens, seconds, and peak_gpu_memory_gib (torch's allocator, of the run) or peak_process_memory_gib (resident, of the
        process since it began)."""
        return {
            "tokens": self.tokens,
            "seconds": self._before + time.monotonic() - self._started,
            **peak_memory(self._device),
        }


def peak_memory(device: torch.device) -> dict[str, float]:
    """In GiB, under a name that says what was measured; empty where the system does not tell."""
    if device.type == "cuda":
        return {"peak_gpu_memory_gib": torch.cuda.max_memory_allocated(device) / GIB}
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss is that of the parent where it was larger
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return {"peak_process_memory_gib": int(found[1]) * 1024 / GIB} if found else {}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    return {"peak_process_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB}  # bytes on macOS
