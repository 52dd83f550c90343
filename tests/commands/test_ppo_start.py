"""What the roles of a `lowalign ppo` run are: the reference that --reference names, and what a fresh value function is on."""

import json
from pathlib import Path

import pytest
import torch

from lowalign import Base, Host
from lowalign.cli import main
from lowalign.commands import ppo as command
from lowalign.config.sections import TrainConfig
from lowalign.config.training import PPOConfig, PPOLossConfig, RolloutConfig
from lowalign.methods.ppo import PPO
from lowalign.model.policy import load_stack
from tests.tiny import tiny_folder

FP32 = ("--base.quantization", "none", "--base.dtype", "float32", "--base.device", "cpu", "--data.no-cache")
SFT = ("--train.steps", "2", "--train.batch-size", "2", "--train.learning-rate", "5e-2", "--adapter.r", "4")
ROUND = (
    "--rollout.prompts", "4", "--rollout.samples", "2", "--train.batch-size", "2", "--train.steps", "1", "--adapter.r",
    "4", "--value.adapter.r", "4", "--sampling.max-new-tokens", "6", "--rollout.missing-eos", "keep",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, two sft runs that are not alike, prompts and a reward function."""
    folder = tmp_path_factory.mktemp("world")
    tiny_folder(folder / "model", "llama")
    (folder / "f.py").write_text("def f(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    prompts = [{"prompt": f"Where is {name}?"} for name in "ABCD"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    for name, text in (("one", "jumps over the lazy dog"), ("two", "Paris is the capital")):
        rows = [{"prompt": f"What is {i}?", "completion": text} for i in range(4)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = ("--model", f"{folder}/model", "--data", f"{folder}/{name}.jsonl", "--out", f"{folder}/{name}")
        assert main(["sft", *files, *SFT, *FP32]) == 0
    return folder


def method_of(world, out, monkeypatch, *more: str) -> PPO:
    """The method of a run, after its only step."""
    methods = []

    class Kept(PPO):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            methods.append(self)

    monkeypatch.setattr(command, "PPO", Kept)
    files = ("--model", f"{world}/model", "--data", f"{world}/prompts.jsonl", "--out", str(out))
    assert main(["ppo", *files, "--reward", f"{world}/f.py:f", *ROUND, *FP32, *more]) == 0
    return methods[0]


@pytest.mark.parametrize("reference", ["start", "base", "two"])
def test_the_reference_is_the_one_that_is_named(world, tmp_path, monkeypatch, reference):
    """Its log-probs of the sampled completions are those of that run, or of the bare base, loaded alone."""
    name = f"{world}/two" if reference == "two" else reference
    method = method_of(world, tmp_path / "run", monkeypatch, "--init", f"{world}/one", "--reference", name)
    host = Host(Base.load(world / "model", quantization="none", dtype="float32", device="cpu", quiet=True))
    stacks = {"start": load_stack(host, "one", f"{world}/one"), "base": (), "two": load_stack(host, "two", f"{world}/two")}  # fmt: skip
    logps = {}
    for stack_name, stack in stacks.items():
        with host.use(*stack), torch.no_grad():
            logps[stack_name] = torch.cat([t for row in host.logprobs(method.rollouts) for t in row])
    got = torch.cat([t for r in method.rollouts for t in r.reference_logps])
    torch.testing.assert_close(got, logps.pop(reference), rtol=1e-4, atol=1e-4)
    assert all((got - other).abs().max() > 0.05 for other in logps.values())


def test_a_fresh_value_function_is_on_what_the_policy_starts_from(world, tmp_path, monkeypatch, capsys):
    """Not on the policy, whose updates would change the values under it. The log says what each role is."""
    roles = method_of(world, tmp_path / "run", monkeypatch, "--init", f"{world}/one").roles
    assert (roles.policy, roles.reference, roles.value) == (("init", "policy"), ("init",), ("init", command.VALUE))
    initial, log = "base + init (LoRA)", capsys.readouterr().err
    assert "the LoRA starts as the policy of --init: log-probs equal on 4 examples\n" in log
    roles = f"policy: {initial} + policy (LoRA); reference: {initial}; value: {initial} + value (LoRA)"
    assert f"{roles}\nreward: 1 * {world}/f.py:f, which is a function\n" in log


def test_a_shown_sample_has_its_own_reward(world, tmp_path, monkeypatch):
    """The reward of these runs is the length of the text."""
    method = method_of(world, tmp_path / "run", monkeypatch, "--rollout.log-samples", "4")
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().split("\n")[:-1]]
    assert len(lines) == 4 and [line["reward"] for line in lines] == [len(line["completion"]) for line in lines]
    assert any(r.rewards[0] != r.rewards[1] for r in method.rollouts)


def test_the_steps_of_a_run_are_whole_rounds():
    """3 passes over 6 prompts are 18, in rounds of 4: five rounds, each with 2 epochs of 2 minibatches."""
    train, rollout = TrainConfig(epochs=3, batch_size=2), RolloutConfig(prompts=4, samples=2)
    config = PPOConfig("", Path(), train=train, rollout=rollout, ppo=PPOLossConfig(epochs=2))
    assert command.PPOSetup(config).steps(6) == 20
