"""PPO through the loop: with every kind of advantage, and as an adapter of every kind, the policy earns more of an exact
reward."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowalign import Base, Host
from lowalign.commands.ppo import ppo
from lowalign.config.sections import AdapterConfig, Sampling, TrainConfig
from lowalign.config.training import PPOConfig, PPOLossConfig, RolloutConfig
from lowalign.demo import configs as demo
from lowalign.demo import world
from lowalign.methods.ppo import PPO
from lowalign.methods.ppo_round import Roles
from lowalign.model.adapters.kinds import peft_config
from lowalign.train.engine import train
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama")


def even(_, completions) -> list[list[float]]:
    """The share of even tokens: one half by chance, 1 at best."""
    return [[sum(t % 2 == 0 for t in c) / len(c) for c in group] for group in completions]


# A soft prompt needs a far larger step; prompt tuning hardly steers random weights, and is tested on the demo's base.
@pytest.mark.parametrize(
    ("kind", "rate", "advantage"),
    [
        ("lora", 1e-2, "gae"),
        pytest.param("lora", 1e-2, "group", marks=pytest.mark.slow),
        pytest.param("lora", 1e-2, "rloo", marks=pytest.mark.slow),
        ("prefix", 1.0, "group"),
    ],
)
def test_it_earns_more(folder, tmp_path, kind, rate, advantage):
    host = Host(Base.load(folder, quantization="none", dtype="float32", device="cpu", quiet=True))
    torch.manual_seed(0)
    host.add("policy", peft_config(AdapterConfig(kind=kind, r=8, virtual_tokens=8)))
    host.add("value", peft_config(AdapterConfig(r=4)))
    host.add_scalar_head("value", zero=True)
    rounds = 12
    config = PPOConfig(
        model="",
        out=Path(),
        train=TrainConfig(
            steps=rounds * 4,
            batch_size=4,
            learning_rate=rate,
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


REWARD = """
from lowalign.demo import world

def exact(prompts, completions):
    return [world.score(p, c, stopped=True).total for p, c in zip(prompts, completions, strict=True)]
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_soft_prompt_on_the_bare_base_earns_more(tmp_path, kind):
    """Of the tiny world's exact score, in sixteen rounds. In ten the prompt went from 0.37 to 0.41 only."""
    (tmp_path / "reward.py").write_text(REWARD)
    config = demo.stage_config(tmp_path, "ppo")
    config = replace(
        config,
        init=None,
        reward=(f"{tmp_path}/reward.py:exact",),
        adapter=AdapterConfig(kind=kind),
        train=replace(config.train, learning_rate=0.1, steps=64, batch_size=16, schedule="constant", clip=1.0),
        rollout=replace(config.rollout, prompts=32),
        value=replace(config.value, learning_rate=0.06),
        ppo=replace(config.ppo, kl=0.05),
    )
    assert ppo(config, Base.load(demo.BASE, device="cpu", quiet=True)) == 0
    rewards = [json.loads(line)["reward"] for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert rewards[-1] > rewards[0] + 0.05


EXACT = """
from lowalign.demo import world

def exact(prompts, completions, *, number, stopped):
    assert all(isinstance(n, int) for n in number)
    return [world.score(p, c, stopped=s).total for p, c, s in zip(prompts, completions, stopped, strict=True)]
"""


@pytest.mark.slow
def test_the_best_weights_by_the_reward_of_held_out_prompts(tmp_path):
    """On the tiny world's bare base: held-out prompts earn more too (measured: 0.26 to 0.40), and the adapter is
    that of the best evaluation."""
    (tmp_path / "reward.py").write_text(EXACT)
    rows = [{"prompt": messages, "number": i} for i, messages in enumerate(world.prompts(96, seed=5))]
    config = demo.stage_config(tmp_path, "ppo")
    config = replace(
        config,
        init=None,
        data=replace(config.data, files=(demo.write(tmp_path / "rows.jsonl", rows),), eval_rows=32),
        reward=(f"{tmp_path}/reward.py:exact",),
        train=replace(config.train, steps=16, batch_size=16, schedule="constant", clip=1.0, log_every=1),
        rollout=replace(config.rollout, prompts=32, samples=4, normalise="none", eval_every=1),
        ppo=replace(config.ppo, advantage="group", kl=0.05),
    )
    assert ppo(config, Base.load(demo.BASE, device="cpu", quiet=True)) == 0
    lines = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    rewards = {line["step"]: line["eval/reward"] for line in lines if "eval/reward" in line}
    assert list(rewards) == [0, 4, 8, 12, 16]
    best = max(rewards, key=rewards.get)
    assert rewards[best] > rewards[0] + 0.01
    assert json.loads((tmp_path / "ppo" / "adapter" / "lowalign.json").read_text())["step"] == best
