"""Speed and peak memory of each command on the shapes of real models, for gpu.py, beside what `lowalign plan` predicts.

Weights are random: speed and memory do not depend on them. A model is made layer by layer straight into NF4, so never more than one
layer exists in 16 bit. Model FLOPs (MFU) are 6 N a token with checkpointing (2 forward, 2 recomputed, 2 backward; frozen weights have
no gradient) and 4 N without; N = weights of the linear layers, without the LM head. The products inside attention are not counted.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from card import peaks, release
from gpu_ppo import ADAPTER, measure_ppo, ppo_config, score_completions
from gpu_setup import Setup, save_random

from lowalign import Base, Example, Host
from lowalign.commands.bitdelta import compress
from lowalign.config import cards
from lowalign.config.bitdelta import CompressConfig, DistilTrainConfig
from lowalign.config.sections import BaseConfig, DataConfig, Sampling, TrainConfig
from lowalign.config.training import DPOConfig, RewardConfig, RunConfig, SFTConfig
from lowalign.export.merge import merge as merge_adapters
from lowalign.methods.dpo import DPO
from lowalign.methods.reward_model import RewardModel
from lowalign.methods.sft import SFT
from lowalign.model.adapters.kinds import peft_config
from lowalign.plan.dry_run import DryRun
from lowalign.plan.figures import GIB, seconds
from lowalign.plan.meta_base import load_config, meta_base
from lowalign.plan.verbs import run_phases
from lowalign.train import engine, optim
from lowalign.train.engine import train

OUT = Path("out")
EIGHT_B = "Llama-3.1-8B"


def sft_2048(setup: Setup) -> dict:
    """8B, paged state, stopped and resumed."""
    return sft(setup, EIGHT_B, 2048, steps=5, optimizer="paged_adamw_8bit", resume=True)


def sft_8192(setup: Setup) -> dict:
    """8B."""
    return sft(setup, EIGHT_B, 8192, steps=3)


def sft_131072(setup: Setup) -> dict:
    """8B at its whole context."""
    return sft(setup, EIGHT_B, 131072, steps=2, checkpointing="offload")


def sft_32b(setup: Setup) -> dict:
    """32B, its embedding in CPU memory."""
    return sft(setup, "Qwen2.5-32B", 8192, steps=2, embedding="cpu", checkpointing="offload")


def sft(
    setup: Setup, model: str, length: int, steps: int, resume: bool = False, embedding: str = "device", **options: Any
) -> dict:
    """LoRA r=16; an optimizer step of two micro-batches of one example each (131,072: of one)."""
    length, size = (64 if setup.tiny else length), 1 if length > 2**16 else 2
    rows = [Example((ids := row)[: length // 2], [ids[length // 2 :]]) for row in random_rows(setup, model, 4, length)]
    config = TrainConfig(steps=steps, batch_size=size, token_budget=length, save_every=0, warmup=0.0, **options)
    make = lambda host: SFT(host, rows, ("policy",), config)  # noqa: E731
    return measure(
        setup, model, SFTConfig("m", OUT, train=config, base=BaseConfig(embedding=embedding)), make, rows[:1], resume
    )


def dpo(setup: Setup) -> dict:
    """8B; pairs whose prompt is half of their 1,024 tokens, the reference's log-probs computed before."""
    rows = pairs(setup, 1024)
    config = DPOConfig("m", OUT, train=TrainConfig(steps=3, batch_size=2, token_budget=1536, save_every=0))
    make = lambda host: DPO(host, rows, ("policy",), (), config.dpo, config.train)  # noqa: E731
    return measure(setup, EIGHT_B, config, make, rows[:1])


def reward(setup: Setup) -> dict:
    """8B; the same pairs."""
    rows = pairs(setup, 1024)
    config = RewardConfig("m", OUT, train=TrainConfig(steps=3, batch_size=2, token_budget=1536, save_every=0))

    def make(host: Host) -> RewardModel:
        host.add_scalar_head("policy")
        return RewardModel(host, rows, ("policy",), config.reward, config.train)

    return measure(setup, EIGHT_B, config, make, rows[:1])


