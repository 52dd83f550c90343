"""trl's PPO, which trl 1.12.0 was the last to have: the peer of the case ppo."""

import os
import tempfile
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from cases import LEARNING_RATE, ROUNDS, Settings, lora, set_start
from datasets import Dataset
from meter import Meter
from peft import inject_adapter_in_model
from stock import load
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


def run_trl_ppo(shape: str, folder: Path, prompts: list[list[int]], settings: Settings, meter: Meter) -> None:
    """PPOTrainer, run by its own train(), all under autocast, which it needs on 4-bit weights.

    The policy is a LoRA, and the reference is the base without it. Reward and value are 4-bit models of their own, each
    with a LoRA and a head: trl has no roles on one base, and by default it would train the value model's embeddings.
    bf16 is off because of the autocast: with bf16 trl casts the norms and all logits to fp32, which is slower (94 against
    85 CPU seconds a round) and takes more memory.
    """
    r = ROUNDS[shape]
    rows = [{"input_ids": prompt} for prompt in prompts for _ in range(r.samples)]
    with tempfile.TemporaryDirectory() as out:
        config = PPOConfig(
            out, total_episodes=len(rows), per_device_train_batch_size=r.batch * r.samples,
            num_mini_batches=r.batch // r.minibatch, num_ppo_epochs=r.epochs, response_length=r.new, temperature=1.0,
            local_rollout_forward_batch_size=r.batch * r.samples, num_sample_generations=0, learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", use_cpu=True, bf16=False, gradient_checkpointing=settings.checkpointing == "on",
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        policy, value, reward = (load(folder, kind, settings.attention) for kind in (False, True, True))
        add_lora(value, trained=True)
        add_lora(reward, trained=False)
        nn.init.zeros_(value.score.weight)
        if settings.checkpointing == "on":
            for model in (policy, value):
                model.gradient_checkpointing_enable({"use_reentrant": False})

        class Pace(TrainerCallback):
            def on_train_begin(self, *args, **kwargs) -> None:
                meter.ready()

            def on_step_end(self, args, state, control, **kwargs) -> None:
                metrics = state.log_history[-1]
                meter.step(metrics["loss/policy_avg"] + config.vf_coef * metrics["loss/value_avg"])

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        trainer = PPOTrainer(
            config, tokenizer, policy, ref_model=None, reward_model=reward, value_model=value,
            train_dataset=Dataset.from_list(rows), callbacks=[Pace()], peft_config=lora("CAUSAL_LM"),
        )  # fmt: skip
        set_start(trainer.policy_model.named_parameters())
        in_16_bit(trainer.policy_model)
        trainer.dataloader = DataLoader(trainer.train_dataset, r.batch * r.samples, collate_fn=trainer.data_collator)
        # Without its cache, which would keep the first casts of the fp32 weights for all rounds.
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            trainer.train()


def add_lora(model: nn.Module, trained: bool) -> None:
    """Add a LoRA; with `trained`, it and the head are trained."""
    inject_adapter_in_model(lora("SEQ_CLS"), model)
    set_start(model.named_parameters())
    for name, p in model.named_parameters():
        p.requires_grad_(trained and ("lora_" in name or "score" in name))
    in_16_bit(model)


def in_16_bit(model: nn.Module) -> None:
    """Cast the LoRA to bf16, as trl's other trainers do; faster than fp32."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.bfloat16()
