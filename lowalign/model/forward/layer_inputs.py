"""The inputs of checkpointed layers, between the forward and the backward: on their device, in CPU memory, or computed again."""

from collections.abc import Callable

import torch
from torch import Tensor


class LayerInput:
    """The input x of one layer, kept where it is. previous: the input of the layer before it in the same forward."""

    def __init__(self, x: Tensor, previous: "LayerInput | None") -> None:
        self._x, self.previous = x.detach(), previous

    def get(self) -> Tensor:
        """x on its device."""
        return self._x

    def prefetch(self) -> None:
        """Begin to bring x to its device; `get` waits for it."""

    def prefetch_previous(self) -> None:
        """The same for the layer whose gradient is computed next."""
        if self.previous is not None:
            self.previous.prefetch()

    def free_copy(self) -> None:
        """Nobody else uses x: free it on its device where `get` can bring it back."""

    def release(self) -> None:
        """Free it: the layer's gradient has been computed."""
        self._x = self.previous = None


class OffloadedInput(LayerInput):
    """x in CPU memory; on CUDA copied by a side stream while the next layers compute. On the CPU x stays where it is."""

    def __init__(self, x: Tensor, previous: LayerInput | None, stream: "torch.cuda.Stream | None") -> None:
        super().__init__(x, previous)
        self._device, self._stream, self._on_device = x.device, stream, None
        if x.is_meta:  # a dry run: the meter counts the copy
            self._x = x.detach().to("cpu")
        elif stream is not None:
            source, self._x = self._x, torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                self._x.copy_(source, non_blocking=True)
            source.record_stream(stream)

    def prefetch(self) -> None:
        if self._on_device is not None or self._x is None:
            return
        if self._stream is None:
            self._on_device = self._x.to(self._device)
            return
        # Allocated for the stream that computes, whose memory would otherwise be divided between two.
        self._on_device = torch.empty(self._x.shape, dtype=self._x.dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._on_device.copy_(self._x, non_blocking=True)
            self._copied = self._stream.record_event()
        self._on_device.record_stream(self._stream)

    def get(self) -> Tensor:
        self.prefetch()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        return self._on_device

    def free_copy(self) -> None:
        self._on_device = None

    def release(self) -> None:
        super().release()
        self._on_device = None


class RecomputedInput(LayerInput):
    """x is not kept: the layer before it computes it again from its own input."""

    def __init__(self, compute: Callable[[Tensor], Tensor], previous: LayerInput) -> None:
        self.previous, self._compute = previous, compute
        self._x: Tensor | None = None

    def get(self) -> Tensor:
        if self._x is None:
            self._x = self._compute(self.previous.get())
            self.previous.free_copy()
        return self._x

    def prefetch(self) -> None:
        self.previous.prefetch()

    def release(self) -> None:
        super().release()
        self._compute = None
