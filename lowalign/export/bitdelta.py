"""BitDelta: a fine-tuned model as its base and one bit for each weight that changed. arXiv 2402.10193

Δ = W_fine - W_base
Δ̂ = α ⊙ Sign(Δ),   Sign(Δ_ij) = +1 if Δ_ij > 0, -1 if Δ_ij ≤ 0          eq. 1, 2
‖Δ - Δ̂‖² = Σ_ij (|Δ_ij| - α)², least at α = 1/(nm) Σ_ij |Δ_ij|           eq. 3, 4

The scales α are then distilled (lowalign.methods.bitdelta, eq. 5). Linear layers but the LM head become signs; what else
changed is kept in 16 bit; what did not change is not stored. Both models are read a tensor at a time.

onto "dequantized": W_base is the NF4 base converted back to 16 bit, which the delta then also corrects. onto "original":
the base's own 16-bit weights.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from lowalign.durable import new_folder
from lowalign.errors import UserError
from lowalign.export.lora_update import WEIGHTS_AT_A_TIME, stretches
from lowalign.export.merged_weights import Skeleton
from lowalign.export.nf4 import dequantized_checkpoint, round_trip
from lowalign.export.weight_files import PlannedTensor, StoredTensor, stored_tensors, write_tensors
from lowalign.log import log
from lowalign.model.adapters import files as adapter_files
from lowalign.model.adapters.bitdelta import LOG_SCALE, SIGNS, BitDelta, BitDeltaConfig
from lowalign.model.adapters.signs import pack_signs
from lowalign.model.base.hub import BASE_FILES, load_tokenizer, resolve
from lowalign.model.base.identity import identify

LORA_RANK = 16  # of the LoRA on every linear layer that the size is compared with


def binarise(W_fine: Tensor, W_base: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """(n, m), (n, m) -> Sign(Δ) packed, (n, ceil(m/8)) uint8, and log α in fp32, (1,) or, per row, (n,)."""
    n, m = W_fine.shape
    signs, sums = [], []
    for rows in stretches(n, m):
        Δ = W_fine[rows].float() - W_base[rows].float()
        signs.append(pack_signs(Δ > 0))
        sums.append(Δ.abs().sum(1, dtype=torch.float64))
    α = torch.cat(sums) / m
    α = α if per_row else α.mean()[None]
    return torch.cat(signs), α.clamp(min=torch.finfo(torch.float32).tiny).log().float()


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

    def plan_matrix(self, name: str, per_row: bool) -> list[PlannedTensor]:
        """Signs and log-scale, made in this order."""
        transposed = isinstance(self.skeleton.linear[name.removesuffix(".weight")], Conv1D)
        n, m = self.fine[name].shape[::-1] if transposed else self.fine[name].shape
        module, made = name.removesuffix(".weight"), []

        def signs() -> Tensor:
            W_base, W_fine = self.base[name].make(), self.fine[name].read()
            if self.dequantize:
                W_base = round_trip(W_base.to(torch.bfloat16), transposed)
            packed, log_α = binarise(*((W_fine.T, W_base.T) if transposed else (W_fine, W_base)), per_row)
            if not log_α.isfinite().all():
                raise UserError(f"{self.fine[name].file}: {name} has values that are not finite")
            made.append(log_α)
            return packed

        return [
            PlannedTensor(f"{module}{SIGNS}", torch.uint8, (n, (m + 7) // 8), signs),
            PlannedTensor(f"{module}{LOG_SCALE}", torch.float32, (n if per_row else 1,), made.pop),
        ]

    def plan_kept(self, name: str, dtype: torch.dtype) -> PlannedTensor:
        """The fine-tune's own tensor in 16 bit."""

        def make() -> Tensor:
            tensor = self.fine[name].read().to(dtype)
            if not tensor.isfinite().all():
                raise UserError(f"{self.fine[name].file}: {name} has values that are not finite in {dtype}")
            return tensor

        return PlannedTensor(name, dtype, self.fine[name].shape, make)

    def lora_bytes(self) -> int:
        """Size in 16 bit of a LoRA of LORA_RANK on every linear layer but the LM head."""
        shapes = (
            self.fine[f"{module}.weight"].shape for module in self.skeleton.linear if f"{module}.weight" in self.fine
        )
        return sum(2 * LORA_RANK * sum(shape) for shape in shapes)


