"""Tokenized rows on disk, in data/ under $LOWALIGN_CACHE or the user's cache folder. They may be deleted at any time."""

import contextlib
import datetime
import hashlib
import json
import os
from array import array
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import tokenizers
import transformers
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from lowalign.data.pack import Example
from lowalign.durable import write_file

FORMAT = 5  # to be raised when the meaning of a stored file or the result of tokenizing changes
TYPES = {"ids": np.int32, "lengths": np.int32, "mask": np.bool_, "fields": np.uint8, "report": np.uint8}
FIELDS = ("rank", "margin", "label", "weight", "source")  # fields of an Example that are stored besides its tokens


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
    lengths, ids, mask = array("i"), array("i"), bytearray()
    for example in examples:
        lengths.extend((len(example.completions), len(example.prompt), *map(len, example.completions)))
        ids.fromlist(example.prompt)
        for completion, completion_mask in zip(example.completions, example.masks, strict=True):
            ids.fromlist(completion)
            mask += bytes(completion_mask)
    fields = _json_bytes([[getattr(example, name) for name in FIELDS] for example in examples])
    arrays = {"ids": ids, "lengths": lengths, "mask": mask, "fields": fields, "report": _json_bytes(report)}
    tensors = {name: np.frombuffer(values, TYPES[name]) for name, values in arrays.items()}
    tensors["checksum"] = np.frombuffer(_checksum(tensors), np.uint8)
    with contextlib.suppress(OSError):
        write_file(cache_folder() / f"{name}.safetensors", lambda path: save_file(tensors, path))


def read(name: str) -> tuple[list[Example], dict[str, Any]] | None:
    """The stored Examples and report; None when there are none, or the file is damaged."""
    try:
        tensors = load_file(cache_folder() / f"{name}.safetensors")
        if bytes(tensors.pop("checksum")) != _checksum(tensors):
            return None
        ids, mask, lengths = tensors["ids"], tensors["mask"], tensors["lengths"].tolist()
        fields, report = (json.loads(bytes(tensors[name])) for name in ("fields", "report"))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    # One object for each id: lists of ids then take 8 bytes a token.
    objects = np.arange(ids.max(initial=0) + 1).astype(object)
    examples, at, masked, step = [], 0, 0, 0
    for values in fields:
        completions, sizes = lengths[step], lengths[step + 1 : step + 2 + lengths[step]]
        step += 2 + completions
        ends = list(accumulate(sizes, initial=at))
        prompt, *answers = (objects[ids[start:end]].tolist() for start, end in pairwise(ends))
        cuts = pairwise(accumulate(sizes[1:], initial=masked))
        masks = [mask[start:end].tolist() for start, end in cuts]
        at, masked = ends[-1], masked + sum(sizes[1:])
        examples.append(Example(prompt, answers, masks, **dict(zip(FIELDS, values, strict=True))))
    return examples, report


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def _checksum(tensors: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name].data)
    return digest.digest()
