"""Memory of BitDelta on a random Llama of 0.95 billion weights: `python benchmarks/bitdelta_memory.py --out DIR`.

Peak memory of `compress`, and what one 4-bit base takes with one, two and three deltas on it. CPU, one thread; 6 GB of disk.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lowalign import Base, Host
from lowalign.demo.configs import BASE
from lowalign.export.bitdelta import compress
from lowalign.export.weight_files import PlannedTensor, write_shards

CONFIG = LlamaConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, num_attention_heads=16,
    num_key_value_heads=16, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
TINY = LlamaConfig(
    vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip


def write_model(folder: Path, config: LlamaConfig, noise: float) -> None:
    """A model of the same random weights whatever the noise, with noise on its blocks' matrices."""
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict()

    def maker(name: str, shape: torch.Size):
        def make() -> torch.Tensor:
            torch.manual_seed(sum(map(ord, name)))
            if len(shape) == 1:
                return torch.ones(shape, dtype=torch.bfloat16)
            weight = torch.randn(shape) * 0.02
            return (weight + noise * torch.randn(shape) if "layers" in name else weight).bfloat16()

        return make

    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE, trust_remote_code=False).save_pretrained(folder)
    planned = [PlannedTensor(n, torch.bfloat16, tuple(t.shape), maker(n, t.shape)) for n, t in shapes.items()]
    write_shards(folder, planned, 10**9, lambda _: None)


def tensor_bytes(host: Host) -> float:
    """MB of the base's weights, with the scales of those in 4 bit, and of all adapters."""
    tensors = [*host.base.model.parameters(), *host.base.model.buffers()]
    states = [state for p in tensors if (state := getattr(p, "quant_state", None)) is not None]
    tensors += [t for s in states for t in (s.absmax, s.code, s.state2.absmax)]
    tensors += [t for adapter in host.adapters.values() for t in adapter.file_parameters().values()]
    return sum(t.nbytes for t in tensors) / 1e6


def memory(key: str) -> float:
    """VmRSS, its peak VmHWM, or RssAnon (without mapped files) of this process in MB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out, config = arguments.out, TINY if arguments.tiny else CONFIG
    write_model(out / "base", config, 0.0)
    write_model(out / "fine", config, 1e-3)
    size = sum(f.stat().st_size for f in (out / "base").glob("*.safetensors")) / 1e6

    for onto in ("original", "dequantized"):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        before, cpu = memory("VmRSS"), time.process_time()
        report = compress(str(out / "base"), str(out / "fine"), out / onto, onto=onto)
        peak, cpu = memory("VmHWM") - before, time.process_time() - cpu
        print(
            f"compress --onto {onto}, two models of {size:,.0f} MB: peak {peak:,.0f} MB, {cpu:.0f} s of CPU", flush=True
        )
    print(f"the delta: {report['bytes'] / 1e6:,.1f} MB; LoRA r 16: {report['bytes_lora_r16'] / 1e6:,.1f} MB")

    host = Host(Base.load(out / "base", device="cpu", quiet=True))
    print(
        f"base in NF4: {tensor_bytes(host):,.0f} MB of tensors, {memory('RssAnon'):,.0f} MB of the process", flush=True
    )
    for i in range(3):
        host.load(f"delta{i}", out / "dequantized")
        print(f"with {i + 1} on it: {tensor_bytes(host):,.0f} MB, {memory('RssAnon'):,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
