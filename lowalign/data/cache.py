"""Tokenized rows on disk, under $LOWALIGN_CACHE or ~/.cache/lowalign, in data/. The folder may be deleted at any time."""

import contextlib
import datetime
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowalign.data.pack import Example
from lowalign.durable import write_file

FORMAT = 2  # raised when the meaning of a stored file or of any step before it changes
OTHERS = ("rank", "margin", "label", "weight", "source")  # what is kept of an Example besides its tokens


def cache_folder() -> Path:
    """Where tokenized rows are kept."""
    root = os.environ.get("LOWALIGN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "lowalign") / "data"


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    added = {i: repr(token) for i, token in tokenizer.added_tokens_decoder.items()}
    ids = tokenizer("a")["input_ids"]
    known = [type(tokenizer).__name__, inner, added, tokenizer.special_tokens_map, list(ids)]
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def key(content: str, templates: list[str | None], tokenizer: PreTrainedTokenizerBase, *settings: Any) -> str:
    """The name of the cache file of these rows (by their hash), templates, tokenizer and settings."""
    # A template may write the date, and then its rows are another day's tomorrow.
    dated = any("strftime_now" in text for text in templates if text)
    versions = [FORMAT, transformers.__version__, tokenizers.__version__]
    known = [content, templates, tokenizer_hash(tokenizer), settings, versions]
    known.append(str(datetime.date.today()) if dated else "")
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def store(name: str, examples: list[Example], report: dict[str, Any]) -> None:
    """Keep the Examples of a file (all but their reference) and its report. A full or read-only disk is no
    error: the rows are then tokenized again next time."""
    lengths, ids, mask = [], [], []
    for example in examples:
        lengths += [len(example.completions), len(example.prompt), *map(len, example.completions)]
        ids += example.prompt + [i for completion in example.completions for i in completion]
        mask += [m for completion_mask in example.masks for m in completion_mask]
    tensors = {
        "ids": torch.tensor(ids, dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "mask": torch.tensor(mask, dtype=torch.bool),
        "others": _as_tensor([[getattr(example, name) for name in OTHERS] for example in examples]),
        "report": _as_tensor(report),
    }
    tensors["checksum"] = _checksum(tensors)
    with contextlib.suppress(OSError):
        write_file(cache_folder() / f"{name}.safetensors", save(tensors))


def recall(name: str) -> tuple[list[Example], dict[str, Any]] | None:
    """What was stored under that name; None when nothing was, or it is damaged."""
    try:
        tensors = load((cache_folder() / f"{name}.safetensors").read_bytes())
        if not torch.equal(tensors.pop("checksum"), _checksum(tensors)):
            return None
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
        return None
    lengths, ids = iter(tensors["lengths"].tolist()), iter(tensors["ids"].tolist())
    mask = iter(tensors["mask"].tolist())
    examples = []
    for others in _from_tensor(tensors["others"]):
        completions = next(lengths)
        prompt = [next(ids) for _ in range(next(lengths))]
        sizes = [next(lengths) for _ in range(completions)]
        answers = [[next(ids) for _ in range(n)] for n in sizes]
        masks = [[next(mask) for _ in range(n)] for n in sizes]
        examples.append(Example(prompt, answers, masks, **dict(zip(OTHERS, others, strict=True))))
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
