"""What each stage of the demo trains on, and how."""

from collections.abc import Iterable
from pathlib import Path

from lowalign.config.commands import BestOfNConfig
from lowalign.config.sections import AdapterConfig, BaseConfig, DataConfig, PreferenceConfig, TrainConfig
from lowalign.config.training import (
    DPOConfig,
    DPOLossConfig,
    PPOConfig,
    PPOLossConfig,
    RewardConfig,
    RolloutConfig,
    SFTConfig,
    ValueConfig,
)
from lowalign.demo import world
from lowalign.demo.evaluation import SAMPLING
from lowalign.durable import write_jsonl

BASE = Path(__file__).parent / "base"
# What is not in 4 bit is in fp32: bf16 is ten times slower on a CPU without bf16 instructions, and no faster with AVX-512.
BASE_CONFIG = BaseConfig(dtype="float32")
BEST_OF = 8
LORA = AdapterConfig(r=16, alpha=32)
NO_MEMORY_SAVING = {"optimizer": "adamw", "checkpointing": "off"}  # which only costs time on a model this small


def sft_config(out: Path) -> SFTConfig:
    """Answers in every mood."""
    return SFTConfig(
        model=str(BASE),
        out=out / "sft",
        data=DataConfig(
            files=(write(out / "sft.jsonl", world.sft_rows(1120, seed=0)),),
            eval=(write(out / "sft_held_out.jsonl", world.sft_rows(64, seed=0, split="held_out")),),
            cache=False,
        ),
        adapter=LORA,
        train=TrainConfig(steps=70, batch_size=16, learning_rate=5e-3, log_every=14, **NO_MEMORY_SAVING),
        base=BASE_CONFIG,
    )


def reward_config(out: Path) -> RewardConfig:
    """Four answers to each instruction, best first."""
    return RewardConfig(
        model=str(BASE),
        out=out / "reward",
        data=PreferenceConfig(
            files=(write(out / "rankings.jsonl", world.ranking_rows(768, seed=0)),),
            eval=(write(out / "rankings_held_out.jsonl", world.ranking_rows(48, seed=0, split="held_out")),),
            cache=False,
        ),
        adapter=LORA,
        train=TrainConfig(
            steps=96,
            batch_size=8,
            learning_rate=3e-3,
            warmup=0.1,
            betas=(0.9, 0.99),
            clip=0.3,  # gradients grow tenfold when it begins to see moods
            log_every=16,
            **NO_MEMORY_SAVING,
        ),
        base=BASE_CONFIG,
        init=str(out / "sft"),
        init_mode="copy",
    )


def best_of_n_config(out: Path) -> BestOfNConfig:
    """Instructions alone."""
    rows = ({"prompt": messages} for messages in world.prompts(176, seed=3))
    return BestOfNConfig(
        model=str(BASE),
        out=out / "best-of-n",
        data=(write(out / "prompts.jsonl", rows),),
        adapter=(str(out / "sft"),),
        reward=(str(out / "reward"),),
        n=BEST_OF,
        sampling=SAMPLING,
        base=BASE_CONFIG,
    )


def dpo_config(out: Path) -> DPOConfig:
    """The best against the worst of the SFT policy's own answers."""
    return DPOConfig(
        model=str(BASE),
        out=out / "dpo",
        data=PreferenceConfig(files=(str(out / "best-of-n" / "pairs.jsonl"),), cache=False),
        adapter=LORA,
        train=TrainConfig(steps=56, batch_size=12, learning_rate=1.4e-3, log_every=14, **NO_MEMORY_SAVING),
        base=BASE_CONFIG,
        init=str(out / "sft"),
        dpo=DPOLossConfig(beta=0.3, sft=1.0),
        reference_cache="off",
    )


def ppo_config(out: Path) -> PPOConfig:
    """Seven rounds of 24 instructions with 4 answers each; policy, reference, value and reward on the one base."""
    rows = ({"prompt": messages} for messages in world.prompts(240, seed=5))
    return PPOConfig(
        model=str(BASE),
        out=out / "ppo",
        data=DataConfig(files=(write(out / "ppo_prompts.jsonl", rows),), cache=False),
        adapter=LORA,
        train=TrainConfig(
            steps=28,
            batch_size=12,
            learning_rate=2.5e-3,
            schedule="linear",
            clip=0.3,
            log_every=4,
            **NO_MEMORY_SAVING,
        ),
        base=BASE_CONFIG,
        init=str(out / "sft"),
        reward=(str(out / "reward"),),
        sampling=SAMPLING,
        rollout=RolloutConfig(prompts=24, samples=4, normalise="running"),
        ppo=PPOLossConfig(epochs=2, kl=0.15),
        value=ValueConfig(adapter=LORA, learning_rate=3.0),
    )


def write(file: Path, rows: Iterable[dict]) -> str:
    """Write rows as JSONL -> the file's name."""
    write_jsonl(file, rows)
    return str(file)
