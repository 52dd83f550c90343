"""Hooks on a model that tell a Meter which part of it runs, so that memory is counted under the right component."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from lowalign.plan.meter import OTHER, Meter

BASE, ADAPTERS, OPTIMIZER = "base", "adapters", "optimizer"
INPUTS, LAYER, ACTIVATIONS = "checkpoint_inputs", "layer_recomputation", "activations"
LOGITS, KV_CACHE = "logits", "kv_cache"


class Marks:
    """Within it the decoder layers of a model set the meter's component and place.

    checkpointed: whether activations are recomputed. Then what a layer allocates in a forward with gradient is LAYER, and its
    input INPUTS; otherwise ACTIVATIONS. What comes after the last layer is LOGITS. after_layer: called after each layer.
    """

    def __init__(self, meter: Meter, model: nn.Module, checkpointed: bool) -> None:
        self.meter, self.checkpointed = meter, checkpointed
        self.after_layer: Callable[[], None] = lambda: None
        self.layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> "Marks":
        for i, layer in enumerate(self.layers):
            place = f"layer {i + 1} of {len(self.layers)}"
            self.handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            self.handles.append(layer.register_forward_hook(self._after(layer is self.layers[-1])))
            # The hooks of a layer run outside its checkpoint; those of its parts run in the recomputation too.
            for part in layer.children():
                self.handles.append(part.register_forward_pre_hook(self._part(place)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _before(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor) and hidden.requires_grad and self.checkpointed:
            self.meter.assign(INPUTS, [hidden])

    def _part(self, place: str):
        def mark(*_: object) -> None:
            backward = torch._C._current_graph_task_id() != -1
            recomputed = self.checkpointed and (torch.is_grad_enabled() or backward)
            self.meter.component, self.meter.place = LAYER if recomputed else ACTIVATIONS, place

        return mark

    def _after(self, last: bool):
        def mark(*_: object) -> None:
            self.after_layer()
            self.meter.component = LOGITS if last else OTHER
            self.meter.place = "the LM head" if last else self.meter.place

        return mark
