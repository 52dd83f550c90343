"""A base and a fine-tune of it, tensor by tensor: what changed, and whether they fit together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lowalign.errors import UserError
from lowalign.export.lora_update import WEIGHTS_AT_A_TIME
from lowalign.export.merged_weights import Skeleton
from lowalign.export.nf4 import dequantized_checkpoint
from lowalign.export.weight_files import PlannedTensor, StoredTensor, stored_tensors
from lowalign.model.base.hub import BASE_FILES, load_config, resolve


@dataclass(frozen=True)
class FineTune:
    """A base and a fine-tune of it, tensor by tensor. skeleton: of the base. dequantize: the base's linear layers are
    quantized and converted back. tied: the fine-tune's LM head is its embedding."""

    base: dict[str, PlannedTensor]
    fine: dict[str, StoredTensor]
    skeleton: Skeleton
    dequantize: bool
    tied: bool

    @property
    def changed(self) -> list[str]:
        """The tensors that differ, in the order of the fine-tune's files."""
        return [name for name, stored in self.fine.items() if not _equal(stored.read(), self.base[name].make())]

    def is_matrix(self, name: str) -> bool:
        """Whether signs are stored of it: the weight of a linear layer other than the LM head."""
        return name.endswith(".weight") and name.removesuffix(".weight") in self.skeleton.linear

    def lora_bytes(self, rank: int) -> int:
        """Size in 16 bit of a LoRA of this rank on every linear layer but the LM head."""
        shapes = (
            self.fine[f"{module}.weight"].shape for module in self.skeleton.linear if f"{module}.weight" in self.fine
        )
        return sum(2 * rank * sum(shape) for shape in shapes)


def read_pair(base: Path, finetuned: Path, onto: str) -> FineTune:
    """The tensors of both models. Raises UserError when their architectures or shapes differ."""
    base_config, fine_config = _config(base), _config(finetuned)
    four_bit = getattr(base_config, "quantization_config", None)
    if four_bit and onto == "original":
        raise UserError(f"{base} is stored in 4 bit and has no original weights; use --onto dequantized")
    if getattr(fine_config, "quantization_config", None):
        raise UserError(f"{finetuned} is stored quantized; its 16-bit weights are needed")
    if base_config.model_type != fine_config.model_type:
        raise UserError(f"{finetuned} is a {fine_config.model_type} model and {base} is {base_config.model_type}: it is no fine-tune of it")  # fmt: skip
    skeleton, stored = Skeleton.of(base_config), stored_tensors(base)
    as_is = {name: PlannedTensor(name, t.dtype, t.shape, t.read) for name, t in stored.items()}
    base_tensors = dequantized_checkpoint(stored) if four_bit else as_is
    fine_tensors = _weights(stored_tensors(finetuned))
    head, embedding = skeleton.head, skeleton.embedding
    tied = bool(getattr(fine_config, "tie_word_embeddings", False)) or head not in fine_tensors
    if skeleton.tied:
        base_tensors[head] = base_tensors[embedding]
    if tied:
        fine_tensors.pop(head, None)
    if tied and not skeleton.tied and embedding in fine_tensors:  # the host's head is a weight of its own
        fine_tensors[head], tied = fine_tensors[embedding], False
    base_tensors = {name: t for name, t in base_tensors.items() if name in fine_tensors or name != head}
    _check_shapes(finetuned, fine_tensors, _weights(base_tensors))
    dequantize = onto == "dequantized" and not four_bit
    return FineTune(base_tensors, fine_tensors, skeleton, dequantize, tied)


def _weights(tensors: dict[str, Any]) -> dict[str, Any]:
    """Without buffers, which no fine-tuning changes."""
    return {n: t for n, t in tensors.items() if t.dtype.is_floating_point and not n.endswith("rotary_emb.inv_freq")}


def _check_shapes(finetuned: Path, fine: dict[str, StoredTensor], base: dict[str, PlannedTensor]) -> None:
    only = sorted(fine.keys() ^ base.keys())
    if only:
        where = "the fine-tune" if only[0] in fine else "the base"
        raise UserError(f"{finetuned} is no fine-tune of this base: {len(only)} tensors are in one of them alone (first: {only[0]}, in {where})")  # fmt: skip
    other = [name for name in fine if tuple(fine[name].shape) != tuple(base[name].shape)]
    if other:
        name = other[0]
        raise UserError(f"{finetuned} is no fine-tune of this base: {name} has the shape {tuple(fine[name].shape)}, in the base {tuple(base[name].shape)}")  # fmt: skip


def check_places(changed: list[str], pair: FineTune) -> None:
    """Raises UserError for a changed tensor that is no parameter of the loaded model (experts are fused there)."""
    homeless = [name for name in changed if name not in pair.skeleton.parameters]
    if homeless:
        raise UserError(
            f"{homeless[0]} changed, which transformers loads as a part of another tensor (experts are fused): a BitDelta of "
            "it is not supported. Ship the fine-tuned model itself"
        )


def model_folder(finetuned: str) -> Path:
    """The folder of a fine-tuned model. Raises UserError for an adapter."""
    folder = Path(finetuned).expanduser()
    if any((place / "adapter_config.json").exists() for place in (folder, folder / "adapter")):
        raise UserError(f"{finetuned} is an adapter, not a model; make it one first: lowalign merge {finetuned} --out MERGED, then --finetuned MERGED")  # fmt: skip
    return resolve(finetuned, None, BASE_FILES)[0]


def _config(folder: Path) -> PretrainedConfig:
    config = load_config(folder)
    if getattr(config, "auto_map", None):
        raise UserError(f"{folder} has code of its own (auto_map in config.json), which lowalign never runs")
    return config


def _equal(a: Tensor, b: Tensor) -> bool:
    parts = zip(a.reshape(-1).split(WEIGHTS_AT_A_TIME), b.reshape(-1).split(WEIGHTS_AT_A_TIME), strict=True)
    return all(torch.equal(x.float(), y.float()) for x, y in parts)
