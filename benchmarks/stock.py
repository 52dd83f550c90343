"""The peers of peers.py: trl's trainers, and plain transformers + peft with full logits."""

import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from cases import BETA, CASES, CLIP, LEARNING_RATE, PAD, Settings, lora, set_start, word
from meter import Meter
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)

from lowalign import Example


def load(folder: Path, reward: bool, attention: str) -> nn.Module:
    """The base in NF4 with double quantization, as transformers loads it."""
    kind, options = (AutoModelForSequenceClassification, {"num_labels": 1}) if reward else (AutoModelForCausalLM, {})
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head", "score"],
    )  # fmt: skip
    options |= {"dtype": torch.bfloat16, "attn_implementation": attention}
    model = kind.from_pretrained(folder, quantization_config=quantization, trust_remote_code=False, **options)
    for module in model.modules():
        # On CPUs with AVX512-BF16 a forward in eval mode (trl's precomputed reference) would repack the weights in
        # place, and training after it would have no gradients.
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    model.config.pad_token_id = PAD
    return model


def run_trl(case: str, folder: Path, rows: list[Example], steps: int, settings: Settings, meter: Meter) -> None:
    """trl's trainer, run by its own train()."""
    import trl
    from datasets import Dataset

    text = lambda ids: " ".join(map(word, ids))  # noqa: E731
    if case == "sft":
        kind, config_class, options = trl.SFTTrainer, trl.SFTConfig, {"padding_free": True, "max_length": None}
        data = [{"prompt": text(e.prompt), "completion": " " + text(e.completions[0])} for e in rows]
    elif case == "dpo":
        kind, config_class, options = trl.DPOTrainer, trl.DPOConfig, {"beta": BETA, "precompute_ref_log_probs": True}
        data = [dict(zip(("prompt", "chosen", "rejected"), (text(e.prompt), *(" " + text(c) for c in e.completions)), strict=True)) for e in rows]  # fmt: skip
    else:
        kind, config_class, options = trl.RewardTrainer, trl.RewardConfig, {}
        data = [{"chosen_ids": e.prompt + a, "rejected_ids": e.prompt + b} for e in rows for a, b in combinations(e.completions, 2)]  # fmt: skip
    meter.imported()
    reward = case.startswith("reward")
    peft_config = lora("SEQ_CLS" if reward else "CAUSAL_LM")
    with tempfile.TemporaryDirectory() as out:
        config = config_class(
            out, per_device_train_batch_size=len(data) // steps, max_steps=steps, learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", max_grad_norm=CLIP, bf16=True, use_cpu=True, report_to="none",
            gradient_checkpointing=settings.checkpointing == "on", train_sampling_strategy="sequential", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, **options,
        )  # fmt: skip
        model = load(folder, reward, settings.attention)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        data = Dataset.from_list(data)
        trainer = kind(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)
        set_start(trainer.model.named_parameters())
        compute_loss = trainer.compute_loss

        def watched(*args, **kwargs) -> Tensor:
            watched.loss = compute_loss(*args, **kwargs)
            return watched.loss

        class Pace(TrainerCallback):
            def on_train_begin(self, *args, **kwargs) -> None:
                meter.ready()

            def on_step_end(self, *args, **kwargs) -> None:
                meter.step(watched.loss.item())

        trainer.compute_loss = watched
        trainer.add_callback(Pace())
        trainer.train()


def run_plain(
    case: str, folder: Path, rows: list[Example], steps: int, settings: Settings, meter: Meter, cached: bool = False
) -> None:
    """A training loop as a careful user of transformers and peft writes it."""
    reward = case.startswith("reward")
    config = lora("SEQ_CLS" if reward else "CAUSAL_LM")
    model = get_peft_model(load(folder, reward, settings.attention), config)
    set_start(model.named_parameters())
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.bfloat16()  # as trl has them, and faster than in fp32
    if settings.checkpointing == "on":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    batch = CASES[case].batch
    groups = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    compute = {"sft": sft_loss, "dpo": dpo_loss}.get(case, reward_loss)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    if cached:
        for group in groups:
            with torch.no_grad(), autocast(), model.disable_adapter():
                logps = plain_logps(model, group).view(-1, len(group)).T.tolist()
            for example, reference in zip(group, logps, strict=True):
                example.reference = reference
    model.train()
    meter.ready()
    for group in groups:
        with autocast():
            loss = compute(model, group)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        meter.step(loss.item())


def padded(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Rows of prompt and completion, padded on the right: first the best completion of each example, then the second, …"""
    k = len(examples[0].completions)
    pairs = [(e.prompt, e.completions[i]) for i in range(k) for e in examples]
    width = max(len(p) + len(c) for p, c in pairs)
    pad = lambda row, value: row + [value] * (width - len(row))  # noqa: E731
    return {
        "input_ids": torch.tensor([pad(p + c, PAD) for p, c in pairs]),
        "attention_mask": torch.tensor([pad([1] * len(p + c), 0) for p, c in pairs]),
        "labels": torch.tensor([pad([-100] * len(p) + c, -100) for p, c in pairs]),
    }


def sft_loss(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    return model(**padded(examples)).loss


def plain_logps(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Log-prob of each completion, in the order of `padded`, from full logits."""
    inputs = padded(examples)
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return -losses.view(labels.shape).sum(1)


def dpo_loss(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    logps = plain_logps(model, examples)
    if examples[0].reference is not None:
        reference = torch.tensor([e.reference for e in examples]).T.flatten()
    else:
        with torch.no_grad(), model.disable_adapter():
            reference = plain_logps(model, examples)
    chosen, rejected = (logps - reference).split(len(examples))
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def reward_loss(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    inputs = padded(examples)
    del inputs["labels"]
    scores = model(**inputs).logits.float().view(-1, len(examples))  # (K, examples), best first
    better, worse = zip(*combinations(range(len(scores)), 2), strict=True)
    return -F.logsigmoid(scores[list(better)] - scores[list(worse)]).mean()
