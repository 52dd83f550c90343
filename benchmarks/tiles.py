"""What tiles and recomputation cost on the CPU: seconds of a forward and backward, paired, against ordinary checkpointing.

    python benchmarks/tiles.py [--tokens 2048] [--rounds 5]

A random Llama (hidden 512, 8 layers) in fp32 with a LoRA of rank 16, one row; process CPU seconds of one thread, medians and
ratios within each round.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from lowalign import Example, Host
from lowalign.model.attention.interface import ATTN_IMPLEMENTATION
from lowalign.model.base.base import Base, freeze
from lowalign.model.base.identity import Identity

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
SETTINGS = {
    "on": ("on", {"tile": 0}),
    "off": ("off", {"tile": 0}),
    "on, tiles of a quarter": ("on", {"tile": 0.25}),
    "offload, one tile": ("offload", {"tile": 0}),
    "offload, every second input": ("offload", {"tile": 0, "every": 2}),
    "on, half of the layers kept": ("on", {"tile": 0, "keep_layers": 4}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small model, one round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    host = make_host(SHAPE | ({"hidden_size": 64, "intermediate_size": 128} if options.tiny else {}))
    tokens, rounds = (64, 1) if options.tiny else (options.tokens, options.rounds)
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for i in range(rounds + 1):
        for name, (mode, memory) in SETTINGS.items():
            taken = step(host, tokens, mode, memory | {"tile": int(memory["tile"] * tokens)})
            if i:  # the first is a warm-up
                seconds[name].append(taken)
    print("| layers | CPU seconds | against on |\n|---|---|---|")
    for name, times in seconds.items():
        ratio = statistics.median(t / on for t, on in zip(times, seconds["on"], strict=True))
        print(f"| {name} | {statistics.median(times):.2f} | {ratio:.2f} |")


def make_host(shape: dict[str, int]) -> Host:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=1024, max_position_embeddings=8192, **shape), trust_remote_code=False
    )
    freeze(model)
    model.set_attn_implementation(ATTN_IMPLEMENTATION)
    identity = Identity("random", None, "", "", 1024, "", "none")
    host = Host(Base(model, range(1024), identity, Path(tempfile.gettempdir()), (), 1.0, True))
    host.add("policy", LoraConfig(r=16, target_modules="all-linear"))
    host.train_only("policy")
    return host


def step(host: Host, tokens: int, mode: str, memory: dict[str, int]) -> float:
    """CPU seconds of a forward and backward."""
    ids = [3 + i % 1000 for i in range(tokens)]
    host.training(mode, **memory)
    start = time.process_time()
    with host.use("policy"):
        rows = host.logprobs([Example(ids[: tokens // 2], [ids[tokens // 2 :]])], supervised_only=True)
    (-sum(logp.sum() for row in rows for logp in row)).backward()
    return time.process_time() - start


if __name__ == "__main__":
    main()