def ppo(setup: Setup) -> dict:
    """8B, four roles; gpu_ppo.py says what a round has."""
    config, prompt = ppo_config(setup.tiny), 32 if setup.tiny else 512
    figures = predicted(setup, EIGHT_B, config, prompt, config.train.token_budget)
    if setup.only_predicts:
        return figures
    return figures | done(measure_ppo(setup.base(EIGHT_B), setup.tiny))


def best_of_n(setup: Setup) -> dict:
    """8B: 8 completions each of 4 prompts, sampled and scored. The policy and the reward are LoRAs."""
    base, (prompt, new) = setup.base(EIGHT_B), (16, 8) if setup.tiny else (512, 256)
    host = Host(base)
    for name in ("policy", "reward"):
        host.add(name, peft_config(ADAPTER))
    host.add_scalar_head("reward")
    prompts = random_rows(setup, EIGHT_B, 4, prompt)
    release()
    started = time.perf_counter()
    with host.use("policy"):
        samples = host.generate(prompts, 8, Sampling(max_new_tokens=new, min_new_tokens=new))
    sampled = time.perf_counter()
    score_completions(host, prompts, [[c.ids for c in row] for row in samples])
    scored = time.perf_counter()
    result = {
        "sampling_tokens_per_second": round(32 * new / (sampled - started), 1),
        "scoring_tokens_per_second": round((4 * prompt + 32 * new) / (scored - sampled), 1),
    }
    for name in ("policy", "reward"):
        host.delete(name)
    return result | peaks()


def merge(setup: Setup) -> dict:
    """A LoRA into a small base, on the device; compared with the model that was trained, as `lowalign merge` does."""
    setup.forget_base()
    with tempfile.TemporaryDirectory() as folder:
        base = Base.load(setup.folder(), device=setup.device, quiet=True)
        host = Host(base)
        host.add("policy", peft_config(ADAPTER))
        host.save("policy", Path(folder) / "adapter", files={"chat_template.jinja": ""}, method="sft")
        host.delete("policy")
        del host, base
        release()
        started = time.perf_counter()
        report = merge_adapters([str(Path(folder) / "adapter")], Path(folder) / "merged", model=str(setup.folder()))
        numbers = {key: value for key, value in report.items() if isinstance(value, int | float | str)}
        return {"merge_seconds": round(time.perf_counter() - started, 1), "report": numbers} | peaks()


def bitdelta(setup: Setup) -> dict:
    """A delta of a small fine-tune: compressed, and distilled for two steps."""
    setup.forget_base()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random(folder / "fine", load_config(str(setup.folder())), change=0.02)
        rows = random_rows(setup, EIGHT_B, 8, 40, vocabulary=380)
        (folder / "rows.jsonl").write_text(
            "".join(json.dumps({"text": " ".join(map(str, row))}) + "\n" for row in rows)
        )
        started = time.perf_counter()
        code = compress(CompressConfig(
            str(setup.folder()), str(folder / "fine"), folder / "run", train=DistilTrainConfig(steps=2, save_every=0),
            data=DataConfig(files=(str(folder / "rows.jsonl"),), cache=False),
        ))  # fmt: skip
        if code:
            raise RuntimeError(f"compress ended with {code}")
        return {"bitdelta_seconds": round(time.perf_counter() - started, 1)} | peaks()


# -- what they share --------------------------------------------------------------------------------------------------


