"""What torch's own allocator hands out on the CPU: the instrument that the Meter is compared with."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch.profiler import ProfilerActivity, profile

from lowalign.plan.dry_run import DryRun


def allocated_peak(run: Callable[[], object]) -> int:
    """The most bytes that `run` holds at a time, beyond those that were held before. The profiler sees every allocation, also
    those inside kernels."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@dataclass
class MeasuredPhase:
    """name, and the bytes at its peak."""

    name: str
    peak: int


@dataclass
class MeasuredRun(DryRun):
    """The same phases on a real Base on the CPU, measured by the allocator."""

    measured: list[MeasuredPhase] = field(default_factory=list)

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.measured = []

    def measure(self, name: str, run: Callable[[], object], repeats: float = 1.0) -> None:
        """Run a part of the step under the profiler."""
        self.meter.start()
        before = self.meter.peak.total
        super().measure(name, lambda: self.measured.append(MeasuredPhase(name, before + allocated_peak(run))), repeats)
