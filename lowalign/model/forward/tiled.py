"""A decoder layer in tiles of tokens: its attention runs once over the whole row, everything else tile by tile.

No layer is written again here. A tile runs the layer's stock forward, and the attention function that the layer calls
(`layer_part=`, lowalign.model.attention.interface) cuts it in two:

    before    the forward ends at its attention, which hands out the queries, keys and values of the tile
    after     the attention returns the tile's slice of what it computed over the whole row; the projections before it are
              not needed there and return zeros

A layer y = after(x, attention(before(x))) of any form has the gradient of `after` in x plus that of `before`, so parallel
blocks, norms after the attention, scaled residuals, and norms of queries and keys need no case of their own. Layers that are
not of this form (an output gate beside the queries) are found by lowalign.model.base.tile_probe.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowalign.model.attention.packed import Layout
from lowalign.model.forward.layer_inputs import LayerInput

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
States = tuple[Tensor, Tensor, Tensor]


class _Reached(Exception):
    """Ends a tile's forward at the attention."""

    def __init__(self, module: nn.Module, attend: Attend, states: States) -> None:
        super().__init__()
        self.module, self.attend, self.states = module, attend, states


def _stop(module: nn.Module, attend: Attend, *states: Tensor) -> Tensor:
    raise _Reached(module, attend, states)


class Layer:
    """A decoder layer. forward: its stock forward, without any checkpointing. index: as prefixes are numbered."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self.module, self.forward = module, forward
        self.index = next((m.layer_idx for m in module.modules() if isinstance(getattr(m, "layer_idx", None), int)), 0)
        self._projections: list[str] | None = None

    def before(self, x: Tensor, args: Sequence, kwargs: dict[str, Any]) -> tuple[States, Attend]:
        """Queries, keys and values of x, and the attention that takes them."""
        called: list[nn.Module] = []
        hooks = [] if self._projections is not None else self._record(called)
        try:
            self.forward(x, *args, **kwargs, layer_part=_stop)
        except _Reached as reached:
            reached.__traceback__ = None  # holds the frames, and so their tensors
            states, attend, attention = reached.states, reached.attend, reached.module
        else:
            raise RuntimeError(f"{type(self.module).__name__} does not call the attention function")
        finally:
            for hook in hooks:
                hook.remove()
        if self._projections is None:
            inside = {m: name for name, m in self.module.named_modules()}
            own = set(attention.modules())
            names = [inside[m] for m in called if m in own]
            # An adapter's layer around a projection, not the projection or the adapter's parts inside it.
            self._projections = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
        return states, attend

    def after(self, x: Tensor, out: Tensor, args: Sequence, kwargs: dict[str, Any]) -> Tensor:
        """The output, given the attention's (1, n, heads, head_dim)."""
        with self._skipped():
            return self.forward(x, *args, **kwargs, layer_part=lambda *_: out)

    def _record(self, called: list[nn.Module]) -> list:
        """Hooks that list the linear layers that are called."""
        note = lambda module, *_: called.append(module)  # noqa: E731
        return [m.register_forward_hook(note) for m in self.module.modules() if _width(m) is not None]

    @contextlib.contextmanager
    def _skipped(self) -> Iterator[None]:
        """Within it the projections before the attention return zeros that take no memory."""
        modules = [self.module.get_submodule(name) for name in self._projections]
        own = [m.__dict__.get("forward") for m in modules]
        for m in modules:
            m.forward = functools.partial(_zeros, _width(m))
        try:
            yield
        finally:
            for m, forward in zip(modules, own, strict=True):
                del m.forward
                if forward is not None:
                    m.forward = forward


