"""glibc's malloc, set for tensors: freed memory stays with the process.

By default glibc takes each large block from the system and gives it back when it is freed, so that every tensor of a training
step on the CPU is paged in and zeroed anew: 10 to 30 % of a step. Memory that is kept is reused, and peak memory stays the
same.
"""

import ctypes
import os
from pathlib import Path

OPTION = "LOWALIGN_MALLOC"  # "system" leaves malloc as it is
# Numbers of mallopt (malloc.h), and the values for them.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
VALUES = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: 1 << 28}  # no mmap, no trimming, growth in steps of 256 MiB
DRIVERS = ("/proc/driver/nvidia", "/dev/kfd")  # of GPUs: there tensors are not in malloc's memory


def keep_freed_memory() -> bool:
    """Set malloc for this process. -> whether it was set.

    Not with LOWALIGN_MALLOC=system, where the user has set malloc by MALLOC_ variables, beside a GPU, or without glibc.
    """
    own = os.environ.get(OPTION) == "system" or any(name.startswith("MALLOC_") for name in os.environ)
    if own or any(Path(driver).exists() for driver in DRIVERS):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 – glibc alone has it
        accepted = [libc.mallopt(option, value) for option, value in VALUES.items()]
        return all(accepted)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of the process itself
        return False
