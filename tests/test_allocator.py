"""Freed memory stays with the process of the command line."""

import platform
import subprocess
import sys

import pytest

from lowalign import allocator

# Page faults of the fifth block of 64 MiB: each is written as a whole, and freed.
PROGRAM = """
import resource, sys
from lowalign import allocator
allocator.DRIVERS = ()
assert allocator.keep_freed_memory() == (sys.argv[1] == "kept"), "set or not"
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"1") * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(which: str, **environment: str) -> int:
    command = [sys.executable, "-c", PROGRAM, which]
    path = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    return int(subprocess.run(command, env=path | environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again():
    pages = (64 << 20) // 4096
    assert faults("kept") < pages / 100
    # With transparent huge pages a fault brings 2 MiB.
    assert faults("system", LOWALIGN_MALLOC="system") >= pages / 512
    assert faults("system", MALLOC_ARENA_MAX="2") >= pages / 512  # the user's own setting stays


def test_beside_a_gpu_and_without_glibc_nothing_is_set(monkeypatch, tmp_path):
    monkeypatch.setattr(allocator, "DRIVERS", (str(tmp_path),))
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(allocator, "DRIVERS", ())
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert not allocator.keep_freed_memory()