def measure(
    setup: Setup, model: str, config: RunConfig, make: Callable[[Host], Any], micro_batch: Sequence[Example],
    resume: bool = False,
) -> dict:  # fmt: skip
    """Train; median tokens per second after the first step, the peak beside the prediction, and with `resume` whether the
    optimizer's state is paged before and after one."""
    figures = predicted(setup, model, config, 0, 0, micro_batch)
    about = {"model": model, "tokens": micro_batch[0].length, "checkpointing": config.train.checkpointing}
    if setup.only_predicts:
        return about | figures
    base = setup.base(model, config.base.embedding)
    host, settings = Host(base), config.train
    host.add("policy", peft_config(config.adapter))
    try:
        with tempfile.TemporaryDirectory() as folder, watched_paging() as paged:
            release()
            train(host, make(host), settings, Path(folder))
            figures |= speed(base, Path(folder), settings.checkpointing) | peaks()
            if resume:
                train(host, make(host), replace(settings, steps=settings.steps + 1), Path(folder), resume=True)
                figures |= {"state_is_paged": paged[0], "state_is_paged_after_resume": paged[1]}
    finally:
        host.training(None)
        host.delete("policy")
    return about | figures


def predicted(
    setup: Setup, model: str, config: RunConfig, length: int, token_budget: int,
    micro_batch: Sequence[Example] | None = None,
) -> dict:  # fmt: skip
    """The peak and, on a card of the table, the roofline speed, by a dry run on the meta device."""
    run = DryRun(meta_base(setup.shape(model), config.base), config.train, setup.device)
    tokens = run_phases(run, config, length, token_budget, micro_batch)
    figures = {
        "predicted_gib": round(max(phase.peak.total for phase in run.phases) / GIB, 4),
        "predicted_by": "dry run",
    }
    if card := cards.CARDS[setup.only_predicts] if setup.only_predicts else this_card():
        step = sum(phase.repeats * seconds(phase.work, card) for phase in run.phases)
        figures["roofline_tokens_per_second"] = round(tokens / step, 1)
    return figures


def this_card() -> cards.Card | None:
    """Its published figures, if it is in the table; the longest name that fits."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    known = [key for key in cards.CARDS if all(word in name.replace("-", " ").split() for word in key.split())]
    return cards.CARDS[max(known, key=len)] if known else None


def speed(base: Base, out: Path, checkpointing: str) -> dict:
    """Median tokens per second after the first step, and the share of the card's peak FLOPs."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][1:]
    figures = {"tokens_per_second": round(statistics.median(rates), 1), "loss": lines[-1]["loss"]}
    if card := this_card():
        linear = sum(m.in_features * m.out_features for m in base.model.modules() if isinstance(m, bnb.nn.Linear4bit))
        figures["mfu"] = round(
            statistics.median(rates) * linear * (4 if checkpointing == "off" else 6) / card.bf16 / 1e12, 3
        )
    return figures


class watched_paging:
    """Within it a list gets, for each run that ends, whether the state of "policy" was in managed memory."""

    def __enter__(self) -> list[bool]:
        self.free, paged = engine.free_paged_state, []

        def watch(optimizer: torch.optim.Optimizer) -> None:
            paged.append(optim.paged_state_is_managed(optimizer)["policy"])
            self.free(optimizer)

        engine.free_paged_state = watch
        return paged

    def __exit__(self, *error) -> None:
        engine.free_paged_state = self.free


def random_rows(setup: Setup, model: str, count: int, length: int, vocabulary: int | None = None) -> list[list[int]]:
    """Token ids, none of the first four."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, vocabulary or setup.shape(model).vocab_size, (count, length), generator=generator).tolist()


def pairs(setup: Setup, length: int) -> list[Example]:
    """Preferences: half of the tokens is the prompt, which both completions share."""
    half = (64 if setup.tiny else length) // 2
    return [
        Example(row[:half], [row[half : 2 * half], row[2 * half :]], rank=[0, 1], reference=[-100.0, -100.0])
        for row in random_rows(setup, EIGHT_B, 4, 3 * half)
    ]


def done(result: dict) -> dict:
    """The figures of a run. Raises RuntimeError where it failed."""
    if "failed" in result:
        raise RuntimeError(result["failed"])
    return result
