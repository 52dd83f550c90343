"""Safetensors folders a tensor at a time: reading and writing shards in the memory of one tensor.

The safetensors library maps whole files into memory and writes whole dictionaries. A merge touches every byte of a model
once, so here tensors are read from their offsets, and a shard's header is written before its tensors are made.
Format: 8 bytes, the header's length, little endian; the header, JSON; the tensors' bytes.
"""

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowalign.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, and its first byte there."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its size on the disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in memory of its own. Raises UserError when the file cannot be read."""
        data = bytearray(self.nbytes)
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                count = file.readinto(data)
        except OSError as error:
            raise UserError(f"{self.file} cannot be read: {error.strerror}") from error
        if count != self.nbytes:
            raise UserError(f"{self.file} is cut off in {self.name}; download it again")
        flat = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return flat.view(self.shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder by name, in the order of its files.

    Raises UserError for a shard that is missing or damaged, and for weights that are not safetensors.
    """
    index = folder / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        file = folder / name
        if Path(name).name != name:
            raise UserError(f"{index} names {name}, which is outside its folder")
        if not file.exists():
            others = "; files that can hold code (.bin, .pt) are not read" if any(folder.glob("*.bin")) else ""
            raise UserError(f"{file} is missing: the model in {folder} is not complete{others}")
        tensors |= {tensor.name: tensor for tensor in _header(file)}
    return tensors


def _header(file: Path) -> list[StoredTensor]:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(HEADER_LIMIT, size - 8):
                raise ValueError(f"a header of {length:,} bytes")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        start = 8 + length
        tensors = [
            StoredTensor(name, file, DTYPES[e["dtype"]], tuple(e["shape"]), start + e["data_offsets"][0])
            for name, e in entries.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UserError(f"{file} is no safetensors file that lowalign reads: {error}") from error
    for tensor in tensors:
        if tensor.offset + tensor.nbytes > size:
            raise UserError(f"{file} is cut off: {tensor.name} ends after the file; download it again")
    return sorted(tensors, key=lambda tensor: tensor.offset)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written. make: computes it, in this dtype and shape, when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its size on the disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path, tensors: Sequence[PlannedTensor], max_bytes: int, on_written: Callable[[int], object]
) -> None:
    """Write model.safetensors, or numbered shards of at most max_bytes and their index. Raises OSError.

    A tensor larger than max_bytes has a shard of its own. on_written: called with the bytes of each tensor written.
    """
    shards: list[list[PlannedTensor]] = [[]]
    room = max_bytes
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, on_written)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(file: Path, tensors: Sequence[PlannedTensor], on_written: Callable[[int], object]) -> None:
    """Write one safetensors file, each tensor made when its turn comes. Raises OSError."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data begin at a multiple of 8 bytes
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for planned in tensors:
            tensor = planned.make()
            if tensor.dtype != planned.dtype or tuple(tensor.shape) != planned.shape:
                raise RuntimeError(f"{planned.name} is {tensor.dtype} {tuple(tensor.shape)}, not as planned")
            stream.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
            del tensor
            on_written(planned.nbytes)
