"""Merged weights against peft's own merge in fp32, bit for bit, on every architecture and kind of LoRA."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from lowalign.export.lora_update import LoraUpdate
from lowalign.export.merged_weights import plan_merge
from lowalign.export.weight_files import write_shards
from lowalign.model.adapters import files as adapter_files
from tests.tiny import tiny_folder, tiny_model

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "qkv_proj": 2}, "alpha_pattern": {"layers.1.self_attn.o_proj": 3}},
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3")


def trained_lora(model, folder, name="default", **options):
    """A stock peft LoRA with every weight random, saved; the PeftModel."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    peft = get_peft_model(model, config)
    torch.manual_seed(7)
    for key, p in peft.named_parameters():
        if "lora_" in key:
            p.data.normal_(0, 0.3) if p.ndim > 1 else p.data.mul_(1 + 0.3 * torch.rand_like(p))
    peft.save_pretrained(folder)
    return peft


def merged_tensors(base, folders, tmp_path, dequantized=False, dtype=torch.bfloat16, max_bytes=2**40):
    updates = [LoraUpdate(folder, adapter_files.read(folder)[0]) for folder in folders]
    plan = plan_merge(base, AutoConfig.from_pretrained(base), updates, dequantized, dtype)
    out = tmp_path / "merged"
    out.mkdir()
    write_shards(out, plan.tensors, max_bytes, lambda _: None)
    return {k: t for file in sorted(out.glob("*.safetensors")) for k, t in load_file(file).items()}


def stored_in_bf16(tmp_path, kind):
    folder = tiny_folder(tmp_path / "base", kind)
    tiny_model(kind).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_equal_to_pefts_merge_in_fp32(kind, options, tmp_path):
    base = stored_in_bf16(tmp_path, kind)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = trained_lora(model, tmp_path / "adapter", **options)
    found = merged_tensors(base, [tmp_path / "adapter"], tmp_path)
    expected = peft.merge_and_unload().bfloat16().state_dict()
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")  # tied: not stored
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
