"""An Example as bytes, and the facts about it that are kept beside them, so that no question about all rows reads all tokens."""

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np

from lowalign.data.example import Example, all_supervised

FIELDS = (
    "rank",
    "margin",
    "label",
    "weight",
    "token_weights",
    "source",
)  # of an Example, stored as JSON besides its tokens
LEAST_PROMPT = 8  # tokens of a prompt that can be known again
HEAD = struct.Struct("<4i")  # completions, prompt tokens, bytes of JSON, bytes of masks
FACTS = np.dtype(
    [
        ("at", "<i8"),  # where its bytes begin
        ("source", "<u8"),  # hash of Example.source: equal for the Examples of one row
        ("content", "<u8"),  # hash of the token ids and the label
        ("prompt", "<u8"),  # hash of the prompt; 0 where it is too short to mean anything
        ("tokens", "<i4"),  # Example.length
        ("supervised", "<i4"),
        ("longest", "<i4"),  # tokens of the prompt with the longest completion
        ("shortest", "<i4"),  # supervised tokens of the completion that has the fewest
        ("completions", "<i4"),
        ("ranked", "<i4"),  # 1: has a rank
    ]
)
"""56 bytes an Example, in the order of the rows."""


def record_of(example: Example) -> tuple[bytes, tuple[int, ...]]:
    """-> the bytes of an Example, without `reference` and `dataset`, and its FACTS with `at` 0."""
    sizes = [len(example.prompt), *map(len, example.completions)]
    ids = np.array([*example.prompt, *chain(*example.completions)], np.int32).tobytes()
    lengths = np.array(sizes[1:], np.int32).tobytes()
    masks = b"" if example.masks is None else bytes(chain(*example.masks))
    fields = json.dumps([getattr(example, name) for name in FIELDS]).encode()
    supervised = _supervised(masks, sizes)
    masks = masks if 0 in masks else b""
    record = HEAD.pack(len(sizes) - 1, sizes[0], len(fields), len(masks)) + lengths + ids + masks + fields
    facts = (
        0,
        hash_of(example.source.encode()),
        hash_of(lengths, ids, repr(example.label).encode()),
        hash_of(ids[: 4 * sizes[0]]) if sizes[0] >= LEAST_PROMPT else 0,
        sum(sizes),
        sum(supervised),
        sizes[0] + max(sizes[1:]),
        min(supervised),
        len(sizes) - 1,
        int(example.rank is not None),
    )
    return record + bytes(-len(record) % 4), facts


def example_at(buffer: Any, at: int) -> Example:
    """The Example whose bytes begin at `at`. buffer: bytes, or memory that is mapped from a file."""
    count, prompt, fields, masks = HEAD.unpack_from(buffer, at)
    lengths = np.frombuffer(buffer, np.int32, count, at + HEAD.size).tolist()
    at += HEAD.size + 4 * count
    ends = list(accumulate([prompt, *lengths]))
    ids = np.frombuffer(buffer, np.int32, ends[-1], at).tolist()
    at += 4 * ends[-1]
    if masks:
        flat = np.frombuffer(buffer, np.bool_, masks, at).tolist()
        own = [flat[start - prompt : end - prompt] for start, end in pairwise(ends)]
        own = [all_supervised(len(mask)) if all(mask) else mask for mask in own]
    else:
        own = list(map(all_supervised, lengths))
    values = json.loads(bytes(buffer[at + masks : at + masks + fields]))
    answers = [ids[start:end] for start, end in pairwise(ends)]
    return Example(ids[:prompt], answers, own, **dict(zip(FIELDS, values, strict=True)))


def facts_of(examples: Iterable[Example]) -> np.ndarray:
    """FACTS of Examples that are in memory, all with `at` 0."""
    return np.array([record_of(example)[1] for example in examples], FACTS)


def hash_of(*parts: bytes) -> int:
    """64 bits of BLAKE2, never 0."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") or 1


def _supervised(masks: bytes, sizes: Sequence[int]) -> list[int]:
    """Supervised tokens of each completion; without a prompt its first token has no context. masks: b"" for all."""
    lacks, counts, start = not sizes[0], [], 0
    for size in sizes[1:]:
        own = masks[start : start + size] if masks else b"\1" * size
        counts.append(own.count(1) - (lacks and own[0] == 1))
        start += size
    return counts
