"""Many Examples in one file: written once, block by block, and read through a memory map, one Example at a time.

The layout is that of safetensors: `records` (lowalign.data.record), `facts` of all Examples, `report` (JSON) and `checksum`
(CRC-32 of the three). What is smaller than SPOOL stays in memory until it is finished.
"""

import contextlib
import errno
import json
import mmap
import os
import tempfile
import time
import weakref
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

from lowalign import processes
from lowalign.data.example import Example
from lowalign.data.record import FACTS, example_at
from lowalign.durable import sync
from lowalign.errors import UserError

HEADER = 1024  # bytes of the header, its length included
SPOOL = 64 * 2**20  # bytes of records that stay in memory
MAPPED = 64 * 2**20  # bytes of a map that may be resident before it is made anew
TOUCHED = 2**16  # bytes of a map that become resident with each page that is read (Linux maps pages around it)
PIECE = 2**22  # bytes that are read at once to check a file
LEFTOVER = 24 * 3600  # seconds without a write after which an unfinished file is of a process that was killed
PARTS = ("records", "facts", "report", "checksum")


class Store(Sequence[Example]):
    """The Examples of one source, each made when it is asked for. facts (E,): see FACTS. report: of the rows, JSON."""

    def __init__(self, file: BinaryIO | None, records: bytes, facts: np.ndarray, report: dict[str, Any]) -> None:
        """file: with the records, else `records` has them."""
        self._file, self._records, self.facts, self.report = file, records, facts, report
        self._left = 0

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, i: int) -> Example:
        if self._file is None:
            return example_at(self._records, int(self.facts["at"][i]))
        if self._left <= 0:  # a new map has no page in memory; the pages of the old one stay in the system's cache
            self._records, self._left = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), MAPPED
        self._left -= TOUCHED + 4 * int(self.facts["tokens"][i])
        return example_at(self._records, HEADER + int(self.facts["at"][i]))


