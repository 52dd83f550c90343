"""The reference's log-probs of fixed data: computed once and kept on disk beside the tokenized rows.

The file is named by a hash of all that decides the values: base, reference adapters and token ids. In 16 bit they also
depend on the other Examples of a pack (2e-3 to 5e-2 per token). They are computed in the packs of the first epoch, where
they equal those of a reference that is computed in each step.
"""

import hashlib
import json
import math
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lowalign import processes
from lowalign.config.sections import TrainConfig
from lowalign.data import cache
from lowalign.data.examples import Examples, as_examples
from lowalign.data.pack import Example, step_order
from lowalign.durable import write_file
from lowalign.log import BAR_DELAY, log, progress
from lowalign.model.host import Host, completion_logps
from lowalign.model.policy import Stack
from lowalign.train.accumulate import MicroBatches
from lowalign.train.signals import StopSignals

FORMAT = 2
STORE_EVERY = 30.0  # seconds


class _Recorder:
    """Writes the reference's log-probs into the Examples, in the form of a method for MicroBatches."""

    def __init__(self, host: Host, reference: Stack) -> None:
        self.host, self.reference = host, reference

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        return {}

    def loss(self, examples: Sequence[Example], normalizers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        with self.host.use(*self.reference):
            values = iter(completion_logps(self.host, examples).tolist())
        for e in examples:
            e.reference = [next(values) for _ in e.completions]
        return torch.zeros(()), {}


def fill_reference_logps(
    host: Host, reference: Stack, examples: Sequence[Example], train: TrainConfig, stop: StopSignals
) -> None:
    """Set the `reference` of every Example, from disk where it is stored.

    Raises Interrupted after a signal, and UserError when a single Example does not fit in memory; the values computed
    until then are stored.
    """
    if not examples:
        return
    file = cache.cache_folder() / f"reference-{_key(host, reference, examples)}.safetensors"
    stored = _set(examples, processes.from_main(_load(file)))
    host.training(None)
    recorder = MicroBatches(_Recorder(host, reference), {}, train.token_budget, stop)
    batches = _first_epoch(len(examples), train)
    missing = sum(e.reference is None for e in examples)
    if stored:
        _compare(recorder, examples, batches[0])
    if not missing:
        log(f"the reference's log-probs of {len(examples):,} examples are read from {file}")
        return
    log(f"the reference's log-probs of {missing:,} examples are computed once, and kept in {file}")
    last_write = time.monotonic()
    try:
        options = {"unit": "batch", "desc": "reference log-probs", "leave": False, "delay": BAR_DELAY}
        for indices in progress(iterable=batches, **options):
            batch = [examples[i] for i in indices]
            if any(e.reference is None for e in batch):
                stop.check_together()
                _compute(recorder, batch)
                _keep(examples, indices, batch)
            if time.monotonic() - last_write > STORE_EVERY:
                _store(file, examples)
                last_write = time.monotonic()
    finally:
        _store(file, examples)


def _first_epoch(count: int, train: TrainConfig) -> list[list[int]]:
    """The batches of the first epoch, by index; the Examples of the last, incomplete step are a batch of their own."""
    batches = [step_order(count, train.batch_size, train.seed, step) for step in range(count // train.batch_size)]
    seen = {i for batch in batches for i in batch}
    rest = [i for i in range(count) if i not in seen]
    return batches + ([rest] if rest else [])


def _keep(examples: Sequence[Example], indices: Sequence[int], batch: Sequence[Example]) -> None:
    """Give these Examples the references of `batch`, in which they are; those of a list have them already."""
    if isinstance(examples, Examples):
        for i, e in zip(indices, batch, strict=True):
            examples.set_reference(i, e.reference)


def _compute(recorder: MicroBatches, batch: list[Example]) -> None:
    """Set the reference of these Examples; each process computes its share of them."""
    for e in batch:
        e.reference = None
    recorder.metrics(batch)
    for parts in zip(batch, *processes.gather([e.reference for e in batch]), strict=True):
        parts[0].reference = next(values for values in parts[1:] if values is not None)


def _compare(recorder: MicroBatches, examples: Sequence[Example], indices: Sequence[int]) -> None:
    """Log the largest difference between stored and recomputed values; the stored ones stay."""
    batch = [examples[i] for i in indices]
    stored = [e.reference for e in batch]
    _compute(recorder, batch)
    differences = []
    for values, e in zip(stored, batch, strict=True):
        if values:
            differences += [abs(a - b) for a, b in zip(values, e.reference, strict=True)]
            e.reference = values
    _keep(examples, indices, batch)
    worst = max(differences, default=math.nan)
    log(f"reference log-probs of the first batch: stored and recomputed values differ by at most {worst:.1e}")


def _key(host: Host, reference: Stack, examples: Sequence[Example]) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, asdict(host.base.identity), str(host.base.dtype)]).encode())
    for name in reference:
        digest.update(json.dumps(host.adapters[name].config.to_dict(), sort_keys=True, default=str).encode())
        for key, tensor in sorted(host.adapters[name].file_tensors().items()):
            digest.update(key.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    for e in examples:
        digest.update(array("q", [len(e.prompt), *map(len, e.completions), *e.prompt]).tobytes())
        for i, completion in enumerate(e.completions):
            digest.update(array("q", completion).tobytes() + bytes(e.mask(i)))
    return digest.hexdigest()


def _load(file: Path) -> list[float]:
    """The stored values, one per completion; none where the file is absent or damaged."""
    try:
        return load(file.read_bytes())["logps"].tolist()
    except (OSError, SafetensorError, KeyError, ValueError):
        return []


def _set(examples: Sequence[Example], values: list[float]) -> bool:
    """Set stored values in the Examples -> whether there were as many as there are completions."""
    counts = as_examples(examples).fact("completions").tolist()
    if len(values) != sum(counts):
        return False
    rest = iter(values)
    for i, count in enumerate(counts):
        own = [next(rest) for _ in range(count)]
        reference = None if any(map(math.isnan, own)) else own
        if isinstance(examples, Examples):
            examples.set_reference(i, reference)
        else:
            examples[i].reference = reference
    return True


def _store(file: Path, examples: Sequence[Example]) -> None:
    """Write the values computed so far, nan for the others. On a full disk they are computed again next time."""
    values = [v for e in examples for v in (e.reference or [math.nan] * len(e.completions))]
    try:
        write_file(file, save({"logps": torch.tensor(values, dtype=torch.float32)}))
    except OSError as error:
        log(f"{file} could not be written ({error.strerror}); the reference will be computed again")
