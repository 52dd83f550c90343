"""PPO against a plain implementation: four separate models of stock transformers and peft, a padded row for each
completion, full logits. One round and its update: rewards, advantages, losses, metrics, gradients."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lowalign import Base, Example, Host
from lowalign.config.sections import AdapterConfig, Sampling, TrainConfig
from lowalign.config.training import PPOConfig, PPOLossConfig, RolloutConfig, ValueConfig
from lowalign.methods.ppo import PPO
from lowalign.methods.ppo_round import Roles
from lowalign.model.adapters.adapter import SCALAR_HEAD
from lowalign.model.adapters.kinds import peft_config
from lowalign.rewards.reward_run import score_examples
from lowalign.train.accumulate import MicroBatches
from lowalign.train.signals import StopSignals
from tests.methods.made import rankings, relative
from tests.tiny import tiny_folder

ENDS = tuple(range(2, 60))  # so many tokens end a text that random weights draw some
PTX = [Example(e.prompt, [e.completions[0]], [[t != 1 for t in range(len(e.completions[0]))]]) for e in rankings()]
for example in PTX[::2]:  # turns with weights of their own
    example.token_weights = [[(0.5 + t) * m for t, m in enumerate(example.masks[0])]]


@dataclass(frozen=True)
class Case:
    policy: str = "lora"
    value: str = "lora"
    ppo: dict = field(default_factory=dict)
    rollout: dict = field(default_factory=dict)
    temperature: float = 1.0
    share: bool = False
    ptx: bool = False
    budget: int = 4096


CASES = {
    "gae": Case(),
    "gae, everything else": Case(
        policy="prefix",
        temperature=0.7,
        ppo={"gamma": 0.97, "gae_lambda": 0.8, "dual_clip": 1.3, "entropy": 0.01, "value_clip": 0.0, "whiten": False},
        rollout={"missing_eos": "mask", "length_penalty": 0.05, "normalise": "running", "reward_clip": 0.8},
        budget=50,
    ),
    "gae, k3": Case(policy="prompt", value="prefix", ppo={"kl_in": "loss", "kl": 0.3}, budget=80),
    "gae, soft value": Case(
        value="prompt", ptx=True, ppo={"ptx_coef": 0.7}, rollout={"missing_eos": "keep"}, temperature=0.8
    ),
    "gae, shared": Case(share=True, ppo={"entropy": 0.02}, ptx=True, budget=60),
    "group": Case(ppo={"advantage": "group", "kl_in": "loss", "entropy": 0.01}, temperature=1.3),
    "group, no spread": Case(policy="prefix", ppo={"advantage": "group", "group_std": False}, budget=60),
    "group, k1": Case(ppo={"advantage": "group", "kl_in": "reward"}),
    "rloo": Case(ppo={"advantage": "rloo", "dual_clip": 1.2}, rollout={"missing_eos": "mask"}),
    "rloo, k1": Case(ppo={"advantage": "rloo", "kl_in": "reward"}),
    "group, DAPO": Case(
        ppo={"advantage": "group", "kl_in": "loss", "clip_high": 0.28, "clip": 0.1}, rollout={"missing_eos": "replace"}
    ),
    "group, GRPO": Case(
        ppo={"advantage": "group", "kl_in": "loss", "entropy": 0.01, "loss_mean": "sequence"},
        rollout={"missing_eos": "mask"},
        budget=60,
    ),
    "group, Dr. GRPO": Case(
        ppo={"advantage": "group", "group_std": False, "kl_in": "loss", "loss_mean": "constant"},
        rollout={"missing_eos": "mask"},
        budget=60,
    ),
    "group, GSPO": Case(
        ppo={"advantage": "group", "ratio": "sequence", "loss_mean": "sequence", "clip": 0.2, "clip_high": 0.4},
        budget=60,
    ),
    "gae, sequence": Case(
        ppo={"ratio": "sequence", "loss_mean": "sequence", "clip": 0.15, "reshuffle": True, "dual_clip": 1.02},
        rollout={"missing_eos": "replace", "eos_score": -2.5, "length_penalty": 0.1},
        budget=60,
    ),
    "gae, constant": Case(ppo={"loss_mean": "constant", "entropy": 0.02}, rollout={"missing_eos": "keep"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama")


def config(case: Case) -> PPOConfig:
    return PPOConfig(
        model="",
        out=Path(),
        train=TrainConfig(batch_size=2, token_budget=case.budget),
        sampling=Sampling(max_new_tokens=8, temperature=case.temperature),
        rollout=RolloutConfig(prompts=4, samples=3, **case.rollout),
        ppo=PPOLossConfig(epochs=2, **case.ppo),
        value=ValueConfig(share=case.share),
    )


# -- the plain implementation -----------------------------------------------------------------------------------------


class Copies:
    """policy, reference, value and reward, each a model of its own; the SFT adapter under them is merged into each."""

    def __init__(self, folder: Path, saved: Path, case: Case, head: Tensor) -> None:
        fresh = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # noqa: E731
        sft = lambda: PeftModel.from_pretrained(fresh(), saved / "init").merge_and_unload()  # noqa: E731
        self.policy = PeftModel.from_pretrained(sft(), saved / "policy").eval()
        self.reference = sft().eval()
        self.value = self.policy if case.share else PeftModel.from_pretrained(sft(), saved / "value").eval()
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        self.reward = PeftModel.from_pretrained(classifier, saved / "reward").eval()
        self.head = nn.Parameter(head.clone())
        for model in (self.policy, self.value):
            for p in self.weights(model).values():
                p.requires_grad_(True)

    def weights(self, model: PeftModel) -> dict[str, nn.Parameter]:
        """The adapter's, by the names they have in a host."""
        strip = lambda name: name.removeprefix("base_model.model.").removeprefix("prompt_encoder.")  # noqa: E731
        short = lambda name: strip(name).replace("default.", "")  # noqa: E731
        return {short(n): p for n, p in model.named_parameters() if "lora_" in n or "prompt_encoder" in n}

    @torch.no_grad()
    def follow(self, host: Host, case: Case) -> None:
        """Take on the host's weights."""
        for role in ("policy",) if case.share else ("policy", "value"):
            for name, p in self.weights(getattr(self, role)).items():
                p.copy_(host.weights(role)[name])
        holder = "policy" if case.share else "value"
        if host.has_scalar_head(holder):
            self.head.copy_(host.weights(holder)[SCALAR_HEAD])

    def gradients(self, case: Case) -> dict[str, dict[str, Tensor]]:
        gradients = {"policy": {n: p.grad for n, p in self.weights(self.policy).items()}}
        if case.ppo.get("advantage", "gae") == "gae":
            gradients.setdefault("value", {n: p.grad for n, p in self.weights(self.value).items()})
            holder = "policy" if case.share else "value"
            gradients[holder] = gradients[holder] | {SCALAR_HEAD: self.head.grad}
            if case.share:
                del gradients["value"]
        return gradients

    def zero_grad(self) -> None:
        for p in (*self.policy.parameters(), *self.value.parameters(), self.head):
            p.grad = None


