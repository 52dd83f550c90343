"""Meter: sees every allocation, kernel and transfer while code runs, without changing what it computes.

It works on the meta device, where tensors have no data and an 8B model takes no memory, and on real CPU tensors, where the
same code gives the figures that a prediction is compared with.

Not seen: memory inside kernels (the largest are in lowalign.plan.kernels), the allocator's fragmentation, the context.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lowalign.plan.kernels import VIEWS, flops, workspace

BLOCK = 512  # bytes; the CUDA allocator rounds up to multiples of it
OTHER, WORKSPACE, CPU = "other", "workspace", "cpu"


@dataclass
class Peak:
    """The largest sum of live bytes: in all, by component, and where it was reached."""

    total: int = 0
    components: Counter = field(default_factory=Counter)
    where: str = ""


@dataclass
class Work:
    """kernels, bytes moved and FLOPs by operation; seconds: their roofline time. copied: bytes to and from CPU memory.
    syncs: how often the host waited for a number."""

    kernels: Counter = field(default_factory=Counter)
    moved: Counter = field(default_factory=Counter)
    flops: Counter = field(default_factory=Counter)
    calls: list[tuple[int, int]] = field(default_factory=list)  # (FLOPs, bytes) of each kernel
    copied: int = 0
    syncs: int = 0


class Meter(TorchDispatchMode):
    """Within it, tensors on `device` ("meta" or "cpu") are counted, each under the component that is set when it is made.

    On the meta device, numbers that are read back are 1.0 or False, and a copy in CPU memory is a zero that takes no memory;
    its bytes are counted as CPU memory.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.component, self.place = OTHER, ""
        self.peak, self.work = Peak(), Work()
        self.cpu_now = self.cpu_peak = 0
        self._live: dict[int, list] = {}  # storage -> [bytes, component]
        self._by_component: Counter = Counter()
        self._now = 0

    # -- what the planner sets ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def within(self, component: str, place: str = "") -> Iterator[None]:
        """Count what is allocated in it under this component."""
        before = self.component, self.place
        self.component, self.place = component, place or self.place
        try:
            yield
        finally:
            self.component, self.place = before

    def start(self) -> None:
        """Begin a measurement: the peak starts at what is live now."""
        self.peak, self.work, self.cpu_peak = Peak(), Work(), self.cpu_now
        self._raise_peak("")

    def assign(self, component: str, tensors: Iterable[Tensor]) -> None:
        """Count these live tensors under another component; those that were made outside are counted from now on."""
        for tensor in tensors:
            if tensor.device.type != self.device:
                continue
            self._hold(tensor)
            entry = self._live[tensor.untyped_storage()._cdata]
            self._by_component[entry[1]] -= entry[0]
            self._by_component[component] += entry[0]
            entry[1] = component

    # -- counting -----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.device == "meta":
            answered, out = self._read_back(func, args, kwargs)
            if answered:
                return out
        out = func(*args, **kwargs)
        own = [t for t in tree_iter(out) if isinstance(t, Tensor) and t.device.type == self.device]
        for tensor in own:
            self._hold(tensor)
        name = func._schema.name.split("::")[1]
        if name in VIEWS:
            return out
        used = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor) and t.device.type == self.device]
        if used or own:
            self._count(func, name, args, kwargs, out, (*used, *own))
        return out

    def _count(self, func, name: str, args, kwargs, out, tensors: tuple[Tensor, ...]) -> None:
        transient = workspace(name, args)
        if self._now + transient > self.peak.total:
            self._raise_peak(name, transient)
        moved, done = sum(t.numel() * t.element_size() for t in tensors), flops(func, args, kwargs, out)
        work = self.work
        work.kernels[name] += 1
        work.syncs += name == "nonzero" or (name == "index" and _by_mask(args[1]))
        work.moved[name] += moved
        work.flops[name] += done
        work.calls.append((done, moved))

    def _read_back(self, func, args, kwargs) -> tuple[bool, object]:
        """(True, the answer) where the host reads a meta tensor: there is no data to read."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.work.syncs += 1
            return True, False if args[0].dtype == torch.bool else 1.0
        to_cpu = func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        if to_cpu and args[0].is_meta:
            self.work.syncs += 1
            size = args[0].numel() * args[0].element_size()
            self.work.copied += size
            copy = torch.zeros((), dtype=kwargs.get("dtype") or args[0].dtype).expand(args[0].shape)
            # Pinned memory, in which activations are kept, is handed out in powers of two.
            self._hold_on_cpu(copy, 1 << max(0, size - 1).bit_length())
            return True, copy
        if func is torch.ops.aten._to_copy.default and not args[0].is_meta and args[0].numel() > 1:
            self.work.copied += args[0].numel() * args[0].element_size()
        return False, None

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._live[key] = [size, self.component]
        self._now += size
        self._by_component[self.component] += size
        if self._now > self.peak.total:
            self._raise_peak("")
        weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        size, component = self._live.pop(key)
        self._now -= size
        self._by_component[component] -= size

    def _hold_on_cpu(self, copy: Tensor, size: int) -> None:
        self.cpu_now += size
        self.cpu_peak = max(self.cpu_peak, self.cpu_now)

        def release() -> None:
            self.cpu_now -= size

        weakref.finalize(copy.untyped_storage(), release).atexit = False

    def _raise_peak(self, operation: str, transient: int = 0) -> None:
        backward = "backward of " if torch._C._current_graph_task_id() != -1 else ""
        inside = f" ({operation})" if operation else ""
        components = Counter(self._by_component)
        components[WORKSPACE] += transient
        self.peak = Peak(self._now + transient, components, f"{backward}{self.place}{inside}")


def _by_mask(indices: Iterable[Tensor | None]) -> bool:
    """Whether a tensor is indexed by a mask, whose number of places the host waits for."""
    return any(index is not None and index.dtype == torch.bool for index in indices)
