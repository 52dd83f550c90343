"""Loss, metrics and gradients of a step, in micro-batches that fit in memory, shared out between the processes of a run."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lowalign import processes
from lowalign.data.micro_batches import in_micro_batches, own_share
from lowalign.data.pack import Example
from lowalign.log import BAR_DELAY, progress
from lowalign.model.adapters.flat import FlatWeights
from lowalign.train.method import Method
from lowalign.train.signals import StopSignals


class MicroBatches:
    """Adds up a method's loss over micro-batches of at most `budget` tokens.

    When memory runs out the budget is halved and the whole step starts again. Each part is divided by the normalizers of
    the whole step, so the sum does not depend on how the step is cut. Each process computes its share; then all have the sums.
    """

    def __init__(self, method: Method, flats: Mapping[str, FlatWeights], budget: int, stop: StopSignals) -> None:
        self.method, self.flats, self.budget, self.stop = method, flats, budget, stop
        self.on_micro_batch: Callable[[Sequence[Example]], None] = lambda _: None

    def gradients(self, examples: Sequence[Example], seed: int) -> dict[str, Tensor]:
        """Metrics, the loss among them; the gradients are left in the flat masters. seed: torch's, for dropout."""
        return self._sums(examples, seed)

    def metrics(self, examples: Sequence[Example], shown: str = "") -> dict[str, Tensor]:
        """Metrics, the loss among them, without gradients. shown: what a progress bar says, if there is to be one."""
        options = {"total": len(own_share(examples)), "unit": "row", "desc": shown, "leave": False, "delay": BAR_DELAY}
        with progress(bool(shown), **options) as bar:
            return self._sums(examples, None, bar.update)

    def _sums(
        self, examples: Sequence[Example], seed: int | None, done: Callable[[int], object] = lambda _: None
    ) -> dict[str, Tensor]:
        """seed None: without gradients. done: called with the number of rows after each micro-batch."""
        normalizers = self.method.normalizers(examples)
        sums: dict[str, Tensor] = {}

        def start(budget: int) -> None:
            self.budget = budget
            sums.clear()
            for flat in self.flats.values():
                flat.zero_grad()
            if seed is not None:
                # The same dropout on the rows of each process would not be independent.
                torch.manual_seed(seed + processes.rank())

        def compute(micro_batch: list[Example]) -> None:
            self.stop.check()
            with torch.set_grad_enabled(seed is not None):
                loss, metrics = self.method.loss(micro_batch, normalizers)
            if seed is not None:
                loss.backward()
                for flat in self.flats.values():
                    flat.accumulate()
                self.on_micro_batch(micro_batch)
            for name, value in ({"loss": loss} | metrics).items():
                part = torch.as_tensor(value, device=loss.device).detach().double()
                sums[name] = _add(name, sums[name], part) if name in sums else part
            done(len(micro_batch))

        start(self.budget)
        in_micro_batches(own_share(examples), self.budget, compute, restart=start)
        if processes.count() == 1:
            return sums
        if seed is not None:
            for flat in self.flats.values():
                processes.sum_(flat.master.grad)
        device = next((flat.master.device for flat in self.flats.values()), None)
        return _sums_of_all(sums, device)


def _add(name: str, a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a, b) if name.endswith("_max") else a + b


def _sums_of_all(sums: Mapping[str, Tensor], device: torch.device | None) -> dict[str, Tensor]:
    """Of the processes; one that had no Example of the step has none."""
    whole: dict[str, Tensor] = {}
    for part in processes.gather({name: value.item() for name, value in sums.items()}):
        for name, value in part.items():
            tensor = torch.tensor(value, dtype=torch.float64, device=device)
            whole[name] = _add(name, whole[name], tensor) if name in whole else tensor
    return whole
