"""--fit: the options that fit are those of `lowalign plan`, a resumed run keeps them, and the peak is compared."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowalign.config import recipe
from lowalign.config.sections import BaseConfig, DataConfig, TrainConfig
from lowalign.config.training import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.model.base.base import Base
from lowalign.plan import fit as fit_module
from lowalign.plan.figures import CONTEXT
from lowalign.plan.fit import fitted, prediction
from lowalign.plan.meta_base import load_config
from lowalign.plan.planner import Planner, Setting
from lowalign.plan.verbs import run_phases
from lowalign.train import peak
from lowalign.train.peak import PeakCheck
from tests.tiny import CONFIGS, tiny_folder

CUDA = torch.device("cuda")
GIB = 2**30


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr("lowalign.plan.planner.MOST_TOKENS", 4096)
    monkeypatch.setattr(fit_module, "device_of", str)  # a card that is not here can be planned for
    shape = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 2048, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"](**shape).to_dict()))
    data = DataConfig(max_length=512)
    return SFTConfig(str(tmp_path), tmp_path / "run", data=data, base=BaseConfig(device="cpu", dtype="float32"))


def needed(config, **changes):
    """Bytes of a setting, by the planner itself."""
    planner = Planner(load_config(config.model), config, "cpu")
    return planner.figures(Setting(config.data.max_length, config.train.token_budget), **changes).needed


def test_the_largest_token_budget_that_fits(config, capsys):
    vram = needed(replace(config, train=TrainConfig(token_budget=2048)))
    new, _ = fitted(replace(config, fit=f"{vram / 2**20 + 1}MiB"))
    kept = new.train.keep_layers
    assert new.train == replace(config.train, token_budget=2048, keep_layers=kept) and new.data == config.data
    assert "--train.token-budget 2048" in capsys.readouterr().err
    assert needed(new) <= vram + 2**20 < needed(replace(new, train=TrainConfig(token_budget=2560)))


@pytest.mark.parametrize("device,checkpointing", [("cuda", "offload"), ("cpu", "on")])
def test_offload_rather_than_small_micro_batches(device, checkpointing, config, capsys):
    """On the CPU there is nowhere to offload to."""
    config = replace(config, base=replace(config.base, device=device))
    planner = Planner(load_config(config.model), config, device)
    vram = planner.figures(Setting(512, 2048)).needed - 2**20
    new, _ = fitted(replace(config, fit=f"{vram / 2**20}MiB"))
    assert new.train.checkpointing == checkpointing
    found = Planner(load_config(config.model), new, device).figures(Setting(512, new.train.token_budget))
    assert found.needed <= vram and new.train.token_budget >= 1024
    assert ("--train.checkpointing offload" in capsys.readouterr().err) == (device == "cuda")


def test_shorter_examples_where_the_length_does_not_fit(config, capsys):
    """Checkpointing stays as the user set it, unless it is the default."""
    vram = needed(
        replace(config, data=DataConfig(max_length=256), train=TrainConfig(token_budget=256, checkpointing="off"))
    )
    new, _ = fitted(replace(config, fit=f"{vram / 2**20 + 0.1}MiB", train=TrainConfig(checkpointing="off")))
    assert new.data.max_length == new.train.token_budget == 256 and new.train.checkpointing == "off"
    assert "--data.max-length 256" in capsys.readouterr().err


def test_nothing_fits(config):
    with pytest.raises(UserError, match=r"--fit: no example fits in 1\.2 GiB.*take a smaller --model"):
        fitted(replace(config, fit="1.2GiB"))


@pytest.mark.parametrize("device,free", [("cpu", 3 * GIB), ("cuda", 3 * GIB)])
def test_alone_it_takes_what_is_free(device, free, config, monkeypatch):
    """A card's context exists by then, so that it is not subtracted twice; --base.leave-free is."""
    asked = []
    monkeypatch.setattr(fit_module.psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, 24 * GIB))
    search = fit_module.search
    monkeypatch.setattr(fit_module, "search", lambda planner, setting, vram: asked.append((planner.device, vram)) or search(planner, setting, vram))  # fmt: skip
    fitted(replace(config, fit="auto", base=replace(config.base, device=device)))
    assert asked == [(device, free + (CONTEXT if device == "cuda" else 0))]


