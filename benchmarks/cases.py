"""Inputs of the contestants of peers.py: one random model, the rows of each case, the same LoRA and batches.

Rows are random tokens of the lengths of research on preference data: prompts of 200 to 400 tokens, completions of 50 to
150; for SFT lognormal lengths of 40 to 465 tokens in all, a third of them supervised. A completion ends with the eos.
In PPO all prompts have one length, and all completions too: none ends before its last token.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lowalign import Example

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # ids 0 to 3
PAD, BOS, EOS, FIRST = 0, 1, 2, 4  # FIRST: the first ordinary token
SHAPES = {
    "full": {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4},
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip
LEARNING_RATE, CLIP, BETA = 1e-3, 1.0, 0.1
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """batch: examples of one optimizer step. k: completions of an example."""

    batch: int
    k: int


@dataclass(frozen=True)
class Rounds:
    """A round of PPO.

    batch: prompts of a round. samples: of each prompt. minibatch: prompts of an optimizer step. epochs: passes over the
    round. prompt, new: tokens of a prompt, and of a completion.
    """

    batch: int = 8
    samples: int = 4
    minibatch: int = 2
    epochs: int = 2
    prompt: int = 300
    new: int = 64

    @property
    def steps(self) -> int:
        """Optimizer steps of a round."""
        return self.epochs * self.batch // self.minibatch


@dataclass(frozen=True)
class Settings:
    """checkpointing: "on" when all contestants recompute activations, or "off". attention: the peers' attn_implementation."""

    checkpointing: str
    attention: str


CASES = {"sft": Case(4, 1), "dpo": Case(2, 2), "reward2": Case(2, 2), "reward4": Case(2, 4)}
ROUNDS = {"full": Rounds(), "tiny": Rounds(prompt=30, new=6)}


def lora(task_type: str) -> LoraConfig:
    """The LoRA of all contestants."""
    return LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type=task_type)


def set_start(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Set a LoRA's A matrices (in the model's order) and the reward model's head to the values that all start from."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in weights:
            if "lora_A" in name:
                weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) / weight.shape[1] ** 0.5)
            elif "score" in name:
                head = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
                weight.copy_((head * 0.02).bfloat16())  # values that are exact in bf16 and fp32


def make_model(folder: Path, shape: str) -> None:
    """A random model, and a tokenizer whose words are the ids: trl takes text, and gets the same ids from it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=False,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(folder)
    words = {word(i): i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
    fast.save_pretrained(folder)


def word(token: int) -> str:
    """A token's text."""
    return [*SPECIAL.values()][token] if token < FIRST else str(token)


def make_prompts(shape: str, rounds: int) -> list[list[int]]:
    """The prompts of that many rounds of PPO."""
    r, generator = ROUNDS[shape], torch.Generator().manual_seed(0)
    size = (rounds * r.batch, r.prompt - 1)
    drawn = torch.randint(FIRST, SHAPES[shape]["vocab_size"], size, generator=generator)
    return [[BOS, *ids] for ids in drawn.tolist()]


def make_rows(name: str, shape: str, steps: int) -> list[Example]:
    """The examples of that many optimizer steps, in the order they are used."""
    case, small = CASES[name], 10 if shape == "tiny" else 1
    vocabulary = SHAPES[shape]["vocab_size"]
    generator = torch.Generator().manual_seed(0)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low // small, high // small + 1, (), generator=generator))

    def draw(length: int) -> list[int]:
        return torch.randint(FIRST, vocabulary, (length,), generator=generator).tolist()

    rows = []
    for _ in range(steps * case.batch):
        if case.k == 1:
            total = math.exp(5.2 + 0.6 * float(torch.randn((), generator=generator)))
            total = int(min(max(total, 40), 465)) // small
            prompt, lengths = total - total // 3, [total // 3]
        else:
            prompt, lengths = between(200, 400), [between(50, 150) for _ in range(case.k)]
        completions = [[*draw(length - 1), EOS] for length in lengths]
        rows.append(Example([BOS, *draw(prompt - 1)], completions, rank=[float(i) for i in range(case.k)]))
    return rows
