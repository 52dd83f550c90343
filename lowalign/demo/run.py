"""`lowalign demo`: align a base of a tiny world and measure what each stage gained, by the world's own exact score.

base → SFT → reward model → best-of-n → DPO, PPO, all on one 4-bit base that is loaded once.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from lowalign.commands.best_of_n import best_of_n
from lowalign.commands.dpo import dpo
from lowalign.commands.ppo import ppo
from lowalign.commands.reward import reward
from lowalign.commands.sft import sft
from lowalign.config.commands import BestOfNConfig
from lowalign.config.sections import AdapterConfig, DataConfig, PreferenceConfig, TrainConfig
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
from lowalign.data.chat import Chat
from lowalign.demo import world
from lowalign.demo.measure import ASKED, DRAW, Measured, measure
from lowalign.durable import write_jsonl
from lowalign.model.base.base import Base
from lowalign.rewards.selection import kl_bound

BASE = Path(__file__).parent / "base"
BEST_OF = 8
LORA = AdapterConfig(r=16, alpha=32)


def main() -> int:
    """Run the demo. Returns the exit code."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # a model this small is slower on several
    out = Path(tempfile.mkdtemp(prefix="lowalign-demo-"))
    base = Base.load(BASE)
    chat = Chat(base.tokenizer)
    stages = [measure("base", base, chat, None)]
    show(stages[-1])

    say("SFT: a LoRA on the 4-bit base learns to follow instructions and to stop")
    if code := sft(sft_config(out), base):
        return code
    stages.append(measure("sft", base, chat, str(out / "sft")))
    show(stages[-1])

    say(
        "reward model: a second LoRA, on the frozen first, learns from rankings A > B > C > D which card is the better one"
    )
    if code := reward(reward_config(out), base):
        return code
    name = f"best-of-{BEST_OF}"
    stages.append(measure(name, base, chat, str(out / "sft"), n=BEST_OF, judge=str(out / "reward")))
    stages[-1].kl = kl_bound(BEST_OF)

    say(f"best-of-{BEST_OF}: the SFT policy answers training instructions, and the reward model ranks its answers")
    if code := best_of_n(best_of_n_config(out), base):
        return code
    say("DPO: a third LoRA, on the frozen first, learns from those rankings")
    if code := dpo(dpo_config(out), base):
        return code
    stages.append(measure("dpo", base, chat, str(out / "dpo"), reference=str(out / "sft")))
    show(stages[-1])

    say("PPO: a fourth LoRA, on the frozen first, learns from what it samples and the reward model scores")
    if code := ppo(ppo_config(out), base):
        return code
    stages.append(measure("ppo", base, chat, str(out / "ppo"), reference=str(out / "sft")))
    show(stages[-1])

    table(stages, out)
    print(f"\n{time.perf_counter() - started:.0f} s; everything that was written is in {out}")
    return 0


def sft_config(out: Path) -> SFTConfig:
    """Answers in every mood."""
    return SFTConfig(
        model=str(BASE),
        out=out / "sft",
        data=DataConfig(
            files=(write(out / "sft.jsonl", world.sft_rows(1600, seed=0)),),
            eval=(write(out / "sft_held_out.jsonl", world.sft_rows(64, seed=0, split="held_out")),),
            cache=False,
        ),
        adapter=LORA,
        train=TrainConfig(steps=100, batch_size=16, learning_rate=5e-3, checkpointing="off", log_every=20),
    )


def reward_config(out: Path) -> RewardConfig:
    """Four answers to each instruction, best first."""
    return RewardConfig(
        model=str(BASE),
        out=out / "reward",
        data=PreferenceConfig(
            files=(write(out / "rankings.jsonl", world.ranking_rows(1920, seed=0)),),
            eval=(write(out / "rankings_held_out.jsonl", world.ranking_rows(64, seed=0, split="held_out")),),
            cache=False,
        ),
        adapter=LORA,
        train=TrainConfig(steps=160, batch_size=12, learning_rate=2e-3, checkpointing="off", log_every=20),
        init=str(out / "sft"),
    )


