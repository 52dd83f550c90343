"""PPO for gpu.py: policy, reference, value and reward on one base; all but the reference have a LoRA."""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from card import peaks, release

from lowalign import Base, Example, Host
from lowalign.config.sections import AdapterConfig, Sampling, TrainConfig
from lowalign.config.training import PPOConfig, PPOLossConfig, RolloutConfig
from lowalign.errors import UserError
from lowalign.methods.ppo import PPO
from lowalign.methods.ppo_round import Roles
from lowalign.model.adapters.kinds import peft_config
from lowalign.rewards.reward_run import score_examples
from lowalign.train.engine import train

PROMPTS, SAMPLES = 2, 4  # of a round; a step trains on one prompt with its samples
ROUNDS, EPOCHS = 3, 2


ADAPTER = AdapterConfig(kind="lora", r=16)


def ppo_config(tiny: bool) -> PPOConfig:
    """Some rounds of 8 completions of full length."""
    new = 16 if tiny else 512
    return PPOConfig(
        model="", out=Path(), train=TrainConfig(steps=ROUNDS * EPOCHS * PROMPTS, batch_size=1, save_every=0, warmup=0.0),
        sampling=Sampling(max_new_tokens=new, min_new_tokens=new), ppo=PPOLossConfig(epochs=EPOCHS),
        rollout=RolloutConfig(prompts=PROMPTS, samples=SAMPLES, missing_eos="keep"),
    )  # fmt: skip


def score_completions(host: Host, prompts: list[list[int]], completions: list[list[list[int]]]) -> list[list[float]]:
    """What the adapter "reward" gives them."""
    return score_examples(host, ("reward",), [Example(p, group) for p, group in zip(prompts, completions, strict=True)])


def measure_ppo(base: Base, tiny: bool) -> dict:
    """Measure some rounds; the first does not count for the speed. tiny: short prompts and completions."""
    config, prompt = ppo_config(tiny), 32 if tiny else 512
    host = Host(base)
    for role in ("policy", "value", "reward"):
        host.add(role, peft_config(ADAPTER))
    host.add_scalar_head("value", zero=True)
    host.add_scalar_head("reward")
    generator = torch.Generator().manual_seed(0)
    size = (ROUNDS * PROMPTS, prompt)
    prompts = torch.randint(4, base.model.config.vocab_size, size, generator=generator).tolist()

    def score(numbers: Sequence[int], completions: list[list[list[int]]]) -> list[list[float]]:
        return score_completions(host, [prompts[i] for i in numbers], completions)

    method = PPO(host, Roles(("policy",), (), ("value",)), prompts, score, config)
    result = {"rollouts": PROMPTS * SAMPLES, "prompt_tokens": prompt, "new_tokens": config.sampling.max_new_tokens}
    release()
    try:
        with tempfile.TemporaryDirectory() as folder:
            train(host, method, config.train, Path(folder))
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        result |= speeds([json.loads(line) for line in lines]) | peaks()
    except (torch.OutOfMemoryError, UserError) as error:  # UserError: one example does not fit in memory
        result["failed"] = str(error).splitlines()[0]
    for role in ("policy", "value", "reward"):
        host.delete(role)
    return result


def speeds(steps: list[dict]) -> dict[str, float]:
    """Median speeds after the first round, and metrics that show that all roles took part."""
    later = steps[len(steps) // ROUNDS :]
    figures = {}
    for name in ("sampling_tokens_per_second", "training_tokens_per_second"):
        figures[name] = round(statistics.median(step[name] for step in later if name in step), 1)
    return figures | {name: steps[-1][name] for name in ("length", "entropy", "kl", "value_loss")}
