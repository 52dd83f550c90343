"""Bases of real shapes with random weights: nothing is downloaded, and speed and memory are those of real weights."""

from pathlib import Path

import bitsandbytes as bnb
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from lowalign import Base
from lowalign.model.attention.interface import ATTN_IMPLEMENTATION
from lowalign.model.attention.packed import check_attention
from lowalign.model.base.base import freeze
from lowalign.model.base.embedding import move_to_cpu
from lowalign.model.base.fuse import fuse
from lowalign.model.base.identity import Identity
from lowalign.model.base.probe import probe

SHAPES = {
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=False,
    ),
    "Qwen2.5-7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=False,
    ),
    "Llama-2-7B": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=False,
    ),
}  # fmt: skip
TINY = {"tiny": LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)}  # fmt: skip


def random_base(
    name: str, config: PretrainedConfig, device: str, embedding: str = "device", stock: bool = False
) -> Base:
    """A Base of random weights. Each linear layer is made in 16 bit and quantized before the next one is made. stock: with
    transformers' own layers and attention, for its peers."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, random_nf4(module, device))
    for module in model.modules():
        for key, p in list(module._parameters.items()):
            if p is not None and p.is_meta:
                weight = torch.ones(p.shape) if p.ndim == 1 else torch.randn(p.shape, device=device) * 0.02
                setattr(module, key, torch.nn.Parameter(weight.to(device, torch.bfloat16), requires_grad=False))
    model.is_loaded_in_4bit = True  # peft chooses its LoRA class by it, as with Base.load
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)  # its buffers were on the meta device
    if embedding == "cpu":
        move_to_cpu(model)
    freeze(model)
    if not stock:
        fuse(model)
    packed, why_not = probe(config)
    if wrong := check_attention(config, torch.device(device), torch.bfloat16):
        packed, why_not = False, wrong
    model.set_attn_implementation("sdpa" if stock else ATTN_IMPLEMENTATION)
    identity = Identity(name, None, "random", "random", config.vocab_size, "", "nf4")
    return Base(model, random_tokenizer(), identity, Path("."), (2,), 0.0, packed, why_not)


def random_tokenizer() -> PreTrainedTokenizerFast:
    """Its words are numbers."""
    words = {str(i): i for i in range(256)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), eos_token="2", pad_token="0"
    )


def random_nf4(module: torch.nn.Linear, device: str) -> bnb.nn.Linear4bit:
    """A 4-bit layer of the same shape with random weights."""
    layer = bnb.nn.Linear4bit(
        module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.bfloat16,
        compress_statistics=True, quant_type="nf4", device="meta",
    )  # fmt: skip
    weight = torch.randn(module.weight.shape, device=device, dtype=torch.bfloat16) * module.in_features**-0.5
    packed = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to(device)
    layer.weight = packed if packed.quant_state is not None else packed._quantize(torch.device(device))
    if module.bias is not None:
        layer.bias = torch.nn.Parameter(torch.zeros(module.out_features, dtype=torch.bfloat16, device=device), False)
    return layer
