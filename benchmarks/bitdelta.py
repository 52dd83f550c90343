"""BitDelta on a full fine-tune of the demo's base: `python benchmarks/bitdelta.py --out DIR`.

The fine-tune is made with plain torch. Measured: KL and held-out loss before and after distillation, the task's score
(the exact rules of the demo's world) with 95 % intervals, size on disk, memory of several deltas on one base. CPU, one thread, a
few minutes.
"""

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowalign import Base, Host
from lowalign.config.sections import BaseConfig
from lowalign.data.chat import Chat
from lowalign.demo import world
from lowalign.demo.configs import BASE
from lowalign.demo.evaluation import EVAL_PROMPTS, SAMPLING
from lowalign.model.policy import load_stack

VARIANTS = {
    "dequantized": {"onto": "dequantized"},
    "dequantized, per row": {"onto": "dequantized", "per_row": True},
    "original, on NF4": {"onto": "original"},
}
FP32 = BaseConfig(dtype="float32")


def best_answers(n: int, seed: int, split: str = "train") -> list[dict]:
    """Rows of instructions with the best of four ranked answers: the task is to write cheerful cards."""
    return [
        {"messages": [*row["prompt"], {"role": "assistant", "content": row["completions"][0]}]}
        for row in world.ranking_rows(n, seed, split)
    ]


def fine_tune(out: Path, seed: int, steps: int = 200, batch_size: int = 16, learning_rate: float = 2e-3) -> Path:
    """Every weight of the demo's base trained on the best answers, with transformers and torch alone, saved in bf16."""
    torch.manual_seed(seed)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, trust_remote_code=False),
        AutoTokenizer.from_pretrained(BASE, trust_remote_code=False),
    )
    rows = [row["messages"] for row in best_answers(3200, seed)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        batch = [rows[i] for i in torch.randint(len(rows), (batch_size,)).tolist()]
        ids, labels = [], []
        for messages in batch:
            whole = tokenizer.apply_chat_template(messages, return_dict=False)[
                :-1
            ]  # without the newline after the turn
            prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
            ids.append(torch.tensor(whole))
            labels.append(torch.tensor([-100] * len(prompt) + whole[len(prompt) :]))
        pad = lambda parts, value: torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)  # noqa: E731
        x, y = pad(ids, 0), pad(labels, -100)
        loss = model(input_ids=x, attention_mask=(y != -100).long() | (x != 0).long(), labels=y).loss
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def task_score(model: str | Path, adapter: str | None, seed: int, quantization: str = "nf4") -> list[float]:
    """The score of one answer to each of the held-out instructions."""
    base = Base.load(model, quantization=quantization, dtype="float32", quiet=True)
    host, chat = Host(base), Chat(base.tokenizer)
    base.end_at(chat.end_of_turn)
    stack = load_stack(host, "delta", adapter) if adapter else ()
    prompts = world.prompts(EVAL_PROMPTS, seed=0, split="held_out")
    with host.use(*stack):
        answers = host.generate(
            [chat.prompt_ids(m) for m in prompts], 2, SAMPLING, seeds=[seed * 1000 + i for i in range(len(prompts))]
        )
    return [
        sum(world.score(p, base.tokenizer.decode(c.ids, skip_special_tokens=True), c.stopped).total for c in row) / 2
        for p, row in zip(prompts, answers, strict=True)
    ]


def interval(values: list[float], draws: int = 2000) -> str:
    """Mean and its 95 % bootstrap interval over the instructions."""
    x = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    means = x[torch.randint(len(x), (draws, len(x)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{x.mean():.3f} [{low:.3f}, {high:.3f}]"
