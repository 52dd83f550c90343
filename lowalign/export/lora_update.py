"""A LoRA adapter as a change of its base's weights: W + s B A, and DoRA's m (W + s B A) / ‖W + s B A‖.

LoRA: arXiv 2106.09685 eq. 3, s = alpha/r; rsLoRA: 2312.03732, s = alpha/√r; DoRA: 2402.09353 eq. 5. All in fp32, with the
operations of peft's own merge in their order, so that the results are equal bit for bit.
"""

import math
from collections.abc import Collection
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from lowalign.errors import UserError
from lowalign.model.adapters.files import StoredAdapter

PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector")
TWINS = (PARTS[0:2], PARTS[1::-1], PARTS[2:4], PARTS[3:1:-1])
WEIGHTS_AT_A_TIME = 2**24  # larger matrices are changed in stretches of rows of this many weights


class LoraUpdate:
    """The update of one adapter, read from `folder`."""

    def __init__(self, folder: Path, adapter: StoredAdapter) -> None:
        self.folder, self.config = folder, adapter.config
        tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in adapter.tensors.items()}
        # peft writes the base's own embedding beside a LoRA on it.
        self.tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".base_layer.weight")}
        for name in self.tensors:
            for one, other in TWINS:
                twin = name.removesuffix(one) + other
                if name.endswith(one) and twin not in self.tensors:
                    raise UserError(f"{folder} is not whole: {name} without {twin}; save or download it again")

    def changes(self, name: str) -> bool:
        """Whether the weight of this name in the base (`model.layers.0.self_attn.q_proj.weight`) is another one after it."""
        module = name.removesuffix(".weight")
        return name in self.tensors or any(
            f"{module}.{part}" in self.tensors for part in ("lora_A.weight", "lora_embedding_A")
        )

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError when it was trained on a weight of another shape. shape: (out, in)."""
        module = name.removesuffix(".weight")
        if name in self.tensors:
            trained = tuple(self.tensors[name].shape)
        elif f"{module}.lora_embedding_A" in self.tensors:
            trained = tuple(
                self.tensors[f"{module}.lora_embedding_{part}"].shape[side] for part, side in (("A", 1), ("B", 0))
            )
        else:
            trained = tuple(
                self.tensors[f"{module}.lora_{part}.weight"].shape[side] for part, side in (("B", 0), ("A", 1))
            )
        if trained != shape:
            size = lambda sides: " x ".join(map(str, sides))  # noqa: E731
            raise UserError(
                f"{self.folder} was trained on another base: its {module} is {size(trained)}, and {size(shape)} here; give the "
                "right one with --model M"
            )

    def is_dora(self, name: str) -> bool:
        """Whether it scales the rows of this weight."""
        return f"{name.removesuffix('.weight')}.lora_magnitude_vector" in self.tensors

    def apply(self, name: str, weight: Tensor, base: Tensor, transposed: bool = False) -> Tensor:
        """The weight after this update: (out, in) fp32, changed in place where it can be.

        weight: what earlier adapters of the stack left. base: the weight before all of them; peft's layers take the norm of
        a DoRA from it and its own update alone. transposed: a Conv1D's weight, (in, out).
        """
        module = name.removesuffix(".weight")
        part_of = lambda key: self.tensors[key].to(weight.device, torch.float32)  # noqa: E731
        if name in self.tensors:  # modules_to_save: the trained weight itself
            return part_of(name).clone()
        if f"{module}.lora_embedding_A" in self.tensors:
            a, b = part_of(f"{module}.lora_embedding_A"), part_of(f"{module}.lora_embedding_B")
            product = lambda part: (b @ a[:, part]).T  # noqa: E731
        else:
            a, b = part_of(f"{module}.lora_A.weight"), part_of(f"{module}.lora_B.weight")
            product = lambda part: b[part] @ a  # noqa: E731
        magnitude = part_of(f"{module}.lora_magnitude_vector") if self.is_dora(name) else None
        rows, start = (weight.T, base.T) if transposed else (weight, base)
        scale = self._scale(module)
        for part in stretches(*rows.shape):
            delta = product(part) * scale
            if magnitude is None:
                rows[part] += delta
                continue
            norm = torch.linalg.norm(start[part] + delta, dim=1)
            rows[part] = (magnitude[part] / norm).view(-1, 1) * (rows[part] + delta)
        return weight

    def unplaced(self, weights: Collection[str]) -> list[str]:
        """The tensors of the adapter that change none of these weights."""
        return [name for name in self.tensors if name not in weights and _module(name) + ".weight" not in weights]

    def _scale(self, module: str) -> float:
        config = self.config
        of = lambda pattern, default: pattern.get(get_pattern_key(pattern.keys(), module), default)  # noqa: E731
        r, alpha = of(config.rank_pattern, config.r), of(config.alpha_pattern, config.lora_alpha)
        return alpha / math.sqrt(r) if config.use_rslora else alpha / r


def _module(name: str) -> str:
    """The module that a tensor of a LoRA belongs to; itself for what is no part of a LoRA."""
    for part in PARTS:
        if name.endswith(part):
            return name.removesuffix(part)
    return name


def stretches(rows: int, columns: int) -> list[slice]:
    """The rows of a matrix in slices of about WEIGHTS_AT_A_TIME weights."""
    size = max(1, WEIGHTS_AT_A_TIME // columns)
    return [slice(at, at + size) for at in range(0, rows, size)]
