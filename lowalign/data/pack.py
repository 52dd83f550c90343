"""Pack: many Examples laid end to end in one row, without a padding token; and which Examples a step takes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from lowalign.data.example import Example


@dataclass(frozen=True)
class Segment:
    """A range of tokens that attends causally to itself and, if it has a parent, to all of the parent segment."""

    length: int
    parent: int | None = None


@dataclass
class Pack:
    """Examples laid end to end: T tokens, of which N are completion tokens with a token before them; C completions.

    ids (T,): token ids; -1 at a virtual token. positions (T,): restart with each Example. virtual (T,): index of the
    virtual token, -1 elsewhere. predictors (N,): index in the row of the hidden state that predicts the token. labels
    (N,): the token. supervised (S,): which of the N are supervised, as indices: a mask would make a device wait for its count.
    flat_index (N,): index of the token in all completions concatenated. ends
    (C,): index in the row of each completion's last token. lengths: tokens of each completion of each Example.
    """

    ids: Tensor
    positions: Tensor
    virtual: Tensor
    segments: tuple[Segment, ...]
    predictors: Tensor
    labels: Tensor
    supervised: Tensor
    flat_index: Tensor
    ends: Tensor
    lengths: list[list[int]] = field(default_factory=list)

    def to(self, device: torch.device | str) -> "Pack":
        """The same Pack with its tensors on `device`, in one copy: each copy waits for the device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        if all(value.device == torch.device(device) for value in tensors.values()):
            return self
        parts = torch.cat(list(tensors.values())).to(device).split([len(value) for value in tensors.values()])
        return replace(self, **dict(zip(tensors, parts, strict=True)))


def pack(examples: Sequence[Example], virtual_tokens: int = 0, first_position: int = 0) -> Pack:
    """Lay the Examples end to end.

    virtual_tokens: number of learned embeddings before every prompt, in its segment (prompt tuning). first_position:
    number of keys and values before every prompt (prefix tuning), where positions begin. An Example with one completion
    is a single causal segment; of several completions, each is a segment whose parent is the prompt's.
    """
    ids, positions, virtual, segments = [], [], [], []
    predictors, labels, supervised, flat_index, ends = [], [], [], [], []
    completion_tokens = 0
    for example in examples:
        prompt = [-1] * virtual_tokens + example.prompt
        single = len(example.completions) == 1
        prompt_end, parent = len(ids) + len(prompt), None
        ids += prompt
        virtual += list(range(virtual_tokens)) + [-1] * len(example.prompt)
        positions += range(first_position, first_position + len(prompt))
        if prompt and not single:
            parent = len(segments)
            segments.append(Segment(len(prompt)))
        for i, completion in enumerate(example.completions):
            start = len(ids)
            skip = 0 if example.prompt else 1
            predictors += [prompt_end - 1, *range(start, start + len(completion) - 1)][skip:]
            labels += completion[skip:]
            supervised += example.mask(i)[skip:]
            flat_index += range(completion_tokens + skip, completion_tokens + len(completion))
            completion_tokens += len(completion)
            ids += completion
            ends.append(len(ids) - 1)
            virtual += [-1] * len(completion)
            after = first_position + len(prompt)
            positions += range(after, after + len(completion))
            segments.append(Segment(len(completion) + (len(prompt) if single else 0), parent))
    as_long = lambda values: torch.tensor(values, dtype=torch.long)  # noqa: E731
    return Pack(
        as_long(ids),
        as_long(positions),
        as_long(virtual),
        tuple(segments),
        as_long(predictors),
        as_long(labels),
        as_long([i for i, own in enumerate(supervised) if own]),
        as_long(flat_index),
        as_long(ends),
        [list(map(len, example.completions)) for example in examples],
    )


def step_order(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Row numbers of optimizer step `step` (from 0). A pure function, so a resumed run needs no other state.

    Each pass over the data is a new permutation; a step may span two passes.
    """
    places = (divmod(k, rows) for k in range(step * batch_size, (step + 1) * batch_size))
    return [int(_permutation(rows, seed, epoch)[i]) for epoch, i in places]


@lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator)


def total_supervised(examples: Iterable[Example]) -> int:
    """Number of supervised tokens in all Examples: the denominator of a mean over tokens."""
    return sum(example.supervised for example in examples)


def total_weight(examples: Iterable[Example]) -> float:
    """Sum of the weights of all tokens in all Examples; the number of supervised tokens where all weights are 0 or 1."""
    return sum(sum(example.weights(i)) for example in examples for i in range(len(example.completions)))
