"""What torch's own allocator hands out on the CPU: the instrument that the Meter is compared with."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile

from lowalign import Base
from lowalign.config.sections import TrainConfig
from lowalign.plan.dry_run import DryRun


def allocated_peak(run: Callable[[], object]) -> int:
    """The most bytes that `run` holds at a time, beyond those that were held before. The profiler sees every allocation, also
    those inside kernels."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, _no_garbage_collection():
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The profiler reports when memory of an earlier measurement is freed. Were its garbage collected within this one, its bytes
    would be subtracted from this peak."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class MeasuredRun(DryRun):
    """The phases of a dry run on a real Base on the CPU. measured: the name of each, and its peak by the allocator."""

    def __init__(self, base: Base, train: TrainConfig) -> None:
        super().__init__(base, train)
        self.measured: list[tuple[str, int]] = []

    def measure(self, name: str, run: Callable[[], object], repeats: float = 1.0) -> None:
        """Run a part of the step under the profiler."""
        self.meter.start()
        before = self.meter.peak.total
        super().measure(name, lambda: self.measured.append((name, before + allocated_peak(run))), repeats)
