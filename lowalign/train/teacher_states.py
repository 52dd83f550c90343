"""The last hidden states of a fine-tuned model on calibration rows: computed once, before the base is loaded, and kept on disk.

A state is hidden_size numbers a token, where log-probs over the vocabulary would be 30 to 60 times as many; with the
fine-tuned model's LM head, which the delta has, it gives them exactly.
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowalign.config.sections import BaseConfig
from lowalign.data import cache
from lowalign.data.micro_batches import free_memory, in_micro_batches
from lowalign.data.pack import Example
from lowalign.durable import write_file
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.base.base import Base
from lowalign.model.base.hub import BASE_FILES, load_tokenizer, resolve
from lowalign.model.base.identity import identify
from lowalign.model.host import Host

FORMAT = 1
TOKEN_BUDGET = 4096  # of a forward; the same for every run, so that a state has the same bits in each


class TeacherStates:
    """Calling it with one of the examples gives its states, (supervised tokens, hidden), read from the file."""

    def __init__(self, file: Path, examples: Sequence[Example]) -> None:
        self.examples = examples  # kept, so that their ids stay theirs
        ends = list(accumulate((e.supervised for e in examples), initial=0))
        self.places = {id(e): (ends[i], ends[i + 1]) for i, e in enumerate(examples)}
        self.file = safe_open(file, "pt")
        if self.file.get_slice("states").get_shape()[0] != ends[-1]:
            raise ValueError("other examples")

    def __call__(self, example: Example) -> Tensor:
        start, end = self.places[id(example)]
        return self.file.get_slice("states")[start:end]


def teacher_states(finetuned: str, examples: Sequence[Example], config: BaseConfig) -> TeacherStates:
    """The states of a fine-tuned model on the examples, from disk where they are stored.

    config: how the model is loaded. Raises UserError for a model that cannot be loaded or run.
    """
    folder, commit = resolve(finetuned, config.revision, BASE_FILES)
    identity = identify(finetuned, folder, commit, load_tokenizer(str(folder)), config.quantization)
    digest = hashlib.sha256(
        json.dumps([FORMAT, identity.weights, identity.config, config.quantization, config.dtype]).encode()
    )
    for e in examples:
        digest.update(array("q", [len(e.prompt), *map(len, e.completions), *e.prompt]).tobytes())
        for i, completion in enumerate(e.completions):
            digest.update(array("q", completion).tobytes() + bytes(e.mask(i)))
    file = cache.cache_folder() / f"teacher-{digest.hexdigest()}.safetensors"
    try:
        states = TeacherStates(file, examples)
        log(f"the fine-tuned model's states of {len(examples):,} examples are read from {file}")
    except (OSError, SafetensorError, ValueError):
        _write(file, _compute(finetuned, examples, config))
        free_memory()  # of the model
        states = TeacherStates(file, examples)
    return states


def _write(file: Path, states: Tensor) -> None:
    log(f"the fine-tuned model's states of {len(states):,} tokens ({states.nbytes / 1e6:,.0f} MB) are kept in {file}")
    try:
        write_file(file, lambda temp: save_file({"states": states}, temp))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{file} could not be written ({error}); make room, or set LOWALIGN_CACHE to another folder"
        ) from error


@torch.no_grad()
def _compute(finetuned: str, examples: Sequence[Example], config: BaseConfig) -> Tensor:
    """(all supervised tokens, hidden) in CPU memory."""
    host = Host(Base.load(finetuned, **vars(config), quiet=True))
    size = host.base.model.config.get_text_config().hidden_size
    states = torch.empty(sum(e.supervised for e in examples), size, dtype=host.base.dtype)
    ends = dict(zip(map(id, examples), accumulate(e.supervised for e in examples), strict=True))

    def compute(batch: list[Example]) -> None:
        for e, own in zip(batch, host.states(batch), strict=True):
            states[ends[id(e)] - len(own) : ends[id(e)]] = own.cpu()

    in_micro_batches(examples, TOKEN_BUDGET, compute)
    return states
