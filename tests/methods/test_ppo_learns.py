"""PPO through the loop on a tiny base: with every kind of advantage a LoRA earns more of an exact reward."""

import json
from pathlib import Path

import pytest
import torch

from lowalign import Base, Host
from lowalign.config import AdapterConfig, Sampling, TrainConfig
from lowalign.methods.experience import Roles
from lowalign.methods.ppo import PPO
from lowalign.model.start import peft_config
from lowalign.train.engine import train
from lowalign.training import PPOConfig, PPOLossConfig, RolloutConfig
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama")


def even(_, completions) -> list[list[float]]:
    """The share of even tokens: one half by chance, 1 at best."""
    return [[sum(t % 2 == 0 for t in c) / len(c) for c in group] for group in completions]


@pytest.mark.parametrize("advantage", ["gae", "group", "rloo"])
def test_it_earns_more(folder, tmp_path, advantage):
    host = Host(Base.load(folder, quantization="none", dtype="float32", device="cpu", quiet=True))
    torch.manual_seed(0)
    host.add("policy", peft_config(AdapterConfig(r=8)))
    host.add("value", peft_config(AdapterConfig(r=4)))
    host.add_head("value", zero=True)
    rounds = 12
    config = PPOConfig(
        model="",
        out=Path(),
        train=TrainConfig(
            steps=rounds * 4,
            batch_size=4,
            learning_rate=1e-2,
            schedule="constant",
            optimizer="adamw",
            checkpointing="off",
            save_every=1000,
        ),
        sampling=Sampling(max_new_tokens=8),
        rollout=RolloutConfig(prompts=8, samples=8, missing_eos="keep"),
        ppo=PPOLossConfig(advantage=advantage, epochs=2, kl=0.0),
    )
    prompts = [[70 + i, 80, 90 + i] for i in range(16)]
    roles = Roles(("policy",), (), ("value",) if advantage == "gae" else None)
    train(host, PPO(host, roles, prompts, even, config), config.train, tmp_path)
    rewards = [json.loads(line)["reward"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # 64 completions of 8 tokens a round: the mean of a round is off by 0.02.
    first, last = sum(rewards[:8]) / 8, sum(rewards[-8:]) / 8
    assert last > first + 0.06
