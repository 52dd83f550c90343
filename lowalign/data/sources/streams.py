"""The bytes of a file, decompressed by its suffix (.gz, .xz, .bz2, .zst)."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lowalign.errors import UserError

BOM = b"\xef\xbb\xbf"
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
LONGEST = 256 * 2**20  # bytes of a line: more is no row, and would fill the memory


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """A file opened for reading, past its byte-order mark. Raises UserError where it cannot be read, is damaged, or is
    UTF-16."""
    try:
        with _decompressed(path) as stream:
            start = stream.peek(1024)[:1024]
            if start[:2] in (b"\xff\xfe", b"\xfe\xff") or (b"\0" in start[:4] and start[:4].strip(b"\0")):
                raise UserError(f"{path} is not in UTF-8 (UTF-16 or UTF-32, it seems); save it as UTF-8")
            if start.startswith(BOM):
                stream.read(len(BOM))
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut off ({error}); decompress it to see how far it goes") from error
    except OSError as error:
        reason = error.strerror or f"damaged or cut off, it seems: {error}"
        raise UserError(f"{path}: cannot be read ({reason})") from error


def lines_of(stream: BinaryIO, name: str, before: int = 0) -> Iterator[str]:
    """The lines of a stream with their ends. Bytes that are not UTF-8 become lone surrogates. before: lines of the file before
    them. Raises UserError for a line that is longer than LONGEST."""
    number = before
    while line := stream.readline(LONGEST):
        number += 1
        if len(line) == LONGEST and not line.endswith(b"\n"):
            raise UserError(f"{name}:{number}: a line of more than {LONGEST // 2**20} MiB; write one row per line")
        yield line.decode("utf-8", "surrogateescape")


def _decompressed(path: Path) -> io.BufferedReader:
    match path.suffix:
        case ".gz":
            return io.BufferedReader(gzip.open(path))
        case ".xz":
            return io.BufferedReader(lzma.open(path))
        case ".bz2":
            return io.BufferedReader(bz2.open(path))
        case ".zst":
            import pyarrow  # Python has no zstd before 3.14

            return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return path.open("rb")
