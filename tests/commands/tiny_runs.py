"""A tiny base with untrained adapters: a prefix as policy, and LoRAs with a head as reward runs."""

from pathlib import Path

import torch
from peft import LoraConfig, PrefixTuningConfig

from lowalign import Base, Host
from lowalign.data.chat import Chat
from tests.tiny import tiny_folder

FP32 = ("--base.quantization", "none", "--base.dtype", "float32", "--base.device", "cpu")


def load(folder: Path) -> Base:
    return Base.load(folder, quantization="none", dtype="float32", device="cpu", quiet=True)


def make(folder: Path) -> Path:
    """folder/model, folder/policy (prefix), folder/reward (LoRA with a head), folder/other (the same, another head)."""
    tiny_folder(folder / "model", "llama")
    base = load(folder / "model")
    host, files = Host(base), {"chat_template.jinja": Chat(base.tokenizer).template}
    torch.manual_seed(0)
    host.add("policy", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    host.save("policy", folder / "policy", files=files, method="sft")
    for name, mean, std in (("reward", 0.25, 2.0), ("other", -1.0, 0.5)):
        host.add(name, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
        host.add_scalar_head(name)
        statistics = {"mean": mean, "std": std}
        host.save(name, folder / name, files=files, method="reward", reward=statistics)
    return folder
