"""Loss, metrics and gradients of a step, in micro-batches that fit in memory."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowalign.data.micro_batches import in_micro_batches
from lowalign.data.pack import Example
from lowalign.model.adapters.flat import FlatWeights
from lowalign.train.method import Method
from lowalign.train.signals import StopSignals


class MicroBatches:
    """Adds up a method's loss over micro-batches of at most `budget` tokens.

    When memory runs out the budget is halved and the whole step starts again. Each part is divided by the normalizers of
    the whole step, so the sum does not depend on how the step is cut.
    """

    def __init__(self, method: Method, flats: Mapping[str, FlatWeights], budget: int, stop: StopSignals) -> None:
        self.method, self.flats, self.budget, self.stop = method, flats, budget, stop

    def gradients(self, examples: Sequence[Example], seed: int) -> dict[str, Tensor]:
        """Metrics, the loss among them; the gradients are left in the flat masters. seed: torch's, for dropout."""
        return self._sums(examples, seed)

    def metrics(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Metrics, the loss among them, without gradients."""
        return self._sums(examples, None)

    def _sums(self, examples: Sequence[Example], seed: int | None) -> dict[str, Tensor]:
        """seed None: without gradients."""
        normalizers = self.method.normalizers(examples)
        sums: dict[str, Tensor] = {}

        def start(budget: int) -> None:
            self.budget = budget
            sums.clear()
            for flat in self.flats.values():
                flat.zero_grad()
            if seed is not None:
                torch.manual_seed(seed)

        def compute(micro_batch: list[Example]) -> None:
            self.stop.check()
            with torch.set_grad_enabled(seed is not None):
                loss, metrics = self.method.loss(micro_batch, normalizers)
            if seed is not None:
                loss.backward()
                for flat in self.flats.values():
                    flat.accumulate()
            for name, value in ({"loss": loss} | metrics).items():
                part = torch.as_tensor(value, device=loss.device).detach().double()
                add = torch.maximum if name.endswith("_max") else torch.add
                sums[name] = add(sums[name], part) if name in sums else part

        start(self.budget)
        in_micro_batches(examples, self.budget, compute, restart=start)
        return sums
