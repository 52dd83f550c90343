"""`lowalign plan` against a real model, and the tables of docs/plan.md.

    python benchmarks/plan.py validate     12 settings of a model of 105 million weights on the CPU (10 minutes on one core):
                                           the prediction, and what torch's allocator handed out
    python benchmarks/plan.py table        the longest example that fits, for models × methods × 16, 24 and 48 GB
    python benchmarks/plan.py --tiny …     the same code in seconds

`table` runs each architecture with two numbers of layers and takes the rest by a line: the layers of a model are equal, so
every phase of a step grows by the same amount with each. `--full` runs all layers instead.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from allocator import MeasuredRun
from plan_models import MODELS
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from lowalign import Base
from lowalign.config.commands import BestOfNConfig
from lowalign.config.sections import AdapterConfig, BaseConfig, PreferenceConfig, Sampling, TrainConfig
from lowalign.config.training import DPOConfig, DPOLossConfig, PPOConfig, RewardConfig, RolloutConfig, SFTConfig
from lowalign.plan.dry_run import DryRun
from lowalign.plan.figures import CONTEXT, GIB
from lowalign.plan.meta_base import load_config, meta_base
from lowalign.plan.planner import GRAIN
from lowalign.plan.search import largest
from lowalign.plan.verbs import Config, run_phases

OUT = Path("out")
ROUND = {"rollout": RolloutConfig(prompts=4, samples=2), "sampling": Sampling(max_new_tokens=128)}
SETTINGS: list[tuple[str, str, Config, int, int]] = [  # what, quantization, config, length, token budget
    ("SFT, LoRA", "nf4", SFTConfig("m", OUT), 512, 512),
    ("SFT, LoRA, 2 in a micro-batch", "nf4", SFTConfig("m", OUT), 512, 1024),
    ("SFT, LoRA, fp32 base", "none", SFTConfig("m", OUT), 512, 512),
    ("SFT, LoRA r=64, no checkpointing", "nf4", SFTConfig("m", OUT, adapter=AdapterConfig(r=64), train=TrainConfig(checkpointing="off")), 512, 512),
    ("SFT, prefix", "nf4", SFTConfig("m", OUT, adapter=AdapterConfig(kind="prefix")), 512, 512),
    ("SFT, prompt", "nf4", SFTConfig("m", OUT, adapter=AdapterConfig(kind="prompt")), 512, 512),
    ("reward", "nf4", RewardConfig("m", OUT), 512, 512),
    ("DPO, reference cached", "nf4", DPOConfig("m", OUT), 512, 512),
    ("DPO, reference in each step, fp32 base", "none", DPOConfig("m", OUT, reference_cache="off"), 512, 512),
    ("KTO", "nf4", DPOConfig("m", OUT, dpo=DPOLossConfig(loss="kto")), 256, 512),
    ("PPO round, four roles", "nf4", PPOConfig("m", OUT, train=TrainConfig(batch_size=2), **ROUND), 256, 512),
    ("best-of-n", "nf4", BestOfNConfig("m", OUT, n=4, sampling=Sampling(max_new_tokens=128)), 256, 512),
]  # fmt: skip
MEDIUM = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 16384}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}  # fmt: skip
METHODS: dict[str, Config] = {
    "SFT": SFTConfig("m", OUT),
    "SFT, offload": SFTConfig("m", OUT, train=TrainConfig(checkpointing="offload")),
    "reward": RewardConfig("m", OUT),
    "DPO": DPOConfig("m", OUT, data=PreferenceConfig()),
    "PPO": PPOConfig("m", OUT, rollout=RolloutConfig(prompts=8, samples=4), sampling=Sampling(max_new_tokens=512), train=TrainConfig(batch_size=8)),
}  # fmt: skip
CARDS = (16, 24, 48)  # GB of 10^9 bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["validate", "table"])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, short examples")
    parser.add_argument("--full", action="store_true", help="table: run all layers")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="table: some of the models only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "validate":
        validate(options.tiny)
    else:
        table(options)


def validate(tiny: bool) -> None:
    """Print a row for each setting: the prediction and the allocator's peak in MiB, and the difference."""
    print(
        "| setting | predicted (dry run), MiB | allocated, MiB | difference | of it, without the base |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        random_folder(Path(folder), LlamaConfig(**(TINY if tiny else MEDIUM), max_position_embeddings=2048))
        for what, quantization, config, length, budget in SETTINGS:
            length, budget = (length // 8, budget // 8) if tiny else (length, budget)
            train = config.sft.train if isinstance(config, BestOfNConfig) else config.train
            base = Base.load(folder, quantization, dtype="float32", device="cpu", quiet=True)
            real = MeasuredRun(base, train)
            run_phases(real, config, length, budget)
            predicted = DryRun(meta_base(load_config(folder), BaseConfig(quantization, "float32")), train, "cpu")
            run_phases(predicted, config, length, budget)
            expected = max(phase.peak.total for phase in predicted.phases)
            measured = max(peak for name, peak in real.measured if name != "optimizer step")
            weights = predicted.phases[0].peak.components["base"]
            own = (expected - weights) / (measured - weights) - 1
            print(
                f"| {what} | {expected / 2**20:,.1f} | {measured / 2**20:,.1f} | {expected / measured - 1:+.2%} | {own:+.2%} |",
                flush=True,
            )


def random_folder(folder: Path, config: PretrainedConfig) -> None:
    """A model folder with random weights and a tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).save_pretrained(folder)
    vocabulary = {str(i): i for i in range(config.vocab_size)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0")), eos_token="1"
    ).save_pretrained(folder)


def table(options: argparse.Namespace) -> None:
    """Print a row for each model and method: the peak at 2,048 tokens, and the longest example for each size of card."""
    print(
        f"| model | method | peak at 2,048 | {' | '.join(f'{size} GB' for size in CARDS)} |\n|{'---|' * (3 + len(CARDS))}"
    )
    for name in options.models:
        config = MODELS[name]
        for method, own in METHODS.items():
            peaks = Peaks(shrunk(config, 2) if options.tiny else config, own, options.full or options.tiny)
            short = peaks(2048 if not options.tiny else 64) / GIB
            free = CONTEXT + int(own.base.leave_free * GIB)
            new = own.sampling.max_new_tokens if isinstance(own, PPOConfig) else 0
            most = GRAIN if options.tiny else config.max_position_embeddings - new
            found = [largest(peaks, size * 10**9 - free, GRAIN, most, GRAIN) for size in CARDS]
            cells = ["–" if n is None else f"{n:,}{'*' if n > most - GRAIN else ''}" for n in found]
            print(f"| {name} | {method} | {short:.2f} | {' | '.join(cells)} |", flush=True)


class Peaks:
    """length -> bytes of tensors at most, in a step with one example of that length as a micro-batch."""

    def __init__(self, architecture: PretrainedConfig, config: Config, full: bool) -> None:
        self.architecture, self.config, self.full = architecture, config, full
        self.known: dict[int, int] = {}

    def __call__(self, length: int) -> int:
        if length not in self.known:
            layers = self.architecture.num_hidden_layers
            if self.full:
                self.known[length] = max(self.phases(length, layers))
            else:  # 2 and 4: gemma-2 has layers of two kinds in turn
                pairs = zip(self.phases(length, 2), self.phases(length, 4), strict=True)
                self.known[length] = max(math.ceil(a + (layers - 2) * (b - a) / 2) for a, b in pairs)
        return self.known[length]

    def phases(self, length: int, layers: int) -> list[int]:
        """The peak of each phase with that many layers."""
        run = DryRun(meta_base(shrunk(self.architecture, layers), self.config.base), self.config.train)
        run_phases(run, self.config, length, 0)
        return [phase.peak.total for phase in run.phases]


def shrunk(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same architecture with another number of layers."""
    values = config.to_dict() | {"num_hidden_layers": layers}
    for key in ("layer_types",):
        values[key] = values[key][:layers] if values.get(key) else None
    return type(config).from_dict(values)


if __name__ == "__main__":
    main()
