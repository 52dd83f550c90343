"""One process at a time works in a run's folder.

OUT/.lock       locked by the process; the system frees it when the process ends, however it ends
OUT/.lock.pid   the id of that process, for the message to others
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from lowalign import processes
from lowalign.durable import check_disk
from lowalign.errors import UserError

RESULTS = 50_000_000  # bytes that are free before a verb starts to work
_held_here: set[Path] = set()


@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Lock the folder of a run, and make it if it is missing. This process may nest it. Of the processes of one run only the
    first does.

    Raises UserError when another process holds it, or when it cannot be made or locked.
    """
    path = (out / ".lock").resolve()
    if path in _held_here or not processes.is_main():
        yield
        return
    # Not in the lock's own file: filelock may empty it, and on Windows nobody can read it while it is locked.
    pid_file = path.with_name(".lock.pid")
    file_lock = FileLock(path, fallback_to_soft=False)  # a file in place of a lock would outlive a kill
    try:
        check_disk(out, RESULTS, "results take at least")
        out.mkdir(parents=True, exist_ok=True)
        file_lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{out} is in use by {_holder(pid_file)}; wait for it, or choose another --out") from None
    except OSError as error:
        raise UserError(f"{out} cannot be the folder of a run: {error.strerror}") from error
    try:
        _held_here.add(path)
        with contextlib.suppress(OSError):  # a full disk: the folder is locked all the same
            pid_file.write_text(str(os.getpid()))
        yield
    finally:
        _held_here.discard(path)
        with contextlib.suppress(OSError):
            pid_file.unlink()
        file_lock.release()


def in_use(out: Path) -> bool:
    """Whether a process of this machine works in the folder. Locks nothing, so it disturbs no run that begins."""
    pid_file = out / ".lock.pid"
    try:
        process = psutil.Process(int(pid_file.read_text()))
        return process.create_time() <= pid_file.stat().st_mtime + 1  # else a later process got the id of a killed one
    except (OSError, ValueError, psutil.Error):
        return False


def _holder(pid_file: Path) -> str:
    try:
        return f"process {pid_file.read_text()}".rstrip()
    except OSError:
        return "another process"
