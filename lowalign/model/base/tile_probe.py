"""A test whether the layers of an architecture can be computed in tiles (lowalign.model.forward.tiled)."""

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lowalign.data.pack import pack
from lowalign.model.attention.interface import ATTN_IMPLEMENTATION, no_mask
from lowalign.model.attention.packed import Layout
from lowalign.model.base.probe import probe_examples, small_model
from lowalign.model.forward.checkpointed import CheckpointedLayers, Checkpointing

PROBE_TILE = 8  # tokens, of 61
TOLERANCE = 1e-3  # relative; correct: 3e-6; a part that is not computed, or its gradient: 1e-1


def tile_probe(config: PretrainedConfig) -> str:
    """Compare hidden states and all gradients of a two-layer fp32 model with and without tiles. -> "", or why they differ."""
    text = config.get_text_config()
    try:
        with torch.enable_grad():
            model = small_model(text).requires_grad_(True)
            model.set_attn_implementation(ATTN_IMPLEMENTATION)
            layers = CheckpointedLayers(model, lambda: True)
            whole = _gradients(model)
            with layers.computing(Checkpointing("on", PROBE_TILE), torch.enable_grad):
                tiled = _gradients(model)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return f"the probe model failed: {type(error).__name__}: {reason}"
    worst = max(_difference(a, b) for a, b in zip(whole, tiled, strict=True))
    return "" if worst < TOLERANCE else f"layers of {text.model_type} differ in tiles by {worst:.1e}"


def _gradients(model: nn.Module) -> list[Tensor | None]:
    """Hidden states of a row, and the gradients of all weights."""
    row = pack(probe_examples())
    model.zero_grad()
    with no_mask():
        hidden = model.base_model(
            input_ids=row.ids[None], position_ids=row.positions[None], use_cache=False, layout=Layout(row.segments)
        ).last_hidden_state[0]
    hidden.sin().sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters())]


def _difference(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return float((a - b).norm() / a.norm().clamp(min=1e-9))
