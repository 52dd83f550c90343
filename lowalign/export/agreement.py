"""Whether a merged model is the one that was trained: both run on the same tokens, their distributions compared."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowalign.config.sections import Sampling
from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.model.host import Host

POSITIONS = 256  # tokens that are compared; their full distributions are held in memory
QUESTIONS = (
    "What is the capital of France?",
    "Write three sentences about the sea.",
    "Explain why the sky is blue to a child.",
    "List five things to pack for a journey.",
    "Translate to German: good morning, how are you?",
    "What is 17 times 23? Show the steps.",
    "Write a short poem about a cat.",
    "How do I boil an egg?",
)


@dataclass(frozen=True)
class Agreement:
    """kl: KL(trained ‖ merged) in nats a token, exact over the vocabulary. top1: share of the tokens whose likeliest
    next token is the same. tokens: how many were compared."""

    kl: float
    top1: float
    tokens: int


def sampled_examples(host: Host, stack: Sequence[str], chat: Chat) -> list[Example]:
    """Questions with the trained model's own answers."""
    prompts = [chat.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]
    with host.use(*stack):
        answers = host.generate(prompts, 1, Sampling(max_new_tokens=48, min_new_tokens=8))
    return [Example(prompt, [row[0].ids]) for prompt, row in zip(prompts, answers, strict=True)]


@torch.no_grad()
def trained_logps(host: Host, stack: Sequence[str], examples: Sequence[Example]) -> list[Tensor]:
    """For each Example log p over the vocabulary, before each token of its completion: (tokens, vocabulary), fp32, on the
    CPU, under base + adapters. Stops after POSITIONS tokens."""
    rows: list[Tensor] = []
    with host.use(*stack):
        for example in examples:
            rows.append(_logps(host.base.model, example, host.base.device))
            if sum(map(len, rows)) >= POSITIONS:
                break
    return rows


@torch.no_grad()
def merged_logps(folder: Path, examples: Sequence[Example], device: torch.device) -> list[Tensor]:
    """The same of the model in a folder, loaded by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map={"": device}, use_safetensors=True, trust_remote_code=False
    )
    rows = [_logps(model, example, device) for example in examples]
    del model
    gc.collect()
    return rows


def agreement(trained: Sequence[Tensor], merged: Sequence[Tensor]) -> Agreement:
    """Compare the distributions token by token."""
    p, q = torch.cat(list(trained)).double(), torch.cat(list(merged)).double()
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return Agreement(max(0.0, kl), (p.argmax(-1) == q.argmax(-1)).double().mean().item(), len(p))


def _logps(model: torch.nn.Module, example: Example, device: torch.device) -> Tensor:
    completion = example.completions[0]
    ids = torch.tensor([example.prompt + completion], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(example.prompt) - 1 : -1]
    return logits.float().log_softmax(-1).cpu()