def compress(
    base: str, finetuned: str, out: str | Path, *, onto: str = "dequantized", per_row: bool = False
) -> dict[str, Any]:
    """Write the delta of `finetuned` to a new adapter folder. Returns what its lowalign.json holds under "bitdelta".

    base, finetuned: model folders or Hub ids of one architecture. per_row: a scale for each row of a matrix. Raises
    UserError when they are not a base and a fine-tune of it; nothing is then left.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten; name another folder with --out")
    base_folder, commit = resolve(base, None, BASE_FILES)
    fine_folder = _model_folder(finetuned)
    pair = read_pair(base_folder, fine_folder, onto)
    changed = pair.changed
    if not changed:
        raise UserError(f"{finetuned} has the weights of {base}: there is no delta to store")
    _check_places(changed, pair)
    matrices = [name for name in changed if pair.is_matrix(name)]
    kept = [name for name in changed if not pair.is_matrix(name)]
    dtype = torch.float16 if pair.fine[changed[0]].dtype == torch.float16 else torch.bfloat16
    planned = [tensor for name in matrices for tensor in pair.plan_matrix(name, per_row)]
    planned += [pair.plan_kept(name, dtype) for name in kept]
    config = BitDeltaConfig(
        matrices=[name.removesuffix(".weight") for name in matrices],
        kept=kept,
        per_row=per_row,
        onto=onto,
        dtype=str(dtype).removeprefix("torch."),
        tied=[pair.skeleton.embedding, pair.skeleton.head] if pair.tied and pair.skeleton.embedding in kept else [],
    )
    sizes = {
        "bytes": sum(tensor.nbytes for tensor in planned),
        "bytes_16bit": sum(2 * math.prod(tensor.shape) for tensor in pair.fine.values()),
        f"bytes_lora_r{LORA_RANK}": pair.lora_bytes(),
    }
    report = {"onto": onto, "per_row": per_row, "matrices": len(matrices), "kept": len(kept), **sizes}
    quantization = "nf4" if onto == "dequantized" else "none"
    identity = identify(base, base_folder, commit, load_tokenizer(str(base_folder)), quantization)
    adapter = adapter_files.StoredAdapter(BitDelta, config, {})
    _check_room(out, sizes["bytes"])
    try:
        with new_folder(out) as temp:
            with tqdm(total=sizes["bytes"], unit="B", unit_scale=True, desc="bitdelta", disable=None) as bar:
                write_tensors(temp / adapter_files.WEIGHTS, planned, bar.update)
            for name, text in _template(fine_folder):
                (temp / name).write_text(text, encoding="utf-8")
            meta = {"parents": 0, "method": "bitdelta", "bitdelta": report}
            adapter_files.write_description(temp, adapter, identity, base_folder, meta)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the delta could not be written to {out}: {error}; nothing of it is left") from error
    log(size_line(report))
    log(f"the delta is in {out}")
    return report


def size_line(report: dict[str, Any]) -> str:
    """Its size against the model's and a LoRA's."""
    size, whole, lora = (report[key] for key in ("bytes", "bytes_16bit", f"bytes_lora_r{LORA_RANK}"))
    line = f"{report['matrices']} matrices as signs, {report['kept']} tensors in 16 bit: {size / 1e6:,.2f} MB, 1/{whole / size:.1f} of the 16-bit model"
    smaller = f"a LoRA of rank {LORA_RANK} on all linear layers takes {lora / 1e6:,.2f} MB"
    return f"{line}; {smaller}{': smaller, if the fine-tune can be a LoRA' if lora < size else ''}"


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


def _check_places(changed: list[str], pair: FineTune) -> None:
    """Raises UserError for a changed tensor that is no parameter of the loaded model (experts are fused there)."""
    homeless = [name for name in changed if name not in pair.skeleton.parameters]
    if homeless:
        raise UserError(
            f"{homeless[0]} changed, which transformers loads as a part of another tensor (experts are fused): a BitDelta of "
            "it is not supported. Ship the fine-tuned model itself"
        )


def _model_folder(finetuned: str) -> Path:
    folder = Path(finetuned).expanduser()
    if any((place / "adapter_config.json").exists() for place in (folder, folder / "adapter")):
        raise UserError(f"{finetuned} is an adapter, not a model; make it one first: lowalign merge {finetuned} --out MERGED, then --finetuned MERGED")  # fmt: skip
    return resolve(finetuned, None, BASE_FILES)[0]


def _config(folder: Path) -> PretrainedConfig:
    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a model folder: config.json cannot be read ({error})") from error
    if raw.get("auto_map"):
        raise UserError(f"{folder} has code of its own (auto_map in config.json), which lowalign never runs")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/config.json is of no model that transformers knows: {error}") from error


def _template(folder: Path) -> Iterator[tuple[str, str]]:
    """The fine-tune's chat template, if its folder has a tokenizer with one."""
    with contextlib.suppress(UserError):
        if template := load_tokenizer(str(folder)).chat_template:
            yield "chat_template.jinja", template


def _check_room(out: Path, size: int) -> None:
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if size > free:
        raise UserError(f"the delta takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free in {parent}; choose another --out")  # fmt: skip


def _equal(a: Tensor, b: Tensor) -> bool:
    return all(torch.equal(x.float(), y.float()) for x, y in zip(*(t.reshape(-1).split(WEIGHTS_AT_A_TIME) for t in (a, b)), strict=True))  # fmt: skip