class StoreWriter:
    """Takes records in any order and gives the Store of them in the order of their numbers."""

    def __init__(self, folder: Path) -> None:
        """folder: where a file is made once there are more than SPOOL bytes."""
        self._folder, self._file, self._path = folder, BytesIO(), None
        self._file.write(bytes(HEADER))
        self._size, self._checksum = 0, 0
        self._facts: list[np.ndarray] = []
        self._numbers: list[np.ndarray] = []

    def add(self, records: bytes, facts: np.ndarray, numbers: Sequence[int]) -> None:
        """Some records, one after the other, their FACTS with `at` from 0, and where each stands. Raises UserError for a disk
        that takes no more."""
        facts["at"] += self._size
        self._facts.append(facts)
        self._numbers.append(np.asarray(numbers, np.int64))
        self._size += len(records)
        with self._explained():
            if self._path is None and self._size > SPOOL:
                self._move_to_disk()
            self._write(records)

    def finish(self, report: dict[str, Any], path: Path | None) -> Store:
        """The Store, kept at `path` if that is given and its disk takes it."""
        facts = np.concatenate(self._facts or [np.empty(0, FACTS)])
        numbers = np.concatenate(self._numbers or [np.empty(0, np.int64)])
        self._facts, self._numbers = [], []
        if (np.diff(numbers) < 0).any():
            facts = facts[np.argsort(numbers, kind="stable")]
        if self._path is None:
            records = self._file.getvalue()
            if path is not None and self._kept_small(facts, report, path) and (store := open_store(path)):
                return store
            return Store(None, records[HEADER:], facts, report)
        with self._explained():
            start = self._complete(facts, report)
            sync(self._path)
        if path is not None and processes.is_main() and path.parent == self._path.parent:
            os.replace(self._path, path)
            sync(path.parent)
        else:
            _forget(self._path, self._file)
        return Store(self._file, b"", _mapped(self._file, start, len(facts)), report)

    def close(self) -> None:
        """Remove what was written, when the rows could not be read to their end."""
        self._file.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._checksum = zlib.crc32(content, self._checksum)

    def _complete(self, facts: np.ndarray, report: dict[str, Any]) -> int:
        """Write all but the records -> where the facts begin."""
        encoded, sizes = json.dumps(report).encode(), [self._size, facts.nbytes]
        self._write(memoryview(facts).cast("B") if len(facts) else b"")
        self._write(encoded)
        self._file.write(self._checksum.to_bytes(4, "little"))
        header, at = {}, 0
        for name, size in zip(PARTS, [*sizes, len(encoded), 4], strict=True):
            header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
            at += size
        self._file.seek(0)
        self._file.write((HEADER - 8).to_bytes(8, "little") + json.dumps(header).encode().ljust(HEADER - 8))
        self._file.flush()
        return HEADER + self._size

    def _kept_small(self, facts: np.ndarray, report: dict[str, Any], path: Path) -> bool:
        """Write what is in memory to `path` -> whether it is there."""
        if not processes.is_main():
            return False
        try:
            self._complete(facts, report)
            temp = _new_file(path.parent)
            try:
                temp.write_bytes(self._file.getbuffer())
                sync(temp)
                temp.replace(path)
            except BaseException:
                temp.unlink(missing_ok=True)
                raise
            sync(path.parent)
        except OSError:  # a full or read-only disk: they are tokenized again next time
            return False
        return True

    def _move_to_disk(self) -> None:
        content = self._file.getbuffer()
        try:
            self._path = _new_file(self._folder)
        except OSError:
            self._path = _new_file(Path(tempfile.gettempdir()))
        file = self._path.open("w+b")
        file.write(content)
        self._file = file

    @contextlib.contextmanager
    def _explained(self):
        """A full disk as a UserError."""
        try:
            yield
        except OSError as error:
            where = self._path.parent if self._path else self._folder
            why = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot be written ({error.strerror})"
            raise UserError(
                f"the disk of {where} {why}: tokenized rows take {self._size / 1e9:.1f} GB so far, too many for memory. Make room, "
                "set LOWALIGN_CACHE to a folder on another disk, or take fewer rows with --data.limit"
            ) from error


def open_store(path: Path) -> Store | None:
    """The Store of a file; None when there is none, or it is damaged. Reads it once, to check it."""
    try:
        file = path.open("rb")
        header = json.loads(file.read(HEADER)[8:])
        ends = {name: HEADER + header[name]["data_offsets"][1] for name in PARTS}
        if ends["checksum"] != path.stat().st_size:
            raise ValueError("cut off")
        checksum, left = 0, ends["report"] - HEADER
        while left:
            piece = file.read(min(PIECE, left))
            checksum, left = zlib.crc32(piece, checksum), left - len(piece)
            if not piece:
                raise ValueError("cut off")
        if file.read(4) != checksum.to_bytes(4, "little"):
            raise ValueError("damaged")
        file.seek(ends["facts"])
        report = json.loads(file.read(ends["report"] - ends["facts"]))
        count, odd = divmod(ends["facts"] - ends["records"], FACTS.itemsize)
        if odd:
            raise ValueError("of another format")
        return Store(file, b"", _mapped(file, ends["records"], count), report)
    except (OSError, KeyError, ValueError, IndexError, TypeError):
        return None


def _mapped(file: BinaryIO, start: int, count: int) -> np.ndarray:
    return np.memmap(file, FACTS, "r", start, (count,)) if count else np.empty(0, FACTS)


def _new_file(folder: Path) -> Path:
    """A new empty file in a folder, without those of processes that were killed."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".saving-rows-*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > LEFTOVER:
                leftover.unlink()
    path = folder / f".saving-rows-{uuid4().hex[:8]}"
    path.touch()
    return path


def _forget(path: Path, file: BinaryIO) -> None:
    """Remove a file that is open: at once, or where the system does not allow that when it is closed."""
    try:
        path.unlink()
    except OSError:
        weakref.finalize(file, path.unlink, missing_ok=True)
