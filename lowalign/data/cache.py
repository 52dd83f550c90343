"""Tokenized rows on disk, in data/ under $LOWALIGN_CACHE or the user's cache folder. They may be deleted at any time."""

import contextlib
import datetime
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import platformdirs
import tokenizers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowalign.data.pack import Example
from lowalign.durable import write_file

FORMAT = 4  # to be raised when the meaning of a stored file or the result of tokenizing changes
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
    lengths, ids, mask = [], [], []
    for example in examples:
        lengths += [len(example.completions), len(example.prompt), *map(len, example.completions)]
        ids += example.prompt + [i for completion in example.completions for i in completion]
        mask += [m for completion_mask in example.masks for m in completion_mask]
    tensors = {
        "ids": torch.tensor(ids, dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "mask": torch.tensor(mask, dtype=torch.bool),
        "fields": _as_tensor([[getattr(example, name) for name in FIELDS] for example in examples]),
        "report": _as_tensor(report),
    }
    tensors["checksum"] = _checksum(tensors)
    with contextlib.suppress(OSError):
        write_file(cache_folder() / f"{name}.safetensors", save(tensors))


def read(name: str) -> tuple[list[Example], dict[str, Any]] | None:
    """The stored Examples and report; None when there are none, or the file is damaged."""
    try:
        tensors = load((cache_folder() / f"{name}.safetensors").read_bytes())
        if not torch.equal(tensors.pop("checksum"), _checksum(tensors)):
            return None
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
        return None
    lengths, ids = iter(tensors["lengths"].tolist()), iter(tensors["ids"].tolist())
    mask = iter(tensors["mask"].tolist())
    examples = []
    for fields in _from_tensor(tensors["fields"]):
        completions = next(lengths)
        prompt = [next(ids) for _ in range(next(lengths))]
        sizes = [next(lengths) for _ in range(completions)]
        answers = [[next(ids) for _ in range(n)] for n in sizes]
        masks = [[next(mask) for _ in range(n)] for n in sizes]
        examples.append(Example(prompt, answers, masks, **dict(zip(FIELDS, fields, strict=True))))
    return examples, _from_tensor(tensors["report"])


def _as_tensor(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_tensor(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))


def _checksum(tensors: dict[str, Tensor]) -> Tensor:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
