"""7B and 8B shapes on one card of 24 GB.

SFT: tokens per second, peak memory, paging before and after a resume. PPO (gpu_ppo.py): peak memory with all four roles,
tokens per second of sampling and of training.

    python benchmarks/gpu.py --out gpu.json            # needs a CUDA device
    python benchmarks/gpu.py --cases ppo --models Llama-3.1-8B --out ppo.json
    python benchmarks/gpu.py --tiny --out tiny.json    # the same code on the CPU, in seconds

Weights are random: nothing is downloaded, and speed and memory do not depend on them. A model is made layer by layer
straight into NF4, so never more than one layer exists in 16 bit. Memory is capped at 24 GB by PyTorch's allocator.
Model FLOPs are 6 N a token with checkpointing (2 forward, 2 recomputed, 2 backward; frozen weights have no gradient) and
4 N without; N = weights of the linear layers, without the LM head. The products inside attention are not counted.
"""

import argparse
import importlib.metadata
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import torch
from card import peaks, release
from gpu_ppo import measure_ppo
from peft import PeftConfig
from random_base import SHAPES, TINY, random_base

from lowalign import Base, Example, Host
from lowalign.config.sections import AdapterConfig, TrainConfig
from lowalign.errors import UserError
from lowalign.methods.sft import SFT
from lowalign.model.policy import peft_config
from lowalign.train import optim
from lowalign.train.engine import train

CAP = 24 * 10**9
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12, "L4": 121e12}
ADAPTERS = {
    "lora": AdapterConfig(kind="lora", r=16),
    "prompt": AdapterConfig(kind="prompt", virtual_tokens=20),
    "prefix": AdapterConfig(kind="prefix", virtual_tokens=20),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, also on the CPU")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each case; the first is not counted")
    parser.add_argument("--cases", nargs="*", choices=["sft", "ppo"], default=["sft", "ppo"])
    parser.add_argument("--models", nargs="*", help="some of the shapes only")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("no CUDA device; --tiny runs on the CPU")
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total))
    shapes = TINY if options.tiny else SHAPES
    lengths = (32, 64) if options.tiny else (2048, 4096)
    report = {"device": describe(device), "versions": versions(), "cap_bytes": CAP, "cases": []}
    for name in options.models or shapes:
        base = random_base(name, shapes[name], device)
        for case in measured(base, options, lengths):
            report["cases"].append({"model": name, **case})
            print(json.dumps(report["cases"][-1]), flush=True)
            options.out.write_text(json.dumps(report, indent=2) + "\n")
        del base
        release()


def measured(base: Base, options: argparse.Namespace, lengths: tuple[int, int]) -> Iterator[dict]:
    """Run the cases; yield the result of each."""
    for kind, adapter in ADAPTERS.items() if "sft" in options.cases else ():
        for length in lengths:
            for checkpointing in ("on", "off") if length == lengths[0] and kind == "lora" else ("on",):
                case = measure(base, peft_config(adapter), length, checkpointing, options.steps)
                yield {"method": "sft", "adapter": kind} | case
    if "ppo" in options.cases:
        yield {"method": "ppo"} | measure_ppo(base, options.tiny)


def measure(base: Base, adapter: PeftConfig, length: int, checkpointing: str, steps: int) -> dict:
    """Train, stop and resume; measure speed, memory, and whether the optimizer state is paged."""
    host = Host(base)
    host.add("policy", adapter)
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.model.config.vocab_size
    row = lambda: torch.randint(4, vocabulary, (length,), generator=generator).tolist()  # noqa: E731
    rows = [Example((ids := row())[: length // 2], [ids[length // 2 :]]) for _ in range(8)]
    config = TrainConfig(
        steps=steps, batch_size=2, token_budget=length, checkpointing=checkpointing, save_every=0, warmup=0.0
    )
    method = SFT(host, rows, ("policy",), config)
    result = {"tokens": length, "checkpointing": checkpointing}
    release()
    try:
        with tempfile.TemporaryDirectory() as folder, watched_optimizer() as optimizers:
            out = Path(folder)
            train(host, method, config, out)
            result |= speed(base, out, length, checkpointing)
            train(host, method, replace(config, steps=steps + 1), out, resume=True)
            before, after = (optim.paged_state_is_managed(o)["policy"] for o in optimizers)
            result |= {"trained_weights": host.flat("policy").master.numel()}
            result |= {"state_is_paged": before, "state_is_paged_after_resume": after}
    except (torch.OutOfMemoryError, UserError) as error:  # UserError: one example does not fit in memory
        result["failed"] = str(error).splitlines()[0]
    host.delete("policy")
    return result


def speed(base: Base, out: Path, length: int, checkpointing: str) -> dict:
    """Median tokens per second after the first step, peak memory, and the share of the card's peak FLOPs."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][1:]
    rate = statistics.median(rates)
    linear = sum(m.in_features * m.out_features for m in base.model.modules() if isinstance(m, bnb.nn.Linear4bit))
    figures = {"tokens_per_second": round(rate, 1), "loss": lines[-1]["loss"]} | peaks()
    if torch.cuda.is_available():
        peak = next((v for k, v in PEAK_FLOPS.items() if k in torch.cuda.get_device_name()), None)
        if peak:
            figures["mfu"] = round(rate * linear * (4 if checkpointing == "off" else 6) / peak, 3)
    return figures


class watched_optimizer:
    """Within it the optimizers that the engine makes are also added to a list, to inspect their state."""

    def __enter__(self) -> list:
        from lowalign.train import engine

        self.engine, self.make, optimizers = engine, engine.make_optimizer, []
        engine.make_optimizer = lambda *args: optimizers.append(self.make(*args)) or optimizers[-1]
        return optimizers

    def __exit__(self, *error) -> None:
        self.engine.make_optimizer = self.make


def describe(device: str) -> dict:
    if device == "cpu":
        return {"name": "CPU", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def versions() -> dict:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
