"""`lowalign bitdelta compress` and `distil` end to end: a run's files, kill and resume, the report, and what is refused."""

import hashlib
import json
import random
import shutil
import signal

import pytest
import torch
from peft import LoraConfig

from lowalign import Base, Example, Host
from lowalign.cli import main
from lowalign.commands.bitdelta import distil
from lowalign.config import recipe
from lowalign.config.bitdelta import DistilConfig
from lowalign.train import reference_cache
from tests.bitdelta_models import base_and_fine_tune
from tests.commands import child
from tests.tiny import WORDS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """world/base, world/fine, world/rows.jsonl, world/delta; a cache of its own."""
    folder = tmp_path_factory.mktemp("world")
    base, fine = base_and_fine_tune(folder)
    rng = random.Random(0)
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))  # noqa: E731
    rows = [{"prompt": text(), "completion": text()} for _ in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWALIGN_CACHE", str(folder / "cache"))
        assert (
            main(["bitdelta", "compress", "--base", str(base), "--finetuned", str(fine), "--out", f"{folder}/delta"])
            == 0
        )
        yield folder


TRAIN = ["--train.steps", "6", "--train.save-every", "2", "--train.batch-size", "4", "--train.learning-rate", "0.1"]
DATA = ["--data.eval-rows", "6", "--data.no-cache"]


def flags(world, out, *more) -> list[str]:
    return [
        "bitdelta", "distil", "--model", f"{world}/base", "--delta", f"{world}/delta", "--finetuned", f"{world}/fine",
        "--data", f"{world}/rows.jsonl", "--out", str(out), *TRAIN, *DATA, *more,
    ]  # fmt: skip


def compress_flags(world, out, *more) -> list[str]:
    return ["bitdelta", "compress", "--base", f"{world}/base", "--finetuned", f"{world}/fine", "--out", str(out), *more]


def digest(out) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def logps(base, *folders):
    host = Host(Base.load(base, device="cpu", quiet=True))
    for i, folder in enumerate(folders):
        host.load(f"d{i}", folder)
    with host.use(*host.adapters), torch.no_grad():
        return host.logprobs([Example([5, 6], [[7, 8, 9, 10]])])[0][0]


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(flags(world, out)) == 0
    return out


def test_a_distilled_delta_and_its_report(world, straight, capsys):
    meta = json.loads((straight / "adapter" / "lowalign.json").read_text())
    report = meta["bitdelta"]
    assert meta["method"] == "bitdelta" and report["rows"] == "held-out" and report["onto"] == "dequantized"
    assert report["kl"]["after"] < report["kl"]["before"]
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval/loss"] for line in lines if "eval/loss" in line]  # by the loop, on the same rows
    assert report["kl"]["before"] == pytest.approx(evaluated[0], rel=0.02)  # bf16
    assert report["kl"]["after"] == pytest.approx(evaluated[-1], rel=0.02)
    assert set(report["loss"]) == {"base", "finetuned", "delta_before", "delta"}
    before = json.loads((world / "delta" / "lowalign.json").read_text())["bitdelta"]
    assert {key: report[key] for key in before} == before
    assert str(world) not in json.dumps(meta)
    assert not torch.equal(logps(world / "base", straight), logps(world / "base", world / "delta"))


def test_the_same_in_one_command(world, straight, tmp_path, capsys):
    """compress --data: the run's folder loads as the distilled delta; OUT/compressed is the one before."""
    out = tmp_path / "run"
    capsys.readouterr()
    assert main(compress_flags(world, out, "--data", f"{world}/rows.jsonl", *TRAIN, *DATA)) == 0
    said = capsys.readouterr().err
    assert "a LoRA of rank 16 on all linear layers takes 0.07 MB: smaller" in said
    assert "tokens of held-out rows" in said and "loss: base " in said and "times less" in said
    assert digest(out) == digest(straight)
    delta = "adapter_model.safetensors"
    assert (out / "compressed" / delta).read_bytes() == (world / "delta" / delta).read_bytes()
    assert torch.equal(logps(world / "base", out), logps(world / "base", straight))
    assert main(compress_flags(world, out, "--data", f"{world}/rows.jsonl", *TRAIN, *DATA)) == 1
    assert "exists: go on with --resume" in capsys.readouterr().err


def test_killed_and_resumed_is_the_same_run(world, straight, tmp_path):
    out = tmp_path / "run"
    assert child.run(flags(world, out), LOWALIGN_KILL_AT="save-optimizer:2") == -signal.SIGKILL
    assert sorted(p.name for p in (out / "checkpoints").glob("step-*")) == ["step-000002"]
    assert main(flags(world, out, "--resume")) == 0
    assert digest(out) == digest(straight)
    one, other = (json.loads((run / "adapter" / "lowalign.json").read_text()) for run in (out, straight))
    assert one["bitdelta"] == other["bitdelta"]


def test_one_command_killed_and_resumed(world, straight, tmp_path):
    out = tmp_path / "run"
    command = compress_flags(world, out, "--data", f"{world}/rows.jsonl", *TRAIN, *DATA)
    assert child.run(command, LOWALIGN_KILL_AT="save-optimizer:2") == -signal.SIGKILL
    assert main([*command, "--resume"]) == 0
    assert digest(out) == digest(straight)


def test_the_recipe_of_a_run_is_the_same_run(world, straight, tmp_path):
    assert main(["bitdelta", "distil", str(straight / "recipe.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert digest(tmp_path / "again") == digest(straight)
    assert recipe.parse(DistilConfig, [], straight / "recipe.yaml").delta == f"{world}/delta"


def test_a_distilled_delta_is_distilled_on(world, straight, tmp_path):
    assert main(flags(world, tmp_path / "more", "--delta", str(straight), "--train.steps", "1")) == 0
    meta = json.loads((tmp_path / "more" / "adapter" / "lowalign.json").read_text())["bitdelta"]
    first = json.loads((straight / "adapter" / "lowalign.json").read_text())["bitdelta"]
    assert meta["kl"]["before"] == pytest.approx(first["kl"]["after"], rel=0.02)


def test_on_a_base_that_is_loaded(world, straight, tmp_path):
    base = Base.load(world / "base", device="cpu", quiet=True)
    checksum = base.checksum()
    assert distil(recipe.parse(DistilConfig, flags(world, tmp_path / "run")[2:]), base) == 0
    assert digest(tmp_path / "run") == digest(straight) and base.checksum() == checksum


def test_a_lora_on_top_of_it(world, straight, tmp_path):
    """The policy of another run starts from it; nothing is copied that cannot be."""
    sft = [
        "sft",
        "--model",
        f"{world}/base",
        "--data",
        f"{world}/rows.jsonl",
        "--init",
        str(straight),
        "--data.no-cache",
    ]
    assert main([*sft, "--out", str(tmp_path / "sft"), "--train.steps", "1"]) == 0
    assert (tmp_path / "sft" / "adapter" / "parents" / "0" / "adapter_model.safetensors").exists()
    assert main(["merge", str(tmp_path / "sft"), "--out", str(tmp_path / "merged")]) == 0


def test_references_that_differ_in_signs_or_kept_tensors_are_cached_apart(world):
    host = Host(Base.load(world / "base", device="cpu", quiet=True))
    host.load("delta", world / "delta")
    key = lambda: reference_cache._key(host, ("delta",), [Example([5], [[6]])])  # noqa: E731
    first, adapter = key(), host.adapters["delta"]
    assert key() == first
    with torch.no_grad():
        next(iter(adapter.matrices.values())).packed[0, 0] ^= 1
        second = key()
        next(iter(adapter.kept.values()))[0] += 1
    assert len({first, second, key()}) == 3


def test_wrong_use(world, straight, tmp_path, capsys):
    def refused(*arguments) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 1
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    host = Host(Base.load(world / "base", device="cpu", quiet=True))
    host.add("lora", LoraConfig(r=4, target_modules=["q_proj"]))
    host.save("lora", tmp_path / "lora")
    lora = str(tmp_path / "lora")
    out = str(tmp_path / "x")
    assert "is a LORA adapter; `lowalign bitdelta compress` makes a delta" in refused(
        *flags(world, out, "--delta", lora)
    )
    (tmp_path / "head").mkdir()
    base, fine = base_and_fine_tune(tmp_path / "head", only="lm_head")
    assert main(["bitdelta", "compress", "--base", str(base), "--finetuned", str(fine), "--out", f"{out}/head"]) == 0
    assert "has no scales to train" in refused(*flags(world, out, "--delta", f"{out}/head"))
    assert "is not an adapter folder" in refused(*flags(world, out, "--delta", f"{world}/base"))
    assert "holds results of an earlier run" in refused(*flags(world, straight))
    changed = refused(*flags(world, straight, "--resume", "--train.learning-rate", "1"))
    assert "train.learning_rate: 0.1 -> 1.0" in changed
    other = tmp_path / "other"
    shutil.copytree(world / "fine", other / "fine")
    resumed = flags(world, straight, "--resume", "--finetuned", f"{other}/fine")
    assert "finetuned: " in refused(*resumed)
    assert "no data" in refused(*[w for w in flags(world, out) if w not in ("--data", f"{world}/rows.jsonl")])
    assert "give --data FILE" in refused(*compress_flags(world, out, "--train.steps", "3"))
    assert "give --data FILE" in refused(*compress_flags(world, out, "--resume"))
    assert "delta exists and is not overwritten" in refused(*compress_flags(world, world / "delta"))
    missing = refused("bitdelta", "compress", "--base", "b")
    assert "give --finetuned F" in missing and "give --out DIR" in missing
    init = [
        "sft",
        "--model",
        f"{world}/base",
        "--data",
        f"{world}/rows.jsonl",
        "--out",
        out,
        "--init",
        f"{world}/delta",
    ]
    assert "cannot be copied: it is BITDELTA" in refused(*init, "--init-mode", "copy")
    assert "--adapter.kind" in refused(*init, "--adapter.kind", "bitdelta")
    assert refused("bitdelta") and not (tmp_path / "x" / "adapter").exists()


def test_turns_with_weights_are_refused(world, tmp_path, capsys):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    words = [f"{tmp_path}/rows.jsonl" if w == f"{world}/rows.jsonl" else w for w in flags(world, tmp_path / "run")]
    assert main([*words, "--data.eval-rows", "0"]) == 1
    assert 'rows.jsonl:1: a turn has a "weight" that is neither 0 nor 1' in capsys.readouterr().err