def _zeros(width: int, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_zeros(()).expand(*x.shape[:-1], width)


def _width(module: nn.Module) -> int | None:
    """The outputs of a linear layer (nf: of transformers' Conv1D); None for other modules."""
    return getattr(module, "out_features", None) or getattr(module, "nf", None)


class RandomState:
    """The state of torch's generators, of the CPU and of a CUDA device, when it is made."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.cpu, self.cuda = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self.devices]

    def replay(self) -> None:
        """Go back to this state."""
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.cuda, strict=True):
            torch.cuda.set_rng_state(state, device)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Within it the generators start at this state; afterwards they are as they were before."""
        with torch.random.fork_rng(self.devices):
            self.replay()
            yield


class LayerCall:
    """A call of a layer on a row x (1, T, hidden), in tiles of `tile` tokens; 0: of all.

    args, kwargs: of the layer's forward, besides x. Tensors whose second dimension is T (positions, cosines) are cut like x.
    """

    def __init__(self, layer: Layer, tile: int, tokens: int, args: Sequence, kwargs: dict[str, Any]) -> None:
        self.layer, self.tile, self.tokens, self.args, self.kwargs = layer, tile or tokens, tokens, args, kwargs
        self.random: RandomState | None = None

    def remember_dropout(self, device: torch.device) -> None:
        """Call it before the forward: a layer with dropout draws the same again in its recomputation."""
        if any(isinstance(m, nn.Dropout) and m.training and m.p for m in self.layer.module.modules()):
            self.random = RandomState(device)

    def same_dropout(self) -> contextlib.AbstractContextManager:
        """Within it the draws are those of the forward; afterwards the generators are as they were."""
        return self.random.replayed() if self.random else contextlib.nullcontext()

    @property
    def spans(self) -> list[slice]:
        """The tiles."""
        return [slice(i, min(i + self.tile, self.tokens)) for i in range(0, self.tokens, self.tile)]

    @property
    def prefix(self) -> tuple[Tensor, ...]:
        """Keys and values that stand before every prompt in this layer; () without any."""
        states = self.kwargs["layout"].soft.keys_values
        return () if states is None else states[self.layer.index]

    def __call__(self, x: Tensor) -> Tensor:
        """(1, T, hidden). With a graph when there is one tile and gradients are enabled."""
        if self.tokens <= self.tile:
            return self.layer.forward(x, *self.args, **self.kwargs)
        states, attend = self._states(x)
        out = attend(*states)
        del states
        y = torch.empty_like(x)
        for span in self.spans:
            y[:, span] = self._after(x[:, span], out[:, span], span)
        return y

    def backward(self, kept: LayerInput, grad: Tensor, needs_dx: bool) -> tuple[Tensor | None, ...]:
        """Compute the layer again from its input, and its gradients from that of the output. -> (dx, those of the prefix).

        Weights that learn get theirs in .grad, wherever they are: adapters hang on the layers in several ways.
        """
        prefix = [p.detach().requires_grad_(p.requires_grad) for p in self.prefix]
        call = self._with_prefix(prefix)
        if self.tokens > self.tile:
            dx = call._backward_in_tiles(kept, grad, needs_dx)
        else:
            x = kept.get().detach().requires_grad_(needs_dx)
            with torch.enable_grad():
                y = call(x)
            kept.prefetch_previous()
            if y.requires_grad:
                torch.autograd.backward(y, grad)
            dx = x.grad
        return dx, *(p.grad for p in prefix)

    def _backward_in_tiles(self, kept: LayerInput, grad: Tensor, needs_dx: bool) -> Tensor | None:
        x = kept.get()
        states, attend = self._states(x)
        leaves = [t.requires_grad_() for t in states]
        with torch.enable_grad():
            out = attend(*leaves)
        dx, d_out = torch.empty_like(x) if needs_dx else None, torch.empty_like(out)
        for span in self.spans:
            own_x, own_out = x[:, span].detach().requires_grad_(needs_dx), out[:, span].detach().requires_grad_()
            with torch.enable_grad():
                y = self._after(own_x, own_out, span)
            torch.autograd.backward(y, grad[:, span])
            d_out[:, span] = own_out.grad
            if needs_dx:
                dx[:, span] = own_x.grad
        # The attention's backward is the peak of a long row: only what it needs is in memory.
        del x, own_x, own_out, y
        kept.free_copy()
        torch.autograd.backward(out, d_out)
        d_states = [t.grad for t in leaves]
        del states, leaves, out, d_out
        x = kept.get()
        kept.prefetch_previous()
        if self.random:
            self.random.replay()
        for span in self.spans:
            own_x = x[:, span].detach().requires_grad_(needs_dx)
            with torch.enable_grad():
                parts, _ = self._before(own_x, span)
            own = [(part, d[:, :, span]) for part, d in zip(parts, d_states, strict=True) if part.requires_grad]
            if own:  # not in the first layer, with an adapter behind its attention only
                torch.autograd.backward(*zip(*own, strict=True))
                if needs_dx:
                    dx[:, span] += own_x.grad
        return dx

    # -- the parts of a tile ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _states(self, x: Tensor) -> tuple[list[Tensor], Attend]:
        """Queries (1, heads, T, head_dim), keys and values of the whole row, and the attention that takes them."""
        whole: list[Tensor] = []
        for span in self.spans:
            parts, attend = self._before(x[:, span], span)
            whole = whole or [p.new_empty(1, p.shape[1], self.tokens, p.shape[3]) for p in parts]
            for target, part in zip(whole, parts, strict=True):
                target[:, :, span] = part
        return whole, attend

    def _before(self, x: Tensor, span: slice) -> tuple[States, Attend]:
        return self.layer.before(x, self._cut(self.args, span), self._cut(self.kwargs, span))

    def _after(self, x: Tensor, out: Tensor, span: slice) -> Tensor:
        return self.layer.after(x, out, self._cut(self.args, span), self._cut(self.kwargs, span))

    def _cut(self, value: Any, span: slice) -> Any:
        if isinstance(value, Tensor):
            return value[:, span] if value.ndim > 1 and value.shape[1] == self.tokens else value
        if isinstance(value, dict):
            return {key: self._cut(entry, span) for key, entry in value.items()}
        return type(value)(self._cut(v, span) for v in value) if type(value) in (tuple, list) else value

    def _with_prefix(self, prefix: Sequence[Tensor]) -> "LayerCall":
        """The same call with these keys and values before the prompts."""
        if not prefix:
            return self
        layout: Layout = self.kwargs["layout"]
        states = list(layout.soft.keys_values)
        states[self.layer.index] = tuple(prefix)
        layout = replace(layout, soft=replace(layout.soft, keys_values=states))
        call = LayerCall(self.layer, self.tile, self.tokens, self.args, self.kwargs | {"layout": layout})
        call.random = self.random
        return call
