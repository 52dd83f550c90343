"""A BitDelta as a change of its base's weights: W + α Sign(Δ), and the kept tensors in place of the base's."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from lowalign.errors import UserError
from lowalign.export.lora_update import stretches
from lowalign.model.adapters.bitdelta import LOG_SCALE, SIGNS
from lowalign.model.adapters.files import StoredAdapter
from lowalign.model.adapters.signs import unpack_signs


class BitDeltaUpdate:
    """The update of one delta, read from `folder`; it answers what a LoraUpdate does."""

    def __init__(self, folder: Path, adapter: StoredAdapter) -> None:
        self.folder, self.config = folder, adapter.config
        self.tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in adapter.tensors.items()}
        for embedding, head in [adapter.config.tied] if adapter.config.tied else []:
            self.tensors[head] = self.tensors[embedding]

    def changes(self, name: str) -> bool:
        """Whether the weight of this name in the base is another one after it."""
        return name in self.tensors or name.removesuffix(".weight") + SIGNS in self.tensors

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError when it is of a weight of another shape. shape: (out, in)."""
        if name in self.tensors:
            fits = tuple(self.tensors[name].shape) == tuple(shape)
        else:
            signs = self.tensors[name.removesuffix(".weight") + SIGNS]
            fits = tuple(signs.shape) == (shape[0], (shape[1] + 7) // 8)
        if not fits:
            raise UserError(f"{self.folder} is of another base: its {name} has another shape; give the right one with --model M")  # fmt: skip

    def is_dora(self, name: str) -> bool:
        """No row is scaled."""
        return False

    def apply(self, name: str, weight: Tensor, base: Tensor, transposed: bool = False) -> Tensor:
        """The weight after this update: fp32, changed in place where it can be. transposed: a Conv1D's, (in, out)."""
        if name in self.tensors:
            return self.tensors[name].to(weight.device, torch.float32).clone()
        module, matrix = name.removesuffix(".weight"), weight.T if transposed else weight
        signs, log_scale = (self.tensors[module + part].to(weight.device) for part in (SIGNS, LOG_SCALE))
        scale = log_scale.exp()[:, None]
        for rows in stretches(*matrix.shape):
            delta = unpack_signs(signs[rows], matrix.shape[1], weight.dtype)
            matrix[rows] += delta.mul_(scale[rows] if len(scale) > 1 else scale)
        return weight

    def unplaced(self, weights: Collection[str]) -> list[str]:
        """The tensors of the delta that change none of these weights."""
        module = lambda name: name.removesuffix(SIGNS).removesuffix(LOG_SCALE)  # noqa: E731
        return [name for name in self.tensors if name not in weights and f"{module(name)}.weight" not in weights]
