"""Whole or absent: files are written aside, flushed to the disk, then renamed.

Between these steps stand write points. A test names one in LOWALIGN_KILL_AT (NAME, or NAME:3 for the third time it is
passed) and the process kills itself there, as a power cut would.
"""

import hashlib
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

WRITE_POINTS = (
    "save-begin",
    "save-weights",
    "save-optimizer",
    "save-method",
    "save-state",
    "save-renamed",
    "rotate-aside",
    "rotate-done",
    "best-written",
    "best-replaced",
    "metrics-line",
    "metrics-cut-written",
    "metrics-cut-replaced",
)
_passed: Counter[str] = Counter()


def write_point(name: str) -> None:
    """One of WRITE_POINTS has been reached."""
    assert name in WRITE_POINTS, name
    wanted, _, count = os.environ.get("LOWALIGN_KILL_AT", "").partition(":")
    if name == wanted:
        _passed[name] += 1
        if _passed[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(path: Path, write: Callable[[Path], object], point: str) -> None:
    """Make `path` what `write` puts into the file it is given: at any moment the old content or the new is there.

    point: the two write points passed are POINT-written and POINT-replaced.
    """
    temp = path.with_name(f".saving-{path.name}")
    try:
        write(temp)
        sync(temp)
        write_point(f"{point}-written")
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    sync(path.parent)
    write_point(f"{point}-replaced")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def content_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
