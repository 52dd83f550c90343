"""Tiny models of real architectures, made by the tests: random weights large enough for attention to matter."""

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 384
WORDS = "the quick brown fox jumps over lazy dog what is capital of france paris".split()  # noqa: SIM905  made texts
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
CONFIGS = {
    "llama": lambda **k: hf.LlamaConfig(**_SHAPE | k),
    "qwen2": lambda **k: hf.Qwen2Config(**_SHAPE | k),
    "qwen3": lambda **k: hf.Qwen3Config(**_SHAPE | {"head_dim": 32, "tie_word_embeddings": True} | k),
    "mistral": lambda **k: hf.MistralConfig(**_SHAPE | {"sliding_window": 8} | k),
    "gemma2": lambda **k: hf.Gemma2Config(
        **_SHAPE
        | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
        | k
    ),
    "phi3": lambda **k: hf.Phi3Config(**_SHAPE | k),
    "qwen3_moe": lambda **k: hf.Qwen3MoeConfig(
        **_SHAPE | {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} | k
    ),
    "gpt2": lambda **k: hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        **{"n_positions": 512} | k,
    ),
    "bloom": lambda **k: hf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0, **k
    ),
}


def tiny_model(kind: str = "llama", seed: int = 0, **overrides: object) -> hf.PreTrainedModel:
    """A random fp32 model with weights N(0, 1.5/sqrt(fan_in)): a mask, window or soft cap that is ignored shows."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[kind](**overrides)).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 1.5 / p.shape[-1] ** 0.5)
    return model


def tiny_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE over a few sentences, with distinct pad, bos and eos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    text = ["The quick brown fox jumps over the lazy dog.", "What is the capital of France? Paris is the capital."]
    tokenizer.train_from_iterator(text * 4, trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny_folder(path: Path, kind: str = "llama", **overrides: object) -> Path:
    """A model folder with safetensors weights and a tokenizer, as a user would have it."""
    tiny_model(kind, **overrides).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return Path(path)
