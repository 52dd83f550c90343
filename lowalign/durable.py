"""Atomic writing of files and folders, file hashes, and JSON lines.

Of several processes of one run only the first writes. Content is written under a temporary name, flushed to the disk,
and then renamed. Between these steps are write points. A test names one in LOWALIGN_KILL_AT (NAME, or NAME:3 for the third
time it is reached), and the process kills itself there, like a power cut.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from lowalign import processes
from lowalign.errors import UserError

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
_reached: Counter[str] = Counter()
LARGE = 64 * 2**20  # bytes of a file whose hash is kept
SETTLED = 2.0  # seconds after which another write gives a file another time
_hashes: dict[tuple[str, int, int, int], str] = {}


def write_point(name: str) -> None:
    """Mark that one of WRITE_POINTS is reached; kill the process when a test names it."""
    assert name in WRITE_POINTS, name
    kill_at, _, count = os.environ.get("LOWALIGN_KILL_AT", "").partition(":")
    if name == kill_at:
        _reached[name] += 1
        if _reached[name] == int(count or 1):
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # on Windows SIGTERM ends it as abruptly


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and flushes names by itself
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes | str | Callable[[Path], object], point: str | None = None) -> None:
    """Write or replace a file: at any moment it has the old content or the new. Raises OSError.

    content: bytes, text, or a function that writes a file at a path. point: names the write points POINT-written and
    POINT-replaced.
    """
    if not processes.is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".saving-{path.name}-{uuid4().hex[:8]}")  # two processes may write the same file
    try:
        if callable(content):
            temp.touch()
            mode = temp.stat().st_mode  # by the user's umask; safetensors makes its files 0600
            content(temp)
            temp.chmod(mode)
        else:
            temp.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temp)
        if point:
            write_point(f"{point}-written")
        temp.replace(path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    sync(path.parent)
    if point:
        write_point(f"{point}-replaced")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON. Raises OSError."""
    write_file(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line. Raises OSError."""

    def write(temp: Path) -> None:
        with temp.open("w", encoding="utf-8") as file:
            file.writelines(map(json_line, lines))

    write_file(path, write)


def json_line(line: dict[str, Any]) -> str:
    """One line of a JSONL file."""
    return json.dumps(line, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error; an older `folder` is replaced."""
    temp = folder.with_name(f".saving-{folder.name}")
    shutil.rmtree(temp, ignore_errors=True)
    try:
        temp.mkdir(parents=True)
        yield temp
        mode = temp.stat().st_mode & 0o666  # by the user's umask; safetensors makes its files 0600
        for path in (*temp.rglob("*"), temp):
            if path.is_file():
                path.chmod(mode)
            sync(path)
        aside = _move_aside(folder)
        temp.rename(folder)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def check_disk(out: Path, size: int, what: str, instead: str = "another --out") -> None:
    """Raises UserError when the disk of `out`, which need not exist yet, has no room for `size` bytes. what: "the delta takes"."""
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if size > free:
        raise UserError(f"{what} {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free in {parent}; choose {instead}")


def remove_folder(folder: Path, point: str) -> None:
    """Rename a folder, then delete it, so that it is never there in part. point: the write point between the two."""
    aside = _move_aside(folder)
    write_point(point)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left partly written or partly deleted in this folder."""
    for leftover in (*folder.glob(".saving-*"), *folder.glob(".old-*")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex. Of a large file it is computed once, unless the file changes or has just been written."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    if key not in _hashes:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if stat.st_size < LARGE or time.time() - stat.st_mtime < SETTLED:
            return digest
        _hashes[key] = digest
    return _hashes[key]


def _move_aside(folder: Path) -> Path:
    aside = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    return aside
