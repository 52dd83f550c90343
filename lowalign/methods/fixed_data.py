"""What the methods on fixed data share: SFT, reward model, DPO and KTO."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lowalign.config.sections import TrainConfig
from lowalign.config.training import DPOLossConfig
from lowalign.data.mixture import MixedExamples, epoch_length, order_of
from lowalign.data.pack import Example
from lowalign.model.host import Host, completion_logps
from lowalign.model.policy import Stack


class FixedDataMethod:
    """Trains one adapter on Examples that stay the same for the whole run.

    stack: the active adapters; the last one is trained, those before it stay frozen. train: its batch size and seed
    decide the order of the data.
    """

    def __init__(self, host: Host, examples: Sequence[Example], stack: Stack, train: TrainConfig) -> None:
        self.host, self.examples, self.stack, self.train = host, examples, stack, train
        self.lr_multipliers = {stack[-1]: 1.0}
        self.token_budget = train.token_budget
        self.last_metrics: dict[str, float] = {}

    def batch(self, step: int) -> list[Example]:
        """The Examples of optimizer step `step`, counted from 0."""
        order = order_of(self.examples, self.train.batch_size, self.train.seed, step)
        return [self.examples[i] for i in order]

    def epoch(self, steps: int) -> float:
        """Passes over the Examples in the first `steps` steps."""
        return steps * self.train.batch_size / epoch_length(self.examples)

    def shares(self, steps: int) -> dict[str, float]:
        """The share of each source in the Examples of the first `steps` steps, as metrics; empty without a mixture."""
        if not isinstance(self.examples, MixedExamples):
            return {}
        realised = self.examples.mixture.realised(steps * self.train.batch_size)
        return {f"share/{name}": share for name, share in realised.items()}

    def state(self) -> dict[str, Any]:
        """Empty: the order of the data follows from the step."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def by_source(examples: Sequence[Example]) -> dict[str, list[int]]:
    """The places of the Examples of each source, by its name; empty where there is only one source."""
    places: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        if example.dataset:
            places.setdefault(example.dataset, []).append(i)
    return places


def completions_of(examples: Sequence[Example], places: Sequence[int]) -> list[int]:
    """The places of the completions of some of the Examples, counted over all completions in order."""
    ends = list(accumulate((len(e.completions) for e in examples), initial=0))
    return [place for i in places for place in range(ends[i], ends[i + 1])]


class ReferenceMethod(FixedDataMethod):
    """A method that compares the policy with a frozen reference. reference: its adapters."""

    def __init__(
        self,
        host: Host,
        examples: Sequence[Example],
        stack: Stack,
        reference: Stack,
        config: DPOLossConfig,
        train: TrainConfig,
    ) -> None:
        super().__init__(host, examples, stack, train)
        self.reference, self.config = reference, config

    def policy_logps(self, examples: Sequence[Example]) -> Tensor:
        """completion_logps under the policy: (C,)."""
        with self.host.use(*self.stack):
            return completion_logps(self.host, examples)

    def reference_logps(self, examples: Sequence[Example]) -> Tensor:
        """completion_logps under the reference, without gradient: (C,). Taken from Example.reference where all have it."""
        if all(e.reference is not None for e in examples):
            return torch.tensor([value for e in examples for value in e.reference], device=self.host.base.device)
        with torch.no_grad(), self.host.use(*self.reference):
            return completion_logps(self.host, examples)
