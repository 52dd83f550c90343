"""Loss, metrics and gradients of any number of Examples, as many at a time as fit in memory."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowalign.data.micro_batches import halve_budget, micro_batches
from lowalign.data.pack import Example
from lowalign.model.adapters.flat import FlatWeights
from lowalign.train.method import Method
from lowalign.train.signals import StopSignals


class MicroBatches:
    """Adds up a method's loss over micro-batches of at most `budget` tokens.

    When memory runs out the budget is halved and all is done again from the start. Since each part is divided by the
    normalizers of the whole, the sum is the same however it is cut.
    """

    def __init__(self, method: Method, flats: Mapping[str, FlatWeights], budget: int, stop: StopSignals) -> None:
        self.method, self.flats, self.budget, self.stop = method, flats, budget, stop

    def gradients(self, examples: Sequence[Example], seed: int) -> dict[str, Tensor]:
        """Metrics (the loss among them); the gradients are left in the flat masters. seed: of everything random."""
        return self._sums(examples, seed)

    def metrics(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Metrics (the loss among them) without gradients."""
        return self._sums(examples, None)

    def _sums(self, examples: Sequence[Example], seed: int | None) -> dict[str, Tensor]:
        normalizers = self.method.normalizers(examples)
        while True:
            if seed is not None:
                torch.manual_seed(seed)
                for flat in self.flats.values():
                    flat.zero_grad()
            sums: dict[str, Tensor] = {}
            groups = micro_batches(examples, self.budget)
            try:
                for group in groups:
                    self.stop.check()
                    self._add(sums, group, normalizers, backward=seed is not None)
                return sums
            except torch.OutOfMemoryError as error:
                reason = str(error)
            # Only behind the except has the traceback let go of the activations.
            for flat in self.flats.values():
                flat.zero_grad()
            self.budget = halve_budget(self.budget, groups, group, reason)

    def _add(
        self, sums: dict[str, Tensor], group: Sequence[Example], normalizers: dict[str, float], backward: bool
    ) -> None:
        with torch.set_grad_enabled(backward):
            loss, metrics = self.method.loss(group, normalizers)
        if backward:
            loss.backward()
            for flat in self.flats.values():
                flat.collect()
        for name, value in ({"loss": loss} | metrics).items():
            part = torch.as_tensor(value, device=loss.device).detach().double()
            sums[name] = sums[name] + part if name in sums else part
