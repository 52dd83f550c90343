"""Checks that stop a run: finite loss and gradients, a gradient for every trained tensor, an unchanged base."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowalign import processes
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.model.adapters.flat import FlatWeights
from lowalign.train import checkpoint


def refuse_not_finite(step: int, metrics: Mapping[str, float], examples: Sequence[Example], out: Path) -> None:
    """Raises UserError when loss or gradient norm is NaN or infinite. Called before the weights change."""
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        return
    sources = [e.source for e in examples if e.source]
    listed = ", ".join(sources[:8]) + (f" and {len(sources) - 8} more" if len(sources) > 8 else "")
    raise UserError(
        f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}. The weights were not changed by it. "
        f"Its examples: {listed or 'without sources'}. {checkpoint.last(out)} "
        "Look at these rows, or start anew with a lower --train.learning-rate."
    )


def assert_all_have_gradients(flats: Mapping[str, FlatWeights]) -> None:
    """Raises RuntimeError when a trained tensor got no gradient in backward, in any process; a gradient of zero is one."""
    for adapter, flat in flats.items():
        found = {name for part in processes.gather(sorted(flat.has_gradient)) for name in part}
        missing = sorted(flat.tensors().keys() - found)
        if missing:
            raise RuntimeError(f'no gradient reached {len(missing)} tensors of "{adapter}": {", ".join(missing[:5])}')


def assert_base_unchanged(before: int, after: int) -> None:
    """Raises RuntimeError when the base's checksum has changed."""
    if before != after:
        raise RuntimeError("the base's weights have changed during training; they must not")
