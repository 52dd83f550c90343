"""Adapter folders of other tools and users: the base's path, the user's umask, and a reward run where a policy belongs."""

import json
import os
import stat

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig

from lowalign import Host
from lowalign.cli import main
from lowalign.durable import write_file
from tests.commands.tiny_runs import FP32, load, make


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("world"))
    rows = [{"prompt": "Who?", "chosen": "A fox.", "rejected": "The."}] * 4
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


REWARD_RUN_AS = {
    "generate": ["generate", "--prompt", "Who?", "--adapter", "REWARD"],
    "generate, second": ["generate", "--prompt", "Who?", "--adapter", "POLICY", "--adapter", "REWARD"],
    "chat": ["chat", "POLICY", "REWARD"],
    "best-of-n": ["best-of-n", "DATA", "--reward", "REWARD", "--adapter", "REWARD"],
    "judge": ["judge", "ANSWERS", "--adapter", "REWARD"],
    "sft": ["sft", "DATA", "--init", "REWARD"],
    "dpo": ["dpo", "DATA", "--init", "REWARD"],
    "dpo's reference": ["dpo", "DATA", "--reference", "REWARD"],
    "ppo": ["ppo", "DATA", "--reward", "REWARD", "--init", "REWARD"],
}


@pytest.mark.parametrize("case", REWARD_RUN_AS)
def test_a_reward_run_as_policy(world, tmp_path, capsys, case):
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"prompt": "Who?", "completions": ["A fox.", "The."]}) + "\n")
    places = {"REWARD": [f"{world}/reward"], "POLICY": [f"{world}/policy"]}
    places |= {"DATA": ["--data", f"{world}/rows.jsonl"], "ANSWERS": ["--data", str(answers)]}
    words = [word for place in REWARD_RUN_AS[case] for word in places.get(place, [place])]
    out = [] if words[0] in ("generate", "chat") else ["--out", str(tmp_path / "out")]
    assert main([*words, "--model", f"{world}/model", *FP32, *out]) == 1
    message = capsys.readouterr().err
    assert f"{world}/reward is a reward model" in message and "Traceback" not in message
    assert "--reward" in message and "lowalign score" in message


def test_a_reward_run_continues_a_reward_run(world, tmp_path, capsys):
    flags = ["--data", f"{world}/rows.jsonl", "--train.steps", "1", "--train.batch-size", "2", "--data.no-cache"]
    out = ["--out", str(tmp_path / "out"), "--init", f"{world}/reward", "--init-mode", "copy", "--adapter.r", "4"]
    assert main(["reward", "--model", f"{world}/model", *FP32, *flags, *out]) == 0, capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask,mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_0600_whatever_the_umask(world, tmp_path, umask, mode):
    host = Host(load(world / "model"))
    host.add("a", LoraConfig(r=2, target_modules="all-linear"))
    before = os.umask(umask)
    try:
        host.save("a", tmp_path / "a", files={"chat_template.jinja": "x"})
        write_file(tmp_path / "b", lambda temp: temp.write_text("x"))
        write_file(tmp_path / "c", "x")
        from safetensors.torch import save_file

        write_file(tmp_path / "d", lambda temp: save_file({"x": torch.ones(2)}, temp))
    finally:
        os.umask(before)
    files = [*(tmp_path / "a").iterdir(), *(tmp_path / name for name in "bcd")]
    assert len(files) == 7 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}


def test_peft_finds_a_local_base(world, tmp_path, monkeypatch):
    """From another folder, with the base given by a relative path and a link when the adapter was saved."""
    monkeypatch.chdir(world)
    (tmp_path / "link").symlink_to(world / "model")
    for n, name in enumerate(("model", tmp_path / "link")):
        host = Host(load(name))
        host.add("a", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        host.save("a", tmp_path / str(n))
        config = json.loads((tmp_path / str(n) / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str((world / "model").resolve())
        assert str(world) not in (tmp_path / str(n) / "lowalign.json").read_text()
    monkeypatch.chdir("/")
    ids = torch.arange(5, 15)[None]
    stock = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "1").eval()
    with torch.no_grad(), host.use("a"):
        expected = host.base.model(input_ids=ids, use_cache=False).logits
        assert (stock(input_ids=ids).logits - expected).abs().max() < 1e-3  # fp32; 1e-6 seen


def test_merge_finds_a_local_base(world, tmp_path, capsys):
    host = Host(load(world / "model"))
    host.add("a", LoraConfig(r=2, target_modules="all-linear"))
    host.save("a", tmp_path / "a")
    assert main(["merge", str(tmp_path / "a"), "--out", str(tmp_path / "merged"), "--no-verify"]) == 0
    assert (tmp_path / "merged" / "config.json").exists()
