"""Activation checkpointing of decoder layers: what each keeps between forward and backward, and in which tiles it computes."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lowalign.model.forward.layer_inputs import LayerInput, OffloadedInput, RecomputedInput
from lowalign.model.forward.tiled import Layer, LayerCall

TILE = 4096  # tokens; matrix products of fewer rows are slower on a card

Restore = Callable[[], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Checkpointing:
    """What layers keep for the backward.

    mode: "on" their inputs, "offload" their inputs in CPU memory, "off" all activations. tile: longer rows are computed in
    tiles of so many tokens, also without gradients; 0: whole. keep_layers: the last layers, which keep all activations.
    every: the input of each N-th layer is kept, and those between are computed again.
    """

    mode: str = "off"
    tile: int = TILE
    keep_layers: int = 0
    every: int = 1


class CheckpointedLayers:
    """The decoder layers of a model. can_tile: whether they can be cut at their attention; asked when it is first needed."""

    def __init__(self, model: nn.Module, can_tile: Callable[[], bool]) -> None:
        self.can_tile = can_tile
        modules = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        # transformers wraps the forward of each into one that can checkpoint.
        self.layers = [Layer(m, functools.partial(type(m).forward.__wrapped__, m)) for m in modules]
        self.norms = _norms_beside(model, modules[0]) if modules else []

    def keep_last(self, count: int) -> None:
        """Switch transformers' own checkpointing off in the last layers."""
        for layer in self.layers[max(0, len(self.layers) - count) :] if count else ():
            layer.module.gradient_checkpointing = False

    @contextlib.contextmanager
    def computing(self, settings: Checkpointing, restore: Restore) -> Iterator[None]:
        """Within it a forward of the model keeps what the settings say. restore: context of each recomputation."""
        forward = _Forward(self, settings, restore)
        for position, layer in enumerate(self.layers):
            layer.module.forward = functools.partial(forward, position, layer)
        fused = {norm: norm.__dict__.get("forward") for norm in self.norms}  # of the module alone, where it has one
        for norm in self.norms:
            norm.forward = functools.partial(forward.norm, norm.forward)
        try:
            yield
        finally:
            for module in [*(layer.module for layer in self.layers), *self.norms]:
                del module.forward
            for norm, own in fused.items():
                if own is not None:
                    norm.forward = own


def _norms_beside(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The modules next to the list of layers that have vectors for weights: the norm of the last hidden states."""
    for parent in model.modules():
        if any(isinstance(child, nn.ModuleList) and layer in child for child in parent.children()):
            weights = {m: list(m.parameters()) for m in parent.children()}
            return [m for m, own in weights.items() if own and all(p.ndim == 1 for p in own)]
    return []


class _Forward:
    """The forwards of all layers in one context. Each kept input knows that of the layer before."""

    def __init__(self, layers: CheckpointedLayers, settings: Checkpointing, restore: Restore) -> None:
        self.layers, self.settings, self.restore = layers, settings, restore
        self.previous: LayerInput | None = None
        self.previous_call: LayerCall | None = None
        self.stream: torch.cuda.Stream | None = None
        # An input that needs a gradient, so that layers have a backward also where x has none.
        self.anchor = torch.zeros((), requires_grad=True)

    def __call__(self, position: int, layer: Layer, x: Tensor, *args, **kwargs) -> Tensor:
        settings, tokens = self.settings, x.shape[1]
        stock = functools.partial(type(layer.module).forward, layer.module)
        kept_apart = layer.module.training and (settings.mode == "offload" or settings.every > 1)
        own = kept_apart or 0 < settings.tile < tokens
        if not own or kwargs.get("layout") is None or not self.layers.can_tile():
            return stock(x, *args, **kwargs)
        call = LayerCall(layer, settings.tile, tokens, args, kwargs)
        if not torch.is_grad_enabled():
            return call(x)
        if settings.mode == "off" or position >= len(self.layers.layers) - settings.keep_layers:
            return stock(x, *args, **kwargs)
        call.remember_dropout(x.device)
        kept = self._keep(position, x)
        self.previous, self.previous_call = kept, call
        return _Checkpointed.apply(call, kept, self.restore, self.anchor, x, *call.prefix)

    def norm(self, stock: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The norm after the layers; a long row in tiles, as it computes in fp32."""
        if not 0 < self.settings.tile < x.shape[-2] or not self.layers.can_tile():
            return stock(x)
        return _InTiles.apply(stock, self.settings.tile, x)

    def _keep(self, position: int, x: Tensor) -> LayerInput:
        previous = self.previous if position else None
        if previous is not None and position % self.settings.every:
            return RecomputedInput(functools.partial(_recompute, self.previous_call, self.restore), previous)
        if self.settings.mode != "offload":
            return LayerInput(x, previous)
        if x.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(x.device)
        return OffloadedInput(x, previous, self.stream)


def _recompute(call: LayerCall, restore: Restore, x: Tensor) -> Tensor:
    with torch.no_grad(), restore(), call.same_dropout():
        return call(x)


class _Checkpointed(torch.autograd.Function):
    """A layer that keeps its input alone. Weights that learn get their gradients in .grad, as in reentrant checkpointing."""

    @staticmethod
    def forward(ctx, call: LayerCall, kept: LayerInput, restore: Restore, anchor: Tensor, x: Tensor, *prefix: Tensor):
        ctx.call, ctx.kept, ctx.restore = call, kept, restore
        return call(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.kept is None:
            raise RuntimeError("a second backward through checkpointed layers; their inputs are freed in the first")
        kept, ctx.kept = ctx.kept, None
        with ctx.restore(), ctx.call.same_dropout():
            gradients = ctx.call.backward(kept, grad, ctx.needs_input_grad[4])
        kept.release()
        return None, None, None, None, *gradients


class _InTiles(torch.autograd.Function):
    """A function of each token of x (1, T, hidden), without trained weights, that keeps x alone."""

    @staticmethod
    def forward(ctx, function: Callable[[Tensor], Tensor], tile: int, x: Tensor) -> Tensor:
        ctx.function, ctx.tile = function, tile
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        for part, target in zip(x.split(tile, 1), y.split(tile, 1), strict=True):
            target.copy_(function(part))
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        for part, own, target in zip(*(t.split(ctx.tile, 1) for t in (x, grad, dx)), strict=True):
            part = part.detach().requires_grad_()
            with torch.enable_grad():
                torch.autograd.backward(ctx.function(part), own)
            target.copy_(part.grad)
        return None, None, dx
