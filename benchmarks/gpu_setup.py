"""The machine of gpu.py: a card that is held to 24 GB, or the CPU with tiny shapes."""

import copy
import importlib.metadata
import tempfile
from pathlib import Path

import torch
from card import release
from plan_models import MODELS
from random_base import SHAPES, TINY, random_base
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from lowalign import Base
from lowalign.plan.figures import CONTEXT

CAP = 24 * 10**9  # bytes of the card that is played
LEFT_FREE = int(0.7 * 2**30)
QWEN_32B = Qwen2Config(
    vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
    num_key_value_heads=8, max_position_embeddings=32768, tie_word_embeddings=False,
)  # fmt: skip
SMALL = LlamaConfig(
    vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SMALL_TINY = LlamaConfig(
    vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


class Setup:
    """tiny: tiny shapes on the CPU. only_predicts: nothing is computed, for a card of the table. The memory that PyTorch may take on a card is what a card of 24 GB has for it."""

    def __init__(self, tiny: bool, only_predicts: str | None = None) -> None:
        self.tiny, self.device, self.only_predicts = tiny, "cpu" if tiny else "cuda", only_predicts
        self._base: tuple[tuple[str, str], Base] | None = None
        self._folder: tempfile.TemporaryDirectory | None = None
        if tiny or only_predicts:
            return
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device; --tiny runs on the CPU")
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (CAP - CONTEXT - LEFT_FREE) / total))

    def shape(self, name: str) -> PretrainedConfig:
        """The config of a model of MODELS; in tiny form the tiny one."""
        if self.tiny:
            return copy.deepcopy(TINY["tiny"])
        return copy.deepcopy({**MODELS, **SHAPES, "Qwen2.5-32B": QWEN_32B}[name])

    def base(self, name: str, embedding: str = "device") -> Base:
        """A base of that shape with random weights. Only the last one is kept in memory."""
        if self._base is None or self._base[0] != (name, embedding):
            self._base = None
            release()
            self._base = (name, embedding), random_base(name, self.shape(name), self.device, embedding)
        return self._base[1]

    def forget_base(self) -> None:
        """Free the base: what follows has its own."""
        self._base = None
        release()

    def folder(self) -> Path:
        """A folder with a small random model, as Base.load reads it. Its weights are large enough for attention to matter."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
            save_random(Path(self._folder.name), copy.deepcopy(SMALL_TINY if self.tiny else SMALL))
        return Path(self._folder.name)

    def still_works(self) -> bool:
        """Free what a part has left; whether the device answers: after an illegal access it never does."""
        try:
            release()
            if not self.tiny:
                torch.cuda.synchronize()
                return bool(torch.ones(8, device=self.device).sum() == 8)
        except Exception:
            return False
        return True


def save_random(folder: Path, config: PretrainedConfig, seed: int = 0, change: float = 0.0) -> None:
    """A model folder with weights N(0, (1.5 / sqrt(fan_in))²), and a tokenizer of bytes. change: a random part added to each weight."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 1.5 / p.shape[-1] ** 0.5)
        for p in model.parameters() if change else ():
            p.add_(torch.randn_like(p) * p.std().nan_to_num() * change)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, vocab_size=300)
    tokenizer.train_from_iterator(["one two three"], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def machine(setup: Setup) -> dict:
    """Device, driver, versions and the cap."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "trl", "unsloth")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if setup.tiny:
        return {"device": "CPU", "threads": torch.get_num_threads(), "versions": versions}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cap_gb": CAP / 10**9,
        "versions": versions,
    }
