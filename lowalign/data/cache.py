"""Tokenized rows on disk, in data/ under $LOWALIGN_CACHE or the user's cache folder. They may be deleted at any time."""

import contextlib
import datetime
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import platformdirs
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from lowalign.data.pack import Example, all_supervised
from lowalign.durable import write_file

FORMAT = 8  # to be raised when the meaning of a stored file or the result of tokenizing changes
TYPES = {"ids": ("I32", 4), "lengths": ("I32", 4), "mask": ("BOOL", 1)}  # others: bytes
FIELDS = (  # fields of an Example that are stored besides its tokens
    "rank",
    "margin",
    "label",
    "weight",
    "token_weights",
    "source",
)


def cache_folder() -> Path:
    """The folder of tokenized rows: $LOWALIGN_CACHE/data, or on Linux ~/.cache/lowalign/data."""
    return Path(os.environ.get("LOWALIGN_CACHE") or platformdirs.user_cache_dir("lowalign")) / "data"


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that decides the ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    added = {i: repr(token) for i, token in tokenizer.added_tokens_decoder.items()}
    ids = tokenizer("a")["input_ids"]
    content = [type(tokenizer).__name__, inner, added, tokenizer.special_tokens_map, list(ids)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def key(content: str, templates: list[str | None], tokenizer: PreTrainedTokenizerBase, *settings: Any) -> str:
    """The name of the cache file of these rows (`content`: their hash), templates, tokenizer and settings."""
    # A template that writes today's date renders other rows tomorrow.
    dated = any("strftime_now" in text for text in templates if text)
    versions = [FORMAT, transformers.__version__, tokenizers.__version__]
    date = str(datetime.date.today()) if dated else ""
    parts = [content, templates, tokenizer_hash(tokenizer), settings, versions, date]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def write(name: str, examples: list[Example], report: dict[str, Any]) -> None:
    """Store the Examples of a file (without `reference`) and its report. A full or read-only disk is no error: the rows
    are tokenized again next time."""
    sizes = [(len(e.completions), len(e.prompt), *map(len, e.completions)) for e in examples]
    fields = [[getattr(example, name) for name in FIELDS] for example in examples]
    counts = {"ids": sum(sum(size[1:]) for size in sizes), "mask": sum(sum(size[2:]) for size in sizes)}
    small = {
        "lengths": array("i", chain.from_iterable(sizes)).tobytes(),
        "fields": _json(fields),
        "report": _json(report),
    }
    # Example by example: all at once they would take as much memory again.
    tensors: dict[str, tuple[int, Iterable[bytes]]] = {
        "ids": (4 * counts["ids"], (array("i", [*e.prompt, *chain(*e.completions)]).tobytes() for e in examples)),
        "lengths": (len(small["lengths"]), [small["lengths"]]),
        "mask": (counts["mask"], (bytes(chain(*e.masks)) for e in examples)),
        **{name: (len(small[name]), [small[name]]) for name in ("fields", "report")},
    }
    with contextlib.suppress(OSError):
        write_file(cache_folder() / f"{name}.safetensors", lambda path: _save(tensors, path))


def read(name: str) -> tuple[list[Example], dict[str, Any]] | None:
    """The stored Examples and report; None when there are none, or the file is damaged."""
    path = cache_folder() / f"{name}.safetensors"
    try:
        with path.open("rb") as file, path.open("rb") as ids_file, path.open("rb") as mask_file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            part = {name: _Part(file, length + 8, header[name]) for name in ("lengths", "fields", "report", "checksum")}
            lengths = np.frombuffer(part["lengths"].read(), np.int32).tolist()
            fields, report = json.loads(part["fields"].read()), json.loads(part["report"].read())
            stored = part.pop("checksum").read()
            part["ids"] = _Part(ids_file, length + 8, header["ids"])
            part["mask"] = _Part(mask_file, length + 8, header["mask"])
            examples = list(_examples(lengths, fields, part["ids"], part["mask"]))
            return (examples, report) if stored == _checksum({name: p.digest for name, p in part.items()}) else None
    except (OSError, KeyError, ValueError, IndexError, TypeError, OverflowError, MemoryError):
        return None


def _examples(lengths: list[int], fields: list[list[Any]], ids: "_Part", mask: "_Part") -> Iterator[Example]:
    objects = np.arange(0).astype(object)  # one object for each id: lists of ids then take 8 bytes a token
    step = 0
    for values in fields:
        sizes = lengths[step + 1 : step + 2 + lengths[step]]
        step += 1 + len(sizes)
        tokens = np.frombuffer(ids.read(4 * sum(sizes)), np.int32)
        if tokens.max(initial=0) >= len(objects):
            objects = np.append(objects, np.arange(len(objects), int(tokens.max()) + 1).astype(object))
        whole, ends = objects[tokens].tolist(), list(accumulate(sizes))
        answers = [whole[start:end] for start, end in pairwise(ends)]
        masks = [_mask(mask.read(size)) for size in sizes[1:]]
        yield Example(whole[: ends[0]], answers, masks, **dict(zip(FIELDS, values, strict=True)))


def _mask(stored: bytes) -> list[bool]:
    return list(map(bool, stored)) if 0 in stored else all_supervised(len(stored))


class _Part:
    """A tensor of a safetensors file, read from its begin to its end. digest: of what was read."""

    def __init__(self, file: BinaryIO, start: int, entry: dict[str, Any]):
        begin, end = entry["data_offsets"]
        self._file, self._left = file, end - begin
        self._at, self.digest = start + begin, hashlib.sha256()

    def read(self, size: int | None = None) -> bytes:
        """The next `size` bytes, or all. Raises ValueError when there are fewer."""
        size = self._left if size is None else size
        if size > self._left:
            raise ValueError("fewer bytes than expected")
        if self._file.tell() != self._at:
            self._file.seek(self._at)
        content = self._file.read(size)
        if len(content) != size:
            raise ValueError("the file is cut off")
        self._at, self._left = self._at + size, self._left - size
        self.digest.update(content)
        return content


def _save(tensors: dict[str, tuple[int, Iterable[bytes]]], path: Path) -> None:
    """Write a safetensors file. tensors: the size in bytes of each, and its content in pieces."""
    header, at = {}, 0
    for name, size in [*((name, size) for name, (size, _) in tensors.items()), ("checksum", 32)]:
        dtype, width = TYPES.get(name, ("U8", 1))
        header[name] = {"dtype": dtype, "shape": [size // width], "data_offsets": [at, at + size]}
        at += size
    encoded = _json(header)
    encoded += b" " * (-len(encoded) % 8)
    digests = {name: hashlib.sha256() for name in tensors}
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, (_, pieces) in tensors.items():
            for piece in pieces:
                digests[name].update(piece)
                file.write(piece)
        file.write(_checksum(digests))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _checksum(digests: dict[str, Any]) -> bytes:
    return hashlib.sha256(b"".join(name.encode() + digests[name].digest() for name in sorted(digests))).digest()
