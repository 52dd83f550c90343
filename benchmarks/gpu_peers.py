"""The peers of gpu.py on the same random 8B, LoRA r=16 on all linear layers, 2,048 tokens, checkpointing: plain transformers with peft,
trl's SFTTrainer, and unsloth, where they are installed. Full logits, as they compute them."""

import importlib.util
import tempfile
import time
from pathlib import Path

import torch
from card import peaks, release
from gpu_cases import EIGHT_B, random_rows
from gpu_setup import Setup
from peft import LoraConfig, get_peft_model
from random_base import random_base, random_tokenizer
from torch import nn

STEPS, LENGTH = 4, 2048
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def plain_peft(setup: Setup) -> dict:
    """A loop of one's own: transformers' loss, peft's LoRA, torch's AdamW."""
    model = _stock(setup)
    model = get_peft_model(model, LoraConfig(**LORA, target_modules=LINEAR, task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    ids = torch.tensor(_rows(setup), device=setup.device)
    release()
    times = []
    for step in range(STEPS):
        started = time.perf_counter()
        loss = model(input_ids=ids[step : step + 1], labels=ids[step : step + 1], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()  # waits for the device
        times.append(time.perf_counter() - started)
    return _figures(setup, times) | {"loss": loss}


def trl_sft(setup: Setup) -> dict:
    """trl's SFTTrainer, with a batch of one."""
    if importlib.util.find_spec("trl") is None:
        return {"skipped": "trl is not installed"}
    return _trainer(setup, _stock(setup), LoraConfig(**LORA, target_modules=LINEAR, task_type="CAUSAL_LM"))


def unsloth_sft(setup: Setup) -> dict:
    """unsloth's model in trl's SFTTrainer. It reads a folder: the same random weights in 4 bit are written to one."""
    if setup.tiny or importlib.util.find_spec("unsloth") is None:
        return {"skipped": "unsloth is not installed" if not setup.tiny else "unsloth needs a card"}
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        model = _stock(setup)
        model.save_pretrained(folder)
        random_tokenizer().save_pretrained(folder)
        del model
        release()
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=LENGTH, load_in_4bit=True, trust_remote_code=False
        )
        model = FastLanguageModel.get_peft_model(
            model, **LORA, target_modules=LINEAR, use_gradient_checkpointing="unsloth"
        )
        return _trainer(setup, model, None)


def _stock(setup: Setup) -> nn.Module:
    """The random base with transformers' own attention, without adapters of an earlier part."""
    setup.forget_base()
    return random_base(EIGHT_B, setup.shape(EIGHT_B), setup.device, stock=True).model


def _rows(setup: Setup) -> list[list[int]]:
    return random_rows(setup, EIGHT_B, STEPS, 64 if setup.tiny else LENGTH)


def _trainer(setup: Setup, model: nn.Module, adapter: LoraConfig | None) -> dict:
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs) -> None:
            if not setup.tiny:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - self.started)

    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            output_dir=str(Path(folder)), max_steps=STEPS, per_device_train_batch_size=1, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False}, bf16=True, report_to="none", max_length=None,
            save_strategy="no", optim="adamw_8bit", use_cpu=setup.tiny,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model, args=config, train_dataset=Dataset.from_dict({"input_ids": _rows(setup)}), peft_config=adapter,
            processing_class=random_tokenizer(), callbacks=[Clock()],
        )  # fmt: skip
        release()
        trainer.train()
    return _figures(setup, times) | {"loss": trainer.state.log_history[-1].get("train_loss")}


def _figures(setup: Setup, times: list[float]) -> dict:
    median = sorted(times[1:])[len(times[1:]) // 2]
    return {"tokens_per_second": round(len(_rows(setup)[0]) / median, 1)} | peaks()
