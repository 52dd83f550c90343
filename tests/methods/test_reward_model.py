"""The reward model: packed against separate rows, the loss against a plain computation, and its folder in stock peft."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForSequenceClassification

from lowalign import Base, Example, Host
from lowalign.config.sections import TrainConfig
from lowalign.config.training import RewardLossConfig
from lowalign.data.micro_batches import micro_batches
from lowalign.errors import UserError
from lowalign.methods.pairs import all_pairs, compare, count
from lowalign.methods.reward_model import RewardModel, reward_metrics, scored
from tests.methods.made import apart, gradient, host_with, rankings, relative
from tests.tiny import tiny_folder

KINDS = ["lora", "prompt", "prefix"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama")


def method_on(host, examples, ties=False, **options) -> RewardModel:
    return RewardModel(
        host, examples, ("policy",), RewardLossConfig(**options), TrainConfig(batch_size=len(examples)), ties
    )


def rows_loss(host, examples) -> torch.Tensor:
    """All pairs of each ranking by a loop over separate rows: the mean of the means."""
    total = 0.0
    for e in examples:
        with host.use("policy"):
            r = torch.cat([s for row in apart(e) for s in host.scores([row], "policy")])
        each = [
            -F.logsigmoid(r[i] - r[j] - e.margin) for i in range(len(r)) for j in range(len(r)) if e.rank[i] < e.rank[j]
        ]
        total = total + e.weight * torch.stack(each).mean()
    return total / sum(e.weight for e in examples)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_separate_rows(folder, kind):
    host, examples = host_with(folder, kind, head=True), rankings()
    examples[1].margin, examples[2].weight = 0.7, 2.0
    want = rows_loss(host, examples)
    want.backward()
    want_gradient = gradient(host)
    host.training("on")
    method = method_on(host, examples)
    normalizers = method.normalizers(examples)
    for budget in (10_000, 40):  # however the step is cut
        parts = [method.loss(group, normalizers) for group in micro_batches(examples, budget)]
        sum(loss for loss, _ in parts).backward()
        assert abs(sum(loss for loss, _ in parts) - want) <= 1e-5 * want
        assert relative(gradient(host), want_gradient) <= 5e-5  # 3.2e-6 seen
    host.training(None)


def test_plackett_luce_and_centring_reach_the_loss(folder):
    host, examples = host_with(folder, head=True), rankings((3, 2))
    with torch.no_grad(), host.use("policy"):
        r = host.scores(examples, "policy")
    best_first = [s[torch.tensor(e.rank).argsort()] for s, e in zip(r, examples, strict=True)]
    bits = (math.log2(6), 1.0)  # that the orders of three and two tell
    want = sum((s.flip(0).logcumsumexp(0).flip(0) - s).sum() / b for s, b in zip(best_first, bits, strict=True)) / 2
    loss, _ = method_on(host, examples, loss="plackett-luce").loss(
        examples, {"rankings": 2, "pairs": 4, "completions": 5}
    )
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    three, two = best_first
    squares = [(three[i] + three[j]) ** 2 / 3 for i, j in ((0, 1), (0, 2), (1, 2))] + [(two[0] + two[1]) ** 2]
    plain, centred = (
        method_on(host, examples, centring=c).loss(examples, {"rankings": 2, "pairs": 4, "completions": 5})[0]
        for c in (0.0, 0.3)
    )
    assert (centred - plain).item() == pytest.approx(0.3 * sum(squares).item() / 2, rel=1e-4)


def test_plackett_luce_weighs_the_examples(folder):
    """The loss of two rankings with weights 3 and ½ is (3 a + ½ b) / 3.5, of the losses that each has alone."""
    host, examples = host_with(folder, head=True), rankings((3, 2))
    method = method_on(host, examples, loss="plackett-luce")
    a, b = (method.loss([e], method.normalizers([e]))[0].item() for e in examples)
    examples[0].weight, examples[1].weight = 3.0, 0.5
    loss, _ = method.loss(examples, method.normalizers(examples))
    assert abs(a - b) > 0.01
    assert loss.item() == pytest.approx((3 * a + 0.5 * b) / 3.5, rel=1e-5)


def test_plackett_luce_does_not_ignore_margins(folder):
    host, examples = host_with(folder, head=True), rankings((2, 2))
    examples[0].margin = 1.5
    normalizers = {"rankings": 2, "pairs": 2, "completions": 4}
    want, _ = method_on(host, examples).loss(examples, normalizers)
    loss, _ = method_on(host, examples, loss="plackett-luce").loss(examples, normalizers)
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)  # of two it is Bradley-Terry


def test_the_heads_spread_is_that_of_the_reference(folder):
    """N(0, 1/(hidden + 1)) of arXiv 2009.01325: a standard deviation of 1/sqrt(hidden + 1), not 1/(hidden + 1)."""
    host = host_with(folder)
    torch.manual_seed(0)
    heads = []
    for _ in range(200):
        host.add_scalar_head("policy")
        heads.append(host.scalar_head("policy").detach().clone())
    assert torch.cat(heads).std().item() == pytest.approx(1 / math.sqrt(65), rel=0.03)  # of 12,800 numbers


def test_metrics_are_those_of_the_pairs(folder):
    host, examples = host_with(folder, head=True), rankings((3, 2))
    method = method_on(host, examples)
    with torch.no_grad(), host.use("policy"):
        r = host.scores(examples, "policy")
    lead = [float(s[i] - s[j]) for s, e in zip(r, examples, strict=True) for i, j in compare(e.rank)[0]]
    _, metrics = method.loss(examples, method.normalizers(examples))
    assert len(lead) == 4
    assert metrics["rewards/accuracies"] == pytest.approx(sum(d > 0 for d in lead) / 4)
    assert metrics["rewards/margins"] == pytest.approx(sum(lead) / 4, rel=1e-5)
    assert sum(d > 0 for d in lead) != 2  # inverted it would be another number
    assert metrics["rewards/mean"].item() == pytest.approx(torch.cat(r).mean().item(), rel=1e-5)  # of 5 completions


def test_pairs_of_a_ranking_with_ties():
    ranked, tied = compare([1, 0, 1])
    assert sorted(ranked) == [(1, 0), (1, 2)] and tied == [(0, 2)]
    e = Example([1], [[2], [3], [4]], rank=[1, 0, 1], weight=6.0, margin=0.5)
    pairs = all_pairs([Example([1], [[2], [3]], rank=[0, 1]), e], torch.device("cpu"), ties=True)
    assert pairs.better.tolist() == [0, 3, 3] and pairs.worse.tolist() == [1, 2, 4]  # counted over both Examples
    assert pairs.weight.tolist() == [1, 2, 2] and pairs.margin.tolist() == [0, 0.5, 0.5]
    assert (pairs.tied_a.tolist(), pairs.tied_b.tolist(), pairs.tied_weight.tolist()) == ([2], [4], [2.0])
    assert all_pairs([e], torch.device("cpu")).weight.tolist() == [3, 3]
    assert count([e], ties=True) == {"rankings": 6.0, "pairs": 2}


def test_a_tie_draws_scores_together(folder):
    host = host_with(folder, head=True, noise=0.5)
    example = Example([5, 6], [[7, 8], [9, 10, 11]], rank=[0, 0])
    with host.use("policy"):
        a, b = host.scores([example], "policy")[0].detach()
    loss, _ = method_on(host, [example], ties=True).loss([example], {"rankings": 1.0, "pairs": 1, "completions": 2})
    assert loss.item() == pytest.approx(-0.5 * (F.logsigmoid(a - b) + F.logsigmoid(b - a)).item(), rel=1e-6)


def test_a_tie_in_a_ranking_counts_as_each_of_its_pairs(folder):
    """Of three pairs one is tied: the mean of the three, whatever the weight of the only ranking."""
    host = host_with(folder, head=True, noise=0.5)
    example = Example([5, 6], [[7, 8], [9, 10, 11], [12]], rank=[0, 1, 1], weight=6.0)
    with host.use("policy"):
        a, b, c = host.scores([example], "policy")[0].detach()
    method = method_on(host, [example], ties=True)
    loss, _ = method.loss([example], method.normalizers([example]))
    tie = -0.5 * (F.logsigmoid(b - c) + F.logsigmoid(c - b))
    want = (-F.logsigmoid(a - b) - F.logsigmoid(a - c) + tie) / 3
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_completions_are_cut_behind_their_last_supervised_token():
    e = Example([1], [[2, 3, 4], [5, 6]], [[True, True, False], [False, True]], [0, 1])
    assert scored(e).completions == [[2, 3], [5, 6]]


def test_quality_by_hand():
    examples = [Example([1], [[2], [3]], rank=[0, 1]), Example([1], [[2], [3]], rank=[1, 0])]
    metrics = reward_metrics([torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])], examples)
    # leads 2 and -1: one of two is right; confidences σ(2) = .8808 and σ(1) = .7311 fall into two bins
    assert metrics["accuracy"] == 0.5 and metrics["mean"] == 0.75
    assert metrics["std"] == pytest.approx((((2 - 0.75) ** 2 + (1 - 0.75) ** 2 + 2 * 0.75**2) / 4) ** 0.5)
    assert metrics["calibration_error"] == pytest.approx((abs(0.88080 - 1) + abs(0.73106 - 0)) / 2, abs=1e-5)


ROWS = [[5, 6, 7, 8, 9], [10, 11, 12]]


def our_scores(host, adapter="policy") -> torch.Tensor:
    with torch.no_grad(), host.use(adapter):
        return torch.cat(host.scores([Example(r[:2], [r[2:]]) for r in ROWS], adapter))


@torch.no_grad()
def stock_scores(model) -> torch.Tensor:
    row = lambda ids: model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]  # noqa: E731
    return torch.cat([row(ids) for ids in ROWS])


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_gives_the_same_scores(folder, kind, tmp_path):
    host = host_with(folder, kind, head=True)
    host.save("policy", tmp_path / "reward")
    config_file = tmp_path / "reward" / "adapter_config.json"  # names the base as the Hub would know it
    config_file.write_text(
        config_file.read_text().replace(json.dumps(host.base.identity.name), json.dumps(str(folder)))
    )
    stock = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1).eval()
    torch.testing.assert_close(our_scores(host), stock_scores(stock), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_gives_the_same_scores_on_four_bits(folder, kind, tmp_path):
    host = host_with(folder, kind, head=True)
    host.save("policy", tmp_path / "reward")
    base = Base.load(folder, dtype="bfloat16", device="cpu", exact=True, quiet=True)
    ours = Host(base)
    ours.load("policy", tmp_path / "reward")
    scores = our_scores(ours)
    ours.delete("policy")
    stock = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    stock.model = Base.load(
        folder, dtype="bfloat16", device="cpu", exact=True, quiet=True
    ).model.model  # the same four bits
    stock.is_loaded_in_4bit = True  # peft adds a LoRA to 4-bit layers in another order of rounding
    stock.score.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))  # the head stays in fp32
    stock = PeftModel.from_pretrained(stock, tmp_path / "reward").eval()
    for name, p in stock.named_parameters():
        if "lora_" in name:  # a LoRA computes in the base's dtype
            p.data = p.data.bfloat16()
    torch.testing.assert_close(scores, stock_scores(stock), rtol=1e-5, atol=1e-6)


STOCK = {
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_folder_scores_the_same_here(folder, kind, tmp_path):
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    stock = get_peft_model(model, STOCK[kind]).eval()
    stock.save_pretrained(tmp_path / "stock")
    host = Host(Base.load(folder, quantization="none", dtype="float32", device="cpu", quiet=True))
    host.load("theirs", tmp_path / "stock")
    torch.testing.assert_close(our_scores(host, "theirs"), stock_scores(stock), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_rows_fall_back_to_the_same_scores(kind, tmp_path):
    host = host_with(tiny_folder(tmp_path / kind, kind), "prefix", head=True)
    packed = our_scores(host)
    host.base.packed = False
    torch.testing.assert_close(our_scores(host), packed, rtol=1e-5, atol=1e-6)


def test_without_a_head_there_is_no_score(folder):
    host = host_with(folder)
    with (
        host.use("policy"),
        pytest.raises(UserError, match='adapter "policy" has no scalar head; give one that `lowalign reward`'),
    ):
        host.scores(rankings((2,)), "policy")


def test_the_head_is_trained_in_fp32_and_deleted_with_its_adapter(folder):
    host = Host(Base.load(folder, dtype="bfloat16", device="cpu", quiet=True))
    host.add("policy", LoraConfig(r=2, target_modules="all-linear"))
    host.add_scalar_head("policy")
    flat = host.flat("policy")
    before = host.weights("policy")["score.weight"].clone()
    flat.master.data += 1e-7  # bf16 would not see it
    flat.sync_working_copy()
    assert host.scalar_head("policy").dtype == torch.float32
    assert torch.equal(host.scalar_head("policy"), before + 1e-7) and not torch.equal(before + 1e-7, before)
    host.delete("policy")
    assert not host.has_scalar_head("policy")
