"""FlatWeights: one adapter's weights in one fp32 buffer, so that one optimizer state, norm and update serve them all."""

import weakref
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lowalign.errors import UserError

ALIGNMENT = 256  # elements; the block of the 8-bit optimizer state, which must not mix two tensors


class FlatWeights:
    """All weights of one adapter in one fp32 buffer, the optimizer's master.

    named: the adapter's parameters. They stay the same objects; only their data changes. In fp32 they become views of the
    master. In another working_dtype they become views of a copy in that precision: the model computes with the copy, each
    gradient is added to the master's as soon as the backward has it, in fp32, and `sync_working_copy` updates the copy after
    each optimizer step. keep_fp32: names of parameters that are views of the master in any case.

    master: (numel,) fp32 parameter with an fp32 .grad of the same size. Each tensor starts at a multiple of ALIGNMENT;
    the gaps between them have zero gradient and no meaning. has_gradient: names of the tensors that have received a
    gradient (zero or not) from any backward pass so far.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        working_dtype: torch.dtype = torch.float32,
        keep_fp32: Collection[str] = (),
    ) -> None:
        self._named = dict(named)
        self._keep_fp32 = set(keep_fp32) & self._named.keys()
        self._offsets: dict[str, int] = {}
        end = 0
        for name, p in self._named.items():
            self._offsets[name] = end
            end += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        device = next(iter(self._named.values())).device
        self.has_gradient: set[str] = set()
        self.master = nn.Parameter(torch.zeros(end, device=device))
        self.master.grad = torch.zeros_like(self.master)
        with torch.no_grad():
            for name, view in self.tensors().items():
                view.copy_(self._named[name])
        self._working = None if working_dtype == torch.float32 else self.master.detach().to(working_dtype)
        self._attach_parameters()
        if self._working is not None:
            for name in self._named.keys() - self._keep_fp32:
                self._add_at_once(name)

    def _add_at_once(self, name: str) -> None:
        """Have each gradient of a parameter added to the master's when the backward makes it: there is no second copy of all."""
        flat, p = weakref.ref(self), self._named[name]

        def add(p: Tensor) -> None:
            own = flat()
            if own is not None:  # else the adapter computes without this buffer again
                own._add(name, p)

        trained = p.requires_grad
        p.requires_grad_().register_post_accumulate_grad_hook(add)
        p.requires_grad_(trained)

    def _add(self, name: str, p: Tensor) -> None:
        self.has_gradient.add(name)
        self._grads[name].add_(p.grad)
        p.grad = None

    def _attach_parameters(self) -> None:
        """Make the model's parameters views of the buffers."""
        views = self.tensors()
        if self._working is not None:
            views |= {k: v for k, v in self._views(self._working).items() if k not in self._keep_fp32}
        self._grads = self.gradients()
        for name, p in self._named.items():
            p.grad = None
            p.data = views[name]

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        return {
            name: buffer[offset : offset + self._named[name].numel()].view(self._named[name].shape)
            for name, offset in self._offsets.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name: fp32 views of the master."""
        return self._views(self.master.detach())

    def gradients(self) -> dict[str, Tensor]:
        """The accumulated gradients by name: fp32 views of the master's."""
        return self._views(self.master.grad)

    def zero_grad(self) -> None:
        """Clear all gradients, also those of a backward that was not accumulated."""
        self.master.grad.zero_()
        for name, p in self._named.items():
            if p.grad is not self._grads[name]:
                p.grad = None

    def accumulate(self) -> None:
        """Add the gradients of the last backward to the master's, where the backward has not done so."""
        for name, p in self._named.items():
            if p.grad is not None and p.grad is not self._grads[name]:
                self._add(name, p)
                p.grad = self._grads[name]  # fp32: the next backward adds straight into it

    def sync_working_copy(self) -> None:
        """Update the working copy; call it after each change of the master."""
        if self._working is not None:
            self._working.copy_(self.master.detach())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy weights in. Raises UserError unless names and shapes are exactly the adapter's."""
        own = self.tensors()
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or extra:
            raise UserError(f"these weights do not fit the adapter: missing {missing[:3]}, unknown {extra[:3]}")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise UserError(f"{name} has shape {tuple(tensor.shape)}; the adapter has {tuple(own[name].shape)}")
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        self.sync_working_copy()

    def move(self, device: torch.device | str) -> None:
        """Move weights and gradients to another device. No bit changes."""
        gradient = self.master.grad.to(device, copy=True)
        self.master.grad = None
        self.master.data = self.master.data.to(device, copy=True)
        self.master.grad = gradient
        self._working = None if self._working is None else self._working.to(device, copy=True)
        self._attach_parameters()
