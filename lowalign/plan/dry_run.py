"""A dry run: a command's own forward, backward and optimizer step, counted by a Meter.

On a Base of the meta device it predicts; on a real Base on the CPU the same code measures what a prediction is compared with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch.fx.experimental import _config as tracing

from lowalign.config.sections import AdapterConfig, TrainConfig
from lowalign.config.training import RunConfig
from lowalign.data.pack import Example
from lowalign.model.adapters.kinds import BY_OPTION
from lowalign.model.attention.device import planned_device
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import INIT, POLICY, Stack, add_fresh
from lowalign.plan.fused_attention import fused_attention
from lowalign.plan.marks import ADAPTERS, BASE, OPTIMIZER, Marks
from lowalign.plan.meta_base import base_tensors
from lowalign.plan.meter import OTHER, Meter, Peak, Work
from lowalign.train.accumulate import MicroBatches
from lowalign.train.method import Method
from lowalign.train.optim import make_optimizer
from lowalign.train.signals import StopSignals

UNBOUNDED = 2**62  # tokens: the micro-batches of a dry run are made before, and are not divided


@dataclass(frozen=True)
class Phase:
    """A part of a step (or of PPO's round) that was run once. repeats: how often the step has it."""

    name: str
    peak: Peak
    work: Work
    repeats: float


class DryRun:
    """Adapters of a run on a Base, and a Meter.

    phases: what was run so far. cpu_bytes: the most that was in CPU memory. device: the type of device that a Base on the
    meta device stands for.
    """

    def __init__(self, base: Base, train: TrainConfig, device: str = "cuda") -> None:
        self.base, self.train, self.device = base, train, device
        self.meter = Meter(base.device.type)
        self.host = Host(base)
        self.host.training(None, tile=train.tile)
        self.host.can_tile  # noqa: B018 - its probe computes on the CPU, which is not to be counted
        self.marks = Marks(self.meter, base.model, train.checkpointing != "off")
        self.phases: list[Phase] = []
        self.cpu_bytes = 0
        tensors = base_tensors(base.model)
        self.meter.assign(BASE, tensors)
        if base.device.type != "cpu":  # the embedding, where it is in CPU memory
            self.meter.cpu_now += sum(t.numel() * t.element_size() for t in tensors if t.device.type == "cpu")

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within it everything is counted. Adapters are made, phases run and Examples packed in it."""
        with ExitStack() as stack:
            stack.enter_context(tracing.patch(meta_nonzero_assume_all_nonzero=True))  # masks: all tokens
            stack.enter_context(planned_device(self.device))
            stack.enter_context(fused_attention())
            stack.enter_context(self.marks)
            stack.enter_context(self.meter)
            yield

    # -- adapters -----------------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, options: AdapterConfig, head: bool = False, frozen: bool = False) -> None:
        """A fresh adapter. head: with a scalar head. frozen: as it computes after it was loaded."""
        with self.meter.within(ADAPTERS), torch.device(self.base.device):
            add_fresh(self.host, name, replace(options, init_text=None), ())
            if head:
                self.host.add_scalar_head(name, zero=True)
            if frozen:
                self.host.adapters[name].compute_as_trained()

    def add_policy(self, config: RunConfig) -> tuple[Stack, Stack]:
        """-> the policy's stack and the stack it starts from. An adapter in --init counts as one of the policy's size."""
        initial: Stack = ()
        if config.init:
            self.add_adapter(INIT, config.adapter, frozen=True)
            initial = (INIT,)
        self.add_adapter(POLICY, config.adapter)
        copied = config.init_mode == "copy" or BY_OPTION[config.adapter.kind].soft
        return (POLICY,) if copied else (*initial, POLICY), initial

    # -- what a step consists of --------------------------------------------------------------------------------------

    def measure(self, name: str, run: Callable[[], object], repeats: float = 1.0) -> None:
        """Run a part of the step and keep its figures."""
        self.meter.start()
        with self.meter.within(OTHER, "before the layers"):
            run()
        self.phases.append(Phase(name, self.meter.peak, self.meter.work, repeats))
        self.cpu_bytes = max(self.cpu_bytes, self.meter.cpu_peak)

    def update(self, method: Method, micro_batch: Sequence[Example], micro_batches: float, steps: float = 1.0) -> None:
        """Measure the gradients of a micro-batch and the optimizer step. micro_batches: of a step."""
        host = self.host
        host.train_only(*method.lr_multipliers)
        with self.meter.within(ADAPTERS):
            flats = {name: host.flat(name) for name in method.lr_multipliers}
        train = self.train
        host.training(train.checkpointing, train.tile, train.keep_layers, train.checkpoint_every)
        optimizer = make_optimizer({name: flat.master for name, flat in flats.items()}, _unpaged(self.train))
        sums = MicroBatches(method, flats, UNBOUNDED, StopSignals())

        def step() -> None:
            for flat in flats.values():
                torch.linalg.vector_norm(flat.master.grad)
            with self.meter.within(OPTIMIZER):
                optimizer.step()
            for flat in flats.values():
                flat.sync_working_copy()

        # The state of the optimizer is made by the first step and is there in every later one.
        with self.meter.within(OPTIMIZER):
            optimizer.step()
        self.measure("gradients", lambda: sums.gradients(micro_batch, 0), micro_batches * steps)
        self.measure("optimizer step", step, steps)
        host.training(None)


def _unpaged(train: TrainConfig) -> TrainConfig:
    """Paged state counts as memory of the device, where it is as long as nothing forces it out."""
    return train if train.optimizer == "adamw" else replace(train, optimizer="adamw_8bit")