def test_a_resumed_run_keeps_its_values(config):
    before = replace(config, fit="auto", train=TrainConfig(token_budget=1536, checkpointing="offload"), data=DataConfig(max_length=300))  # fmt: skip
    config.out.mkdir()
    (config.out / "recipe.yaml").write_text(recipe.dump(before))
    new, predict = fitted(replace(config, fit="1MiB", resume=True))
    assert recipe.diff(before, new) == [] and new.train.token_budget == 1536 and predict is not None
    assert fitted(config) == (config, None)


@pytest.mark.parametrize("words,fit", [([], None), (["--fit"], "auto"), (["--fit", "24GB"], "24GB"), (["--fit", "--resume"], "auto")])  # fmt: skip
def test_the_flag_alone_and_with_a_size(words, fit, tmp_path):
    parsed = recipe.parse(SFTConfig, ["--model", "m", "--out", "o", *words])
    assert parsed.fit == fit and parsed.resume == ("--resume" in words)
    (tmp_path / "r.yaml").write_text(recipe.dump(parsed))
    assert recipe.parse(SFTConfig, [], tmp_path / "r.yaml").fit == fit


def test_a_size_that_is_none():
    for kind in (SFTConfig, RewardConfig, DPOConfig, PPOConfig):
        with pytest.raises(UserError, match="--fit much: expected a size such as 24GB"):
            kind("m", Path("o"), fit="much")


EXAMPLES = [Example(list(range(4, 60)), [list(range(4, 44))]), Example(list(range(4, 100)), [list(range(4, 30))])]
PAIRS = [Example(list(range(4, 60)), [list(range(4, 44)), list(range(4, 50))], rank=[0, 1])]


@pytest.mark.parametrize("kind,rows", [(SFTConfig, EXAMPLES), (RewardConfig, PAIRS), (DPOConfig, PAIRS)])
def test_the_prediction_for_a_micro_batch(kind, rows, tmp_path, monkeypatch):
    """Of these rows themselves: to 2 % what torch's allocator hands out for the same step."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from allocator import MeasuredRun

    folder = tiny_folder(tmp_path, "llama", hidden_size=128)
    config = kind(str(folder), tmp_path / "o", base=BaseConfig("none", "float32", "cpu"))
    predict = prediction(load_config(str(folder)), config, "cpu")
    real = MeasuredRun(Base.load(folder, "none", dtype="float32", device="cpu", quiet=True), config.train)
    run_phases(real, config, 0, 0, rows)
    measured = max(size for name, size in real.measured if name != "optimizer step")
    assert predict(rows) == pytest.approx(measured, rel=0.02)


@pytest.fixture
def measured(monkeypatch):
    """A card that has used so many bytes at most."""
    answer = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(peak, "measured_peak", lambda device: answer[0] if answer else None)
    return answer


@pytest.mark.parametrize(
    "size,said", [(7.0, "(+0%)\n"), (6.4, "(-9%)\n"), (7.8, "more than 10 % off: lower --train.token-budget"), (6.0, "there is room")]
)  # fmt: skip
def test_the_peak_after_ten_steps_beside_the_prediction(size, said, measured, capsys):
    """Predicted for the largest micro-batch so far, once."""
    measured.append(int(size * GIB))
    predicted_for = []
    check = PeakCheck(lambda rows: predicted_for.append(rows) or 7 * GIB, CUDA)
    for step in range(1, 13):
        check.saw(EXAMPLES[:1])
        if step == 4:
            check.saw(EXAMPLES)
        check.after_step(last=False)
        assert bool(check.metrics) == (step >= 10)
    assert predicted_for == [EXAMPLES]
    assert check.metrics == {"predicted_peak_gib": 7.0}
    text = capsys.readouterr().err
    assert (
        text.count("\n") == 1
        and f"{size:.2f} GiB measured, 7.00 predicted" in text
        and "218 tokens" in text
        and said in text
    )


def test_a_short_run_a_cpu_and_a_prediction_that_fails(measured, capsys):
    def fails(rows):
        raise RuntimeError("no meta kernel\nat all")

    check = PeakCheck(fails, torch.device("cpu"))
    check.saw(EXAMPLES)
    check.after_step(last=True)
    assert check.metrics == {} and capsys.readouterr().err == ""
    measured.append(GIB)
    check = PeakCheck(fails, CUDA)
    check.saw(EXAMPLES)
    check.after_step(last=True)
    assert check.metrics == {}
    assert capsys.readouterr().err == "peak memory 1.00 GiB; it could not be predicted: no meta kernel\n"