@dataclass
class Padded:
    """Rows of a prompt and a completion, padded on the right. Everything is (rows, width - 1): the tokens predicted."""

    ids: Tensor
    mask: Tensor  # completion tokens
    real: Tensor  # (rows, width): no padding

    @classmethod
    def of(cls, rows: list[tuple[list[int], list[int]]]) -> "Padded":
        width = max(len(p) + len(c) for p, c in rows)
        fill = lambda rows: torch.tensor([row + [0] * (width - len(row)) for row in rows])  # noqa: E731
        mask = fill([[0] * len(p) + [1] * len(c) for p, c in rows])[:, 1:].bool()
        return cls(fill([p + c for p, c in rows]), mask, fill([[1] * (len(p) + len(c)) for p, c in rows]))

    def distribution(self, model: nn.Module, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of the tokens, entropies, and hidden states."""
        out = model(input_ids=self.ids, attention_mask=self.real, output_hidden_states=True)
        ahead = out.logits.shape[1] - self.ids.shape[1]  # virtual tokens
        logp = (out.logits[:, ahead:-1] / temperature).log_softmax(-1)
        token = logp.gather(2, self.ids[:, 1:, None])[..., 0]
        return token, -(logp.exp() * logp).sum(-1), out.hidden_states[-1][:, ahead:-1]


@dataclass
class Round:
    """What the plain implementation makes of the completions; tensors are (rows, width - 1)."""

    data: Padded
    learnt: Tensor
    raw: Tensor
    earned: Tensor
    old: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    entropy: Tensor
    bias: Tensor


def kl_in_loss(c: PPOConfig) -> bool:
    """Whether the KL is in the loss: as the option says; without it, in the reward of gae only."""
    return c.ppo.kl_in == "loss" or (c.ppo.kl_in is None and c.ppo.advantage != "gae")


@torch.no_grad()
def plain_round(copies: Copies, c: PPOConfig, rows, stopped: list[bool]) -> Round:
    data = Padded.of(rows)
    mask = data.mask
    alone = lambda p, k: copies.reward(input_ids=torch.tensor([p + k]), attention_mask=torch.ones(1, len(p + k)))  # noqa: E731
    raw = torch.cat([alone(p, k).logits[0] for p, k in rows])
    earned = raw.clone()
    if c.rollout.normalise == "running":
        earned = earned / raw.std(correction=0)
    if c.rollout.reward_clip:
        earned = earned.clamp(-c.rollout.reward_clip, c.rollout.reward_clip)
    ended = torch.tensor(stopped)
    if c.rollout.missing_eos == "penalise":
        earned = earned - (~ended).float()
    earned = earned - c.rollout.length_penalty * mask.sum(1)
    if c.rollout.missing_eos == "replace":
        earned[~ended] = c.rollout.eos_score
    learnt = mask & ended[:, None] if c.rollout.missing_eos == "mask" else mask
    old, entropy, _ = data.distribution(copies.policy, c.sampling.temperature)
    reference, _, _ = data.distribution(copies.reference, c.sampling.temperature)
    _, _, hidden = data.distribution(copies.value, 1.0)
    values = (hidden @ copies.head.T)[..., 0] * mask
    bias = torch.zeros(())
    kl = c.ppo.kl * (old - reference) * learnt * (not kl_in_loss(c))
    if c.ppo.advantage == "gae":
        rewards = -kl
        last = mask.long().cumsum(1).argmax(1)
        rewards[torch.arange(len(rows)), last] += earned
        # Its first round shifts the value function so that on average it is right.
        to_come, after = torch.zeros_like(rewards), 0.0
        for t in range(rewards.shape[1] - 1, -1, -1):
            to_come[:, t] = after = (rewards[:, t] + c.ppo.gamma * after) * mask[:, t]
        bias = ((to_come - values) * learnt).sum() / learnt.sum()
        values = (values + bias) * mask
        advantages, after, following = torch.zeros_like(rewards), 0.0, 0.0
        for t in range(rewards.shape[1] - 1, -1, -1):
            delta = rewards[:, t] + c.ppo.gamma * following - values[:, t]
            after = (delta + c.ppo.gamma * c.ppo.gae_lambda * after) * mask[:, t]
            advantages[:, t], following = after, values[:, t]
        returns = advantages + values
        if c.ppo.whiten:
            mean = (advantages * learnt).sum() / learnt.sum()
            variance = ((advantages - mean) ** 2 * learnt).sum() / (learnt.sum() - 1)
            advantages = (advantages - mean) / variance.sqrt()
    else:
        groups = (earned - kl.sum(1)).view(-1, c.rollout.samples)
        if c.ppo.advantage == "group":
            lead = groups - groups.mean(1, keepdim=True)
            lead = lead / (groups.std(1, keepdim=True) + 1e-4) if c.ppo.group_std else lead
        else:
            lead = groups - (groups.sum(1, keepdim=True) - groups) / (c.rollout.samples - 1)
        advantages, returns = lead.view(-1, 1) * mask, torch.zeros_like(old)
    return Round(data, learnt, raw, earned, old, reference, values, advantages, returns, entropy, bias)


def plain_loss(copies: Copies, c: PPOConfig, r: Round, chosen: list[int], ptx: list[Example]) -> dict[str, Tensor]:
    """The loss of these rows and its parts."""
    rows = torch.tensor(chosen)
    data = Padded(r.data.ids[rows], r.data.mask[rows], r.data.real[rows])
    learnt = r.learnt[rows]
    token_mean = lambda x: (x * learnt).sum() / learnt.sum()  # noqa: E731
    mean = {
        "token": token_mean,
        "sequence": lambda x: ((x * learnt).sum(1)[learnt.any(1)] / learnt.sum(1)[learnt.any(1)]).mean(),
        "constant": lambda x: (x * learnt).sum() / (learnt.any(1).sum() * c.sampling.max_new_tokens),
    }[c.ppo.loss_mean]
    logp, entropy, hidden = data.distribution(copies.policy, c.sampling.temperature)
    old, a = r.old[rows], r.advantages[rows]
    token_ratio = ratio = (logp - old).exp()
    if c.ppo.ratio == "sequence":
        size = learnt.sum(1).clamp(min=1)
        whole = (((logp - old) * learnt).sum(1) / size).exp()[:, None]
        # Advantages may differ between the tokens, so each token has the gradient of its own log-prob.
        ratio = whole.detach() * token_ratio / token_ratio.detach()
        if c.ppo.advantage == "group":  # else with one advantage a completion: GSPO as in its section 4.1
            ratio = whole.expand_as(token_ratio)
    high = c.ppo.clip if c.ppo.clip_high is None else c.ppo.clip_high
    held = torch.max(-a * ratio, -a * torch.min(torch.max(ratio, torch.tensor(1 - c.ppo.clip)), torch.tensor(1 + high)))
    if c.ppo.dual_clip:
        held = torch.where(a < 0, torch.min(held, -c.ppo.dual_clip * a), held)
    parts = {"policy_loss": mean(held)}
    loss = parts["policy_loss"]
    if c.ppo.advantage == "gae":
        if copies.value is not copies.policy:
            _, _, hidden = data.distribution(copies.value, 1.0)
        value, before, target = (hidden @ copies.head.T)[..., 0] + r.bias, r.values[rows], r.returns[rows]
        error = (value - target) ** 2
        if c.ppo.value_clip:
            near = torch.min(torch.max(value, before - c.ppo.value_clip), before + c.ppo.value_clip)
            parts["value_clipfrac"] = token_mean(((near - target) ** 2 > error).float())
            error = torch.max(error, (near - target) ** 2)
        parts.setdefault("value_clipfrac", torch.zeros(()))
        parts["value_loss"] = 0.5 * mean(error)
        loss = loss + c.ppo.value_coef * parts["value_loss"]
    if kl_in_loss(c):
        away = r.reference[rows] - logp
        loss = loss + c.ppo.kl * mean(away.exp() - away - 1)
    loss = loss - c.ppo.entropy * mean(entropy)
    if ptx:
        text = Padded.of([(e.prompt, e.completions[0]) for e in ptx])
        taught = torch.zeros_like(text.mask, dtype=torch.float32)
        for i, e in enumerate(ptx):
            taught[i, len(e.prompt) - 1 : len(e.prompt) - 1 + len(e.completions[0])] = torch.tensor(
                e.token_weights[0] if e.token_weights else e.masks[0]
            )
        logps, _, _ = text.distribution(copies.policy, 1.0)
        parts["ptx_loss"] = -(logps * taught).sum() / taught.sum()
        loss = loss + c.ppo.ptx_coef * parts["ptx_loss"]
    parts["approx_kl"] = token_mean((token_ratio - 1 - token_ratio.log()).detach())
    parts["clipfrac"] = token_mean(((ratio > 1 + high) | (ratio < 1 - c.ppo.clip)).float())
    parts["ratio_max"] = ratio[learnt].max()
    return parts | {"loss": loss}


def plain_metrics(r: Round, c: PPOConfig, stopped: list[bool]) -> dict[str, float]:
    """Metrics of the round."""
    ended = sum(stopped) / len(stopped)
    learnt_rows = r.learnt.any(1)
    metrics = {
        "reward": r.raw.mean(),
        "reward_earned": r.earned.mean(),
        "reward_std": r.raw.std(),
        "group_std": r.earned.view(-1, c.rollout.samples).std(1).mean(),
        "zero_std_share": (r.earned.view(-1, c.rollout.samples).std(1) == 0).float().mean(),
        "kl": ((r.old - r.reference) * r.learnt).sum(1)[learnt_rows].mean(),
        "entropy": r.entropy[r.learnt].mean(),
        "length": r.data.mask.sum(1).float().mean(),
        "kl_coef": c.ppo.kl,
        "eos_share": ended,
        "truncated_share": 1 - ended,
    }
    if c.ppo.advantage == "gae":
        left = (r.returns - r.values)[r.learnt].var() / r.returns[r.learnt].var()
        metrics["explained_variance"] = 1 - left
    return {name: float(value) for name, value in metrics.items()}


# -- ours -------------------------------------------------------------------------------------------------------------


def ours(folder: Path, case: Case, saved: Path) -> tuple[Host, PPO, Tensor]:
    """Four roles on one host, an SFT adapter under three of them; saved so that stock peft has them too."""
    # Exact: the rounding of fused layers, as large as that of stock ones, is 1.6e-5 of a reward and 4e-6 of a policy loss here.
    host = Host(Base.load(folder, quantization="none", dtype="float32", device="cpu", exact=True, quiet=True))
    host.base.eos_ids = ENDS
    torch.manual_seed(0)
    gae = case.ppo.get("advantage", "gae") == "gae"
    kinds = {"init": "lora", "policy": case.policy, "reward": "lora", "value": case.value}
    for name, kind in kinds.items():
        host.add(name, peft_config(AdapterConfig(kind=kind, r=4, virtual_tokens=3)))
        with torch.no_grad():
            for p in host.parameters(name):
                p.add_(torch.randn_like(p) * 0.05)
        if name == "reward":
            host.add_scalar_head(name)
            with torch.no_grad():
                host.scalar_head(name).mul_(8.0)
        host.save(name, saved / name)
    holder = "policy" if case.share else "value"
    head = torch.randn(1, host.base.model.config.hidden_size) * 0.1
    if gae:
        host.add_scalar_head(holder)
        with torch.no_grad():
            host.scalar_head(holder).copy_(head)
    policy = ("init", "policy")
    value = (policy if case.share else ("init", "value")) if gae else None
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(60, 380, (n,), generator=generator).tolist() for n in (3, 9, 5, 12, 4)]

    def score(numbers, completions):
        examples = [Example(prompts[i], group) for i, group in zip(numbers, completions, strict=True)]
        return score_examples(host, ("reward",), examples)

    return host, PPO(host, Roles(policy, ("init",), value), prompts, score, config(case), PTX if case.ptx else ()), head


@pytest.mark.parametrize("name", CASES)
def test_an_update_is_that_of_four_padded_models(folder, name, tmp_path):
    case, c = CASES[name], config(CASES[name])
    host, method, head = ours(folder, case, tmp_path)
    copies = Copies(folder, tmp_path, case, head)
    host.train_only(*method.lr_multipliers)
    host.training("on")
    flats = {adapter: host.flat(adapter) for adapter in method.lr_multipliers}
    micro_batches = MicroBatches(method, flats, case.budget, StopSignals())
    round_ = rows = stopped = None
    for step in range(4):
        batch = method.batch(step)
        sums = {k: float(v) for k, v in micro_batches.gradients(batch, seed=step).items()}
        if round_ is None:
            rows = [(r.prompt, list(k)) for r in method.rollouts for k in r.completions]
            stopped = [k[-1] in ENDS for _, k in rows]
            assert 2 <= sum(stopped) < len(rows) == 12
            round_ = plain_round(copies, c, rows, stopped)
            compare_rounds(method, round_, stopped, c)
        where = {id(r): i for i, r in enumerate(method.rollouts)}
        mine = [e for e in batch if id(e) in where]
        chosen = [3 * where[id(r)] + j for r in mine for j in range(3)]
        ptx = [e for e in batch if id(e) not in where]
        assert len(mine) == 2 and len(ptx) == (2 if case.ptx else 0)
        copies.zero_grad()
        want = plain_loss(copies, c, round_, chosen, ptx)
        want["loss"].backward()
        metrics = plain_metrics(round_, c, stopped)
        clipped = want.get("value_clipfrac") if c.ppo.value_clip else None
        rounding = {name: sums.pop(name) for name in ("sampler_difference", "sampler_difference_max")}
        assert 0 <= rounding["sampler_difference"] <= rounding["sampler_difference_max"] <= 1e-4  # 3e-6 seen
        assert {name for name in sums if not name.endswith("_per_second")} == want.keys() | metrics.keys()
        for key, value in ({k: v.item() for k, v in want.items()} | metrics).items():
            assert sums[key] == pytest.approx(value, rel=1e-5, abs=2e-6), key
        for adapter, plain in copies.gradients(case).items():
            got = flats[adapter].gradients()
            assert got.keys() == plain.keys()
            whole = lambda tensors, keys=plain: torch.cat([tensors[k].flatten() for k in keys])  # noqa: E731
            assert relative(whole(got), whole(plain)) <= 1e-4  # 5.8e-6 seen
        if step == 0:
            assert sums["approx_kl"] == sums["clipfrac"] == 0 and sums["ratio_max"] == 1  # the very policy that sampled
        if step == 3:
            assert 0.05 < sums["clipfrac"] < 0.95 and sums["ratio_max"] > 1
            assert clipped is None or 0 < clipped < 1
        generator = torch.Generator().manual_seed(step)
        for flat in flats.values():  # in place of an optimizer: every weight elsewhere
            with torch.no_grad():
                for tensor in flat.tensors().values():
                    tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.15 * tensor.std())
            flat.sync_working_copy()
        copies.follow(host, case)
    assert method.round == 0


def compare_rounds(method: PPO, round_: Round, stopped: list[bool], c: PPOConfig) -> None:
    """Rewards of the completions, and every signal of the tokens that are learned from."""
    rollouts = method.rollouts
    assert [s for r in rollouts for s in r.stopped] == stopped
    earned = torch.tensor([x for r in rollouts for x in r.rewards])
    torch.testing.assert_close(earned, round_.earned, rtol=1e-5, atol=1e-5)
    assert earned.std() > 0.1
    names = {"old": round_.old, "reference_logps": round_.reference, "advantages": round_.advantages}
    if c.ppo.advantage == "gae":
        names |= {"values": round_.values, "returns": round_.returns}
    for name, padded in names.items():
        tokens = [x for r in rollouts for x in getattr(r, name)]
        for i, got in enumerate(tokens):
            if round_.learnt[i].any():
                want = padded[i][round_.data.mask[i]]
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
