"""The measured peak of a card's memory beside the predicted one, after the first steps of a run with --fit."""

import time
from collections.abc import Callable, Sequence

import torch

from lowalign.config.cards import GIB
from lowalign.data.pack import Example
from lowalign.log import log

STEPS = 10
Predict = Callable[[Sequence[Example]], int]  # bytes of tensors at most in a step with this micro-batch
SAID_FROM = 0.10  # of the prediction: a larger difference is said


class PeakCheck:
    """Counts from its creation on. Without predict nothing is done.

    metrics: what the next line of metrics.jsonl gets beside its peak_gpu_memory_gib.
    """

    def __init__(self, predict: Predict | None, device: torch.device) -> None:
        self.predict, self.device, self.steps = predict, device, 0
        self.largest: Sequence[Example] = ()
        self.metrics: dict[str, float] = {}
        if predict is not None and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def saw(self, micro_batch: Sequence[Example]) -> None:
        """A micro-batch was computed."""
        if self.predict is not None and _tokens(micro_batch) > _tokens(self.largest):
            self.largest = micro_batch

    def after_step(self, last: bool) -> float:
        """Compare when it is time. last: no step follows. -> the seconds it took."""
        self.steps += 1
        if self.predict is None or not (self.steps == STEPS or last):
            return 0.0
        started = time.perf_counter()
        measured, predict, self.predict = measured_peak(self.device), self.predict, None
        if measured is not None and self.largest:
            self._compare(measured, predict)
        return time.perf_counter() - started

    def _compare(self, measured: int, predict: Predict) -> None:
        try:
            predicted = predict(self.largest)
        except Exception as error:  # a prediction must not end a run
            log(f"peak memory {measured / GIB:.2f} GiB; it could not be predicted: {str(error).splitlines()[0]}")
            return
        self.metrics = {"predicted_peak_gib": predicted / GIB}
        difference = measured / predicted - 1
        text = (
            f"peak memory after {self.steps} steps: {measured / GIB:.2f} GiB measured, {predicted / GIB:.2f} predicted for its "
            f"largest micro-batch of {_tokens(self.largest):,} tokens ({difference:+.0%})"
        )
        if abs(difference) > SAID_FROM:
            text += (
                "; that is more than 10 % off: "
                + ("lower --train.token-budget if memory runs out" if difference > 0 else "there is room for more")
                + ", and please report it"
            )
        log(text)


def measured_peak(device: torch.device) -> int | None:
    """Bytes of tensors at most on a card; None on the CPU, whose allocator does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _tokens(micro_batch: Sequence[Example]) -> int:
    return sum(e.length for e in micro_batch)
