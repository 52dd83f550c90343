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
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lowalign.durable import check_disk, new_folder
from lowalign.errors import UserError
from lowalign.export.fine_tune import FineTune, check_places, model_folder, read_pair
from lowalign.export.lora_update import stretches
from lowalign.export.nf4 import round_trip
from lowalign.export.weight_files import PlannedTensor, write_tensors
from lowalign.log import log, progress
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


def _plan_matrix(pair: FineTune, name: str, per_row: bool) -> list[PlannedTensor]:
    """Signs and log-scale, made in this order."""
    transposed = isinstance(pair.skeleton.linear[name.removesuffix(".weight")], Conv1D)
    n, m = pair.fine[name].shape[::-1] if transposed else pair.fine[name].shape
    module, made = name.removesuffix(".weight"), []

    def signs() -> Tensor:
        W_base, W_fine = pair.base[name].make(), pair.fine[name].read()
        if pair.dequantize:
            W_base = round_trip(W_base.to(torch.bfloat16), transposed)
        packed, log_α = binarise(*((W_fine.T, W_base.T) if transposed else (W_fine, W_base)), per_row)
        if not log_α.isfinite().all():
            raise UserError(f"{pair.fine[name].file}: {name} has values that are not finite")
        made.append(log_α)
        return packed

    return [
        PlannedTensor(f"{module}{SIGNS}", torch.uint8, (n, (m + 7) // 8), signs),
        PlannedTensor(f"{module}{LOG_SCALE}", torch.float32, (n if per_row else 1,), made.pop),
    ]


def _plan_kept(pair: FineTune, name: str, dtype: torch.dtype) -> PlannedTensor:
    """The fine-tune's own tensor in 16 bit."""

    def make() -> Tensor:
        tensor = pair.fine[name].read().to(dtype)
        if not tensor.isfinite().all():
            raise UserError(f"{pair.fine[name].file}: {name} has values that are not finite in {dtype}")
        return tensor

    return PlannedTensor(name, dtype, pair.fine[name].shape, make)


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
    fine_folder = model_folder(finetuned)
    pair = read_pair(base_folder, fine_folder, onto)
    changed = pair.changed
    if not changed:
        raise UserError(f"{finetuned} has the weights of {base}: there is no delta to store")
    check_places(changed, pair)
    config, planned = _plan(pair, changed, onto, per_row)
    sizes = {
        "bytes": sum(tensor.nbytes for tensor in planned),
        "bytes_16bit": sum(2 * math.prod(tensor.shape) for tensor in pair.fine.values()),
        f"bytes_lora_r{LORA_RANK}": pair.lora_bytes(LORA_RANK),
    }
    report = {"onto": onto, "per_row": per_row, "matrices": len(config.matrices), "kept": len(config.kept), **sizes}
    quantization = "nf4" if onto == "dequantized" else "none"
    identity = identify(base, base_folder, commit, load_tokenizer(str(base_folder)), quantization)
    adapter = adapter_files.StoredAdapter(BitDelta, config, {})
    check_disk(out, sizes["bytes"], "the delta takes")
    try:
        with new_folder(out) as temp:
            with progress(total=sizes["bytes"], unit="B", unit_scale=True, desc="bitdelta") as bar:
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


def _plan(pair: FineTune, changed: list[str], onto: str, per_row: bool) -> tuple[BitDeltaConfig, list[PlannedTensor]]:
    """-> the adapter's config, and its tensors in the order of the file; nothing is computed yet."""
    matrices = [name for name in changed if pair.is_matrix(name)]
    kept = [name for name in changed if not pair.is_matrix(name)]
    dtype = torch.float16 if pair.fine[changed[0]].dtype == torch.float16 else torch.bfloat16
    planned = [tensor for name in matrices for tensor in _plan_matrix(pair, name, per_row)]
    planned += [_plan_kept(pair, name, dtype) for name in kept]
    config = BitDeltaConfig(
        matrices=[name.removesuffix(".weight") for name in matrices],
        kept=kept,
        per_row=per_row,
        onto=onto,
        dtype=str(dtype).removeprefix("torch."),
        tied=[pair.skeleton.embedding, pair.skeleton.head] if pair.tied and pair.skeleton.embedding in kept else [],
    )
    return config, planned


def size_line(report: dict[str, Any]) -> str:
    """Its size against the model's and a LoRA's."""
    size, whole, lora = (report[key] for key in ("bytes", "bytes_16bit", f"bytes_lora_r{LORA_RANK}"))
    line = f"{report['matrices']} matrices as signs, {report['kept']} tensors in 16 bit: {size / 1e6:,.2f} MB, 1/{whole / size:.1f} of the 16-bit model"
    smaller = f"a LoRA of rank {LORA_RANK} on all linear layers takes {lora / 1e6:,.2f} MB"
    return f"{line}; {smaller}{': smaller, if the fine-tune can be a LoRA' if lora < size else ''}"


def _template(folder: Path) -> Iterator[tuple[str, str]]:
    """The fine-tune's chat template, if its folder has a tokenizer with one."""
    with contextlib.suppress(UserError):
        if template := load_tokenizer(str(folder)).chat_template:
            yield "chat_template.jinja", template
