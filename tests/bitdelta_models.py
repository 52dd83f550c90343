"""A tiny base, a fine-tune of it, and the dense model that a delta between the two stands for, computed here in fp64."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer


def base_and_fine_tune(folder: Path, kind: str = "llama", only: str = "", **overrides: object) -> tuple[Path, Path]:
    """folder/base, and folder/fine with noise on the parameters whose name contains `only`; both in bf16."""
    tiny_folder(folder / "base", kind, **overrides)
    model = tiny_model(kind, **overrides).bfloat16()
    model.save_pretrained(folder / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only in name:
                p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder / "fine")
    tiny_tokenizer().save_pretrained(folder / "fine")
    return folder / "base", folder / "fine"


def dense(base: Path, fine: Path, per_row: bool = False) -> PreTrainedModel:
    """W_base + α Sign(Δ) in the blocks' matrices by the formula in fp64, the fine-tune's own tensors elsewhere; fp32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    own, other = model.state_dict(), AutoModelForCausalLM.from_pretrained(fine, dtype=torch.float32).state_dict()
    for name, weight in own.items():
        if ".layers." in name and weight.ndim == 2:
            change = other[name].double() - weight.double()
            scale = change.abs().mean(1, keepdim=True) if per_row else change.abs().mean()
            weight.copy_(weight.double() + scale * torch.where(change > 0, 1.0, -1.0))
        else:
            weight.copy_(other[name])
    return model.eval().requires_grad_(False)


def row_logps(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """(completion,) by plain transformers."""
    ids = torch.tensor([prompt + completion])
    logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, ids[0, len(prompt) :, None])[:, 0]