def best_of_n_config(out: Path) -> BestOfNConfig:
    """Instructions alone."""
    rows = ({"prompt": messages} for messages in world.prompts(384, seed=3))
    return BestOfNConfig(
        model=str(BASE),
        out=out / "best-of-n",
        data=(write(out / "prompts.jsonl", rows),),
        adapter=(str(out / "sft"),),
        reward=(str(out / "reward"),),
        n=BEST_OF,
        sampling=DRAW,
    )


def dpo_config(out: Path) -> DPOConfig:
    """The best against the worst of the policy's own answers."""
    return DPOConfig(
        model=str(BASE),
        out=out / "dpo",
        data=PreferenceConfig(files=(str(out / "best-of-n" / "pairs.jsonl"),), eval_rows=32, cache=False),
        adapter=LORA,
        train=TrainConfig(steps=60, batch_size=16, learning_rate=1e-3, checkpointing="off", log_every=10),
        init=str(out / "sft"),
        dpo=DPOLossConfig(beta=0.3, sft=1.0),
        reference_cache="off",
    )


def ppo_config(out: Path) -> PPOConfig:
    """Ten rounds of 32 instructions with 4 answers each; policy, reference, value and reward on the one base."""
    rows = ({"prompt": messages} for messages in world.prompts(1024, seed=5))
    return PPOConfig(
        model=str(BASE),
        out=out / "ppo",
        data=DataConfig(files=(write(out / "ppo_prompts.jsonl", rows),), cache=False),
        adapter=LORA,
        train=TrainConfig(
            steps=40,
            batch_size=16,
            learning_rate=2e-3,
            schedule="constant",
            checkpointing="off",
            log_every=4,
        ),
        init=str(out / "sft"),
        reward=(str(out / "reward"),),
        sampling=DRAW,
        rollout=RolloutConfig(prompts=32, samples=4, normalise="running"),
        ppo=PPOLossConfig(epochs=2, kl=0.15),
        value=ValueConfig(adapter=LORA, learning_rate=3.0),
    )


def write(file: Path, rows: Iterable[dict]) -> str:
    """Write rows as JSONL -> the file's name."""
    write_jsonl(file, rows)
    return str(file)


def say(text: str) -> None:
    """What comes next."""
    print(f"\n{text}", file=sys.stderr)


def show(stage: Measured) -> None:
    """Some answers, as they are."""
    print(f"\n--- what the {stage.name} answers")
    for answer in stage.answers:
        print(answer)


def heldout_losses(run: Path) -> tuple[float, float]:
    """Held-out loss before the first and after the last step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["eval/loss"] for line in lines if "eval/loss" in line]
    return found[0], found[-1]


def table(stages: list[Measured], out: Path) -> None:
    """What each stage gained."""
    before, after = heldout_losses(out / "sft")
    judged = json.loads((out / "reward" / "adapter" / "lowalign.json").read_text())["reward"]
    print(f"\nSFT, held-out loss: {before:.3f} -> {after:.3f}")
    print(f"reward model, held-out rankings: {judged['accuracy']:.1%} of {judged['pairs']} pairs the right way round")
    print(
        f"\nmeans over {ASKED} instructions about places and in words that no training row has, by the rules of the world"
    )
    print(
        f"{'':12}{'names the place':>16}{'stops in time':>15}{'cheerful':>10}{'reward':>8}{'wins over sft':>18}{'KL to sft':>11}"
    )
    sft_stage = next(stage for stage in stages if stage.name == "sft")
    for stage in stages:
        rate, half = stage.against(sft_stage)
        wins = "" if stage is sft_stage else f"{rate:.0%} ± {half:.0%}"
        bound = "≤ " if stage.name.startswith("best-of") else ""  # log n - (n-1)/n, whatever the reward
        kl = "" if stage.kl is None else f"{bound}{stage.kl:.1f} nats"
        print(
            f"{stage.name:12}{stage.mean('place'):>16.0%}{stage.mean('stopped'):>15.0%}"
            f"{stage.mean('cheerful'):>10.2f}{stage.mean('total'):>8.2f}{wins:>18}{kl:>11}"
        )
