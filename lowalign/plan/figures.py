"""The figures of a plan: peak by component, where it is, roofline time, traffic, memory of the CPU, disk."""

from dataclasses import dataclass
from typing import Any

from lowalign.config.cards import GIB, Card
from lowalign.plan.dry_run import DryRun, Phase
from lowalign.plan.meter import Work
from lowalign.train.optim import state_bytes

CONTEXT = GIB // 2  # the CUDA context and the kernels it loads; not seen by a dry run
# Shares of a card's published figures that large kernels reach, and the time to start a small one.
MATRIX_SHARE, BANDWIDTH_SHARE, LAUNCH = 0.8, 0.85, 2e-6
HOST_BANDWIDTH = 20e9  # bytes a second between card and CPU memory, PCIe 4.0 x16


@dataclass(frozen=True)
class Figures:
    """What a dry run of one configuration found. tokens: those that its speed is measured by. trained: number of weights.

    length, token_budget, checkpointing: the setting that was run. left_free: bytes of the card that are not used.
    """

    length: int
    token_budget: int
    checkpointing: str
    phases: list[Phase]
    tokens: int
    cpu_bytes: int
    trained: int
    state: int
    left_free: int

    @classmethod
    def of(cls, run: DryRun, length: int, token_budget: int, tokens: int, leave_free: float) -> "Figures":
        """Of a run whose phases are done. leave_free: GiB."""
        trained = sum(run.host.flat(name).master.numel() for name in run.host.trained)
        state = state_bytes(run.train, trained)
        return cls(
            length,
            token_budget,
            run.train.checkpointing,
            run.phases,
            tokens,
            run.cpu_bytes,
            trained,
            state,
            int(leave_free * GIB),
        )

    @property
    def highest(self) -> Phase:
        """The phase with the largest peak."""
        return max(self.phases, key=lambda phase: phase.peak.total)

    @property
    def peak(self) -> int:
        """Bytes of tensors at most, as torch.cuda.max_memory_allocated counts them."""
        return self.highest.peak.total

    @property
    def needed(self) -> int:
        """Bytes of a card: the peak, the context, and what is left free."""
        return self.peak + CONTEXT + self.left_free

    @property
    def micro_batch(self) -> Phase:
        """The phase whose kernels and traffic are given: forward and backward of one micro-batch, or scoring."""
        return next((phase for phase in self.phases if phase.name == "gradients"), self.phases[-1])

    def seconds(self, card: Card) -> float:
        """Roofline time of a step (ppo, best-of-n: of a round)."""
        return sum(phase.repeats * seconds(phase.work, card) for phase in self.phases)

    def checkpoint(self) -> int:
        """Bytes of one checkpoint: fp32 weights and the optimizer's state."""
        return 4 * self.trained + self.state

    def report(self, card: Card) -> dict[str, Any]:
        """As `lowalign plan --json` prints them."""
        work, peak = self.micro_batch.work, self.highest.peak
        components = {name: gib(size) for name, size in peak.components.items() if size}
        return {
            "peak_gib": gib(self.peak),
            "components": dict(sorted(components.items(), key=lambda item: -item[1])),
            "where": f"{self.highest.name}: {peak.where}".rstrip(": "),
            "context_gib": gib(CONTEXT),
            "left_free_gib": gib(self.left_free),
            "phases": {phase.name: gib(max(p.peak.total for p in self.phases if p.name == phase.name)) for phase in self.phases},
            "step_seconds": round(self.seconds(card), 3),
            "tokens_per_second": round(self.tokens / self.seconds(card), 1),
            "kernels": sum(work.kernels.values()),
            "bytes_moved_gb": round(sum(work.moved.values()) / 1e9, 2),
            "tflops": round(sum(work.flops.values()) / 1e12, 3),
            "cpu_gib": gib(self.cpu_bytes),
            "checkpoint_gb": round(self.checkpoint() / 1e9, 3),
            "trained_weights": self.trained,
        }  # fmt: skip


def seconds(work: Work, card: Card) -> float:
    """Each kernel takes as long as its arithmetic, its traffic or its start, whichever is longest (arXiv: Williams et al.,
    Roofline, CACM 2009); copies to CPU memory overlap with them."""
    flops, bandwidth = card.bf16 * 1e12 * MATRIX_SHARE, card.bandwidth * 1e9 * BANDWIDTH_SHARE
    kernels = sum(max(done / flops, moved / bandwidth, LAUNCH) for done, moved in work.calls)
    return max(kernels, work.copied / HOST_BANDWIDTH)


def gib(size: float) -> float:
    """Bytes in GiB."""
    return round(size / GIB, 3)
