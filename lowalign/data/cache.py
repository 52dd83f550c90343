"""Tokenized rows on disk, in data/ under $LOWALIGN_CACHE or the user's cache folder. They may be deleted at any time."""

import datetime
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import platformdirs
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

FORMAT = 9  # to be raised when the meaning of a stored file or the result of tokenizing changes


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


def path(name: str) -> Path:
    """Where the rows of this key are kept: a file of lowalign.data.store."""
    return cache_folder() / f"{name}.safetensors"
