"""FlatWeights: one adapter's weights in one fp32 buffer, so that one optimizer state, norm and update serve them all."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lowalign.errors import UserError

ALIGNMENT = 256  # elements; the block of the 8-bit optimizer state, which must not mix two tensors


class FlatWeights:
    """All weights of one adapter in one fp32 buffer, the optimizer's master.

    named: the adapter's parameters; they keep their identity, only what they point at changes. Without working_dtype
    (or with fp32) they become views of the master. Otherwise they become views of a copy in that precision: the model
    computes with the copy, its gradients are summed in fp32, and `publish` renews it after each optimizer step. Those
    named in `exact` are views of the master all the same.

    master: (numel,) fp32 parameter with an fp32 .grad of the same size. Each tensor starts at a multiple of 256; what
    an optimizer makes of the gaps has no meaning (their gradient is zero). reached: names of the tensors that a backward pass has produced a gradient for so far.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        working_dtype: torch.dtype | None = None,
        exact: Collection[str] = (),
    ) -> None:
        self._named = dict(named)
        self._exact = set(exact) & self._named.keys()
        self._starts: dict[str, int] = {}
        end = 0
        for name, p in self._named.items():
            self._starts[name] = end
            end += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        device = next(iter(self._named.values())).device
        self.reached: set[str] = set()
        self.master = nn.Parameter(torch.zeros(end, device=device))
        self.master.grad = torch.zeros_like(self.master)
        with torch.no_grad():
            for name, view in self.tensors().items():
                view.copy_(self._named[name])
        low = working_dtype is not None and working_dtype != torch.float32
        self._working = self.master.detach().to(working_dtype) if low else None
        self._point()

    def _point(self) -> None:
        """Make the model's parameters views of the buffers."""
        views = self.tensors()
        if self._working is not None:
            views |= {k: v for k, v in self._cut(self._working).items() if k not in self._exact}
        self._grads = self.gradients()
        for name, p in self._named.items():
            p.grad = None
            p.data = views[name]

    def _cut(self, buffer: Tensor) -> dict[str, Tensor]:
        return {
            name: buffer[start : start + self._named[name].numel()].view(self._named[name].shape)
            for name, start in self._starts.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name: fp32 views of the master."""
        return self._cut(self.master.detach())

    def gradients(self) -> dict[str, Tensor]:
        """The collected gradients by name: fp32 views of the master's."""
        return self._cut(self.master.grad)

    def zero_grad(self) -> None:
        """Forget all gradients, those of a backward that broke off too."""
        self.master.grad.zero_()
        for name, p in self._named.items():
            if p.grad is not self._grads[name]:
                p.grad = None

    def collect(self) -> None:
        """Add the gradients of the last backward to the master's, in fp32."""
        for name, p in self._named.items():
            if p.grad is None or p.grad is self._grads[name]:
                continue
            self.reached.add(name)
            self._grads[name].add_(p.grad)
            # In fp32 the next backward adds straight into the master's gradient.
            p.grad = self._grads[name] if self._working is None else None

    def publish(self) -> None:
        """Renew the working copy; call it after each change of the master."""
        if self._working is not None:
            self._working.copy_(self.master.detach())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy weights in. Raises UserError unless names and shapes are exactly the adapter's."""
        own = self.tensors()
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or extra:
            raise UserError(f"these weights do not fit the adapter: missing {missing[:3]}, not known {extra[:3]}")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise UserError(f"{name} has shape {tuple(tensor.shape)}; the adapter has {tuple(own[name].shape)}")
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        self.publish()

    def move(self, device: torch.device | str) -> None:
        """Park an idle adapter, gradients and all, in CPU memory, or bring it back. No bit changes."""
        gradient = self.master.grad.to(device, copy=True)
        self.master.grad = None
        self.master.data = self.master.data.to(device, copy=True)
        self.master.grad = gradient
        self._working = None if self._working is None else self._working.to(device, copy=True)
        self._point()
