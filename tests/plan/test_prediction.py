"""The prediction on the meta device, against what torch's allocator hands out for a real model on the CPU."""

import gc
import json
from pathlib import Path

import pytest
import torch

from lowalign.config.commands import BestOfNConfig
from lowalign.config.sections import AdapterConfig, BaseConfig, Sampling, TrainConfig
from lowalign.config.training import DPOConfig, DPOLossConfig, PPOConfig, RewardConfig, RolloutConfig, SFTConfig
from lowalign.model.base.base import Base
from lowalign.plan.dry_run import DryRun
from lowalign.plan.meta_base import base_tensors, load_config, meta_base
from lowalign.plan.verbs import run_phases
from tests.tiny import tiny_folder

SHAPE = {
    "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
OUT = Path("out")
ROUND = {"rollout": RolloutConfig(prompts=4, samples=2), "sampling": Sampling(max_new_tokens=80)}
CASES = {
    "sft": SFTConfig("m", OUT),
    "sft, no checkpointing": SFTConfig("m", OUT, train=TrainConfig(checkpointing="off")),
    "sft, 32-bit optimizer": SFTConfig("m", OUT, train=TrainConfig(optimizer="adamw")),
    "sft, on an adapter": SFTConfig("m", OUT, init="earlier"),
    "sft, prefix": SFTConfig("m", OUT, adapter=AdapterConfig(kind="prefix")),
    "sft, prompt": SFTConfig("m", OUT, adapter=AdapterConfig(kind="prompt")),
    "reward": RewardConfig("m", OUT),
    "dpo": DPOConfig("m", OUT),
    "dpo, reference in each step": DPOConfig("m", OUT, reference_cache="off"),
    "kto": DPOConfig("m", OUT, dpo=DPOLossConfig(loss="kto")),
    "ppo": PPOConfig("m", OUT, train=TrainConfig(batch_size=2), **ROUND),
    "best-of-n": BestOfNConfig("m", OUT, n=4, sampling=Sampling(max_new_tokens=80)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base"), "llama", **SHAPE)


def base(folder, quantization):
    return Base.load(folder, quantization, dtype="float32", device="cpu", quiet=True)


@pytest.mark.parametrize("case,quantization", [*((case, "nf4") for case in CASES), ("sft", "none"), ("ppo", "none")])
def test_the_peak_is_what_the_allocator_hands_out(case, quantization, folder, monkeypatch):
    """To 2 %. The optimizer's step is left out: the CPU version of bitsandbytes computes in 32 bit, the card's does not."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from allocator import MeasuredRun

    config = CASES[case]
    train = config.sft.train if isinstance(config, BestOfNConfig) else config.train
    predicted = DryRun(meta_base(load_config(str(folder)), BaseConfig(quantization, "float32")), train, "cpu")
    real = MeasuredRun(base(folder, quantization), train)
    assert run_phases(predicted, config, 192, 512) == run_phases(real, config, 192, 512)
    assert [p.name for p in predicted.phases] == [name for name, _ in real.measured] and predicted.phases
    for prediction, (name, measured) in zip(predicted.phases, real.measured, strict=True):
        if name != "optimizer step":
            assert prediction.peak.total == pytest.approx(measured, rel=0.02), name


def test_garbage_of_earlier_work_does_not_lower_a_measured_peak(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from allocator import allocated_peak

    held = []

    def earlier():
        garbage = [torch.zeros(2**20)]
        garbage.append(garbage)  # a cycle, which only the garbage collector frees
        held.append(garbage)

    def run():
        held.clear()
        objects = [[] for _ in range(100_000)]  # so many new ones start the collector
        return torch.zeros(1000), objects

    assert allocated_peak(earlier) == 2**22
    assert allocated_peak(run) == 4000
    assert gc.isenabled()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_base_has_the_bytes_of_the_loaded_one(quantization, folder):
    """4-bit weights with all their scales, embeddings, norms and buffers."""
    sizes = []
    for one in (meta_base(load_config(str(folder)), BaseConfig(quantization, "float32")), base(folder, quantization)):
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in base_tensors(one.model)}
        sizes.append(sum(storages.values()))
    assert sizes[0] == sizes[1]


def test_a_longer_sequence_off_the_card_needs_cpu_memory(folder):
    """offload: 3 layers' inputs of 192 tokens, and what the head keeps, are in CPU memory."""
    config = SFTConfig("m", OUT, train=TrainConfig(checkpointing="offload"))
    runs = {}
    for checkpointing in ("on", "offload"):
        run = DryRun(
            meta_base(load_config(str(folder)), BaseConfig("nf4", "float32")), TrainConfig(checkpointing=checkpointing)
        )
        run_phases(run, config, 192, 0)
        runs[checkpointing] = run
    inputs = 3 * 192 * 128 * 4
    assert runs["on"].cpu_bytes == 0
    assert inputs < runs["offload"].cpu_bytes < 4 * inputs
    assert runs["offload"].phases[0].peak.components["checkpoint_inputs"] < inputs / 2


def test_tied_embeddings_count_once(tmp_path):
    sizes = {}
    for tied in (True, False):
        (tmp_path / "config.json").write_text(json.dumps(load_tied(tmp_path, tied)))
        model = meta_base(load_config(str(tmp_path)), BaseConfig()).model
        sizes[tied] = sum({t.untyped_storage()._cdata: t.nbytes for t in base_tensors(model)}.values())
    assert sizes[False] - sizes[True] == 1024 * 128 * 2


def load_tied(folder: Path, tied: bool) -> dict:
    from tests.tiny import CONFIGS

    return CONFIGS["llama"](**SHAPE, tie_word_embeddings=tied).to_dict()
