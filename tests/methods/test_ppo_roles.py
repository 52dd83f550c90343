"""Four roles, each an adapter of its own kind, on one 4-bit base: who learns, and what must stay as it is, bit for bit."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowalign import Base, Example, Host
from lowalign.config.sections import AdapterConfig, Sampling, TrainConfig
from lowalign.config.training import PPOConfig, PPOLossConfig, RolloutConfig
from lowalign.methods.ppo import PPO
from lowalign.methods.ppo_round import Roles
from lowalign.model.adapters.kinds import peft_config
from lowalign.rewards.reward_run import score_examples
from lowalign.train.accumulate import MicroBatches
from lowalign.train.engine import train
from lowalign.train.signals import StopSignals
from tests.methods.made import apart, rankings
from tests.tiny import tiny_folder

KINDS = [("lora", "prefix", "prompt"), ("prefix", "prompt", "lora"), ("prompt", "lora", "prefix")]
ENDS = tuple(range(2, 60))  # so many tokens end a text that random weights draw some


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama")


def four_roles(folder, kinds, **options) -> tuple[Host, PPO]:
    """policy and value of their kinds on a frozen SFT LoRA, which is the reference; the reward on the base alone."""
    host = Host(Base.load(folder, device="cpu", quiet=True))
    host.base.eos_ids = ENDS
    torch.manual_seed(0)
    for name, kind in zip(("init", "policy", "value", "reward"), ("lora", *kinds), strict=True):
        host.add(name, peft_config(AdapterConfig(kind=kind, r=4, virtual_tokens=3)))
        with torch.no_grad():
            for p in host.parameters(name):
                p.add_(torch.randn_like(p) * 0.05)
    for name in ("value", "reward"):
        host.add_scalar_head(name)
    config = PPOConfig(
        model="",
        out=Path(),
        train=TrainConfig(batch_size=2, steps=5, learning_rate=1e-2, optimizer="adamw_8bit", save_every=100),
        sampling=Sampling(max_new_tokens=8),
        rollout=RolloutConfig(prompts=4, samples=2),
        ppo=PPOLossConfig(**{"epochs": 1, "value_coef": 1.0} | options),
    )
    prompts = [[60 + i, 70, 80 + i] for i in range(8)]

    def score(numbers, completions):
        return score_examples(
            host, ("reward",), [Example(prompts[i], k) for i, k in zip(numbers, completions, strict=True)]
        )

    return host, PPO(host, Roles(("init", "policy"), ("init",), ("init", "value")), prompts, score, config)


def bits(tensors) -> str:
    """A fingerprint of all their bytes."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_bits(host: Host) -> str:
    """Of every weight of the model that is no adapter's, the packed four bits and their scales included."""
    model = host.base.model
    own = [p for name, p in model.named_parameters() if "lora_" not in name]
    scales = [p.quant_state for p in own if getattr(p, "quant_state", None) is not None]
    return bits([*own, *model.buffers(), *(s.absmax for s in scales), *(s.state2.absmax for s in scales)])


def reference_logps(host: Host) -> list[torch.Tensor]:
    pack = [*rankings((2, 3)), *apart(rankings((2,), seed=3)[0])]
    with host.use("init"), torch.no_grad():
        return [t for row in host.logprobs(pack) for t in row]


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_updates_change_policy_and_value_alone(folder, kinds, tmp_path):
    host, method = four_roles(folder, kinds)
    before = {name: bits(host.weights(name).values()) for name in host.adapters}
    base, logps = base_bits(host), reference_logps(host)
    result = train(host, method, method.config.train, tmp_path)
    assert result.step == 5 and method.round == 2 and result.metrics["kl"] != 0
    after = {name: bits(host.weights(name).values()) for name in host.adapters}
    assert {name for name in after if after[name] != before[name]} == {"policy", "value"}
    assert base_bits(host) == base
    assert all(map(torch.equal, reference_logps(host), logps))


@pytest.mark.slow
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_the_base_after_twenty_updates(folder, kinds, tmp_path):
    host, method = four_roles(folder, kinds)
    base, logps = base_bits(host), reference_logps(host)
    train(host, method, replace(method.config.train, steps=20), tmp_path)
    assert base_bits(host) == base and all(map(torch.equal, reference_logps(host), logps))


def gradients(method: PPO) -> dict[str, torch.Tensor]:
    """Of the first step, by the adapters that are trained. The others have none."""
    host = method.host
    host.train_only(*method.lr_multipliers)
    flats = {name: host.flat(name) for name in method.lr_multipliers}
    host.training("on")
    MicroBatches(method, flats, 40, StopSignals()).gradients(method.batch(0), 0)
    host.training(None)
    for name in ("init", "reward"):
        assert all(p.grad is None for p in host.parameters(name))
    return {name: flat.master.grad.clone() for name, flat in flats.items()}


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_each_loss_reaches_its_own_adapter(folder, kinds):
    _, method = four_roles(folder, kinds)
    both = gradients(method)
    assert both["policy"].any() and both["value"].any()
    method.config = replace(method.config, ppo=replace(method.config.ppo, value_coef=0.0))
    policy_alone = gradients(method)
    assert torch.equal(policy_alone["policy"], both["policy"]) and not policy_alone["value"].any()
    method.config = replace(method.config, ppo=replace(method.config.ppo, value_coef=1.0))
    for r in method.rollouts:
        r.advantages = [torch.zeros_like(a) for a in r.advantages]  # nothing to gain: no policy loss
    value_alone = gradients(method)
    assert torch.equal(value_alone["value"], both["value"]) and not value_alone["policy"].any()


def test_a_shared_value_reaches_the_policy(folder):
    """One adapter serves both, and the head of the value is its own."""
    host, method = four_roles(folder, ("lora", "prefix", "prompt"))
    host.add_scalar_head("policy", zero=False)
    method = PPO(host, Roles(("init", "policy"), ("init",), ("init", "policy")), method.prompts, method.score, method.config)  # fmt: skip
    assert list(method.lr_multipliers) == ["policy"] and gradients(method)["policy"].any()
    for r in method.rollouts:
        r.advantages = [torch.zeros_like(a) for a in r.advantages]
    assert gradients(method)["policy"].any()  # by the value loss alone
