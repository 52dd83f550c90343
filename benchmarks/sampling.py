"""Sampling beside transformers' `generate`: CPU seconds of n completions of each prompt, one thread.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736 MALLOC_TOP_PAD_=268435456 \\
        python benchmarks/sampling.py --rounds 5 --out sampling.json      # about 5 minutes; --tiny: seconds

Random Llama of cases.py (hidden 512, 8 layers, vocabulary 32,000) in NF4 with a LoRA of rank 16 on all linear layers, both in
16 bit; prompts of 100 to 400 random tokens; no completion ends before its last token. In each round all take a turn, and the
ratios are taken within the round. The first round is not counted. The MALLOC_ settings keep freed memory, for all alike.

generate: transformers with peft, `num_return_sequences`, padded on the left, without bitsandbytes' repacking of weights for
AVX512-BF16, with which it took more than five times as long on these prompts.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import bitsandbytes as bnb
import torch
from cases import FIRST, SHAPES, lora, make_model
from peers import machine
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from lowalign import Base, Host, Sampling
from lowalign.model.base.base import nf4_config
from lowalign.model.dequantized import dequantized_bytes

CASES = {"4 prompts x 8": (4, 8), "16 prompts x 4": (16, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, and 8 tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape, new = ("tiny", 8) if options.tiny else ("full", 64)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), shape)
        host, stock = our_host(folder), stock_model(folder)
    allocator = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    report = {"machine": machine(), "torch": torch.__version__, "allocator": allocator, "results": []}
    report["dequantized_mb"] = dequantized_bytes(host.base.model) / 1e6
    for case, (count, n) in CASES.items():
        generator = torch.Generator().manual_seed(0)
        words = SHAPES[shape]["vocab_size"]
        lengths = torch.randint(100, 401, (count,), generator=generator).tolist()
        prompts = [torch.randint(FIRST, words, (k,), generator=generator).tolist() for k in lengths]
        contestants = {
            "generate": lambda p=prompts, n=n: generate(stock, p, n, new),
            "lowalign, dequantize off": lambda p=prompts, n=n: ours(host, p, n, new, "off"),
            "lowalign": lambda p=prompts, n=n: ours(host, p, n, new, "auto"),
        }
        report["results"].append({"case": case} | compare(contestants, options.rounds))
        print(json.dumps(report["results"][-1], indent=1), flush=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def compare(contestants: dict, rounds: int) -> dict:
    """CPU seconds of each, and how many times "lowalign" is faster, with quartiles."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            since = time.process_time()
            run()
            seconds[name].append(time.process_time() - since)
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    figures = {}
    for name, all_rounds in seconds.items():
        counted = all_rounds[1:]
        figures[name] = {"cpu_seconds": round(statistics.median(counted), 3)}
        for other in ("generate", "lowalign, dequantize off"):
            ratios = [a / b for a, b in zip(seconds[other][1:], counted, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            figures[name][f"times {other}"] = [round(x, 2) for x in (middle, low, high)]
    return figures


def our_host(folder: str) -> Host:
    host = Host(Base.load(folder, device="cpu", quiet=True))
    host.add("policy", lora("CAUSAL_LM"))
    set_update(host.weights("policy").items())
    host.flat("policy")  # computes with a 16-bit copy, as a policy in training does
    return host


def stock_model(folder: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, dtype=torch.bfloat16, quantization_config=nf4_config(torch.bfloat16, "lm_head")
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    model = get_peft_model(model, lora("CAUSAL_LM"), autocast_adapter_dtype=False).eval()
    set_update(model.named_parameters())
    return model


def set_update(weights) -> None:
    """A LoRA that is not the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in weights:
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) / 100)


@torch.no_grad()
def generate(model: torch.nn.Module, prompts: list[list[int]], n: int, new: int) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=(ids > 0).long(), max_new_tokens=new, eos_token_id=None, pad_token_id=0,
        do_sample=True, top_k=0, num_return_sequences=n,
    )  # fmt: skip
    assert out.shape == (len(prompts) * n, width + new)


def ours(host: Host, prompts: list[list[int]], n: int, new: int, dequantize: str) -> None:
    host.base.eos_ids = ()
    with host.use("policy"):
        host.generate(prompts, n, Sampling(max_new_tokens=new, dequantize=dequantize))


if __name__ == "__main__":
    main()
