"""DPO and its kin: packed against separate rows with a plain loss, for pairs and rankings and every kind of adapter."""

import math
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F

from lowalign import Example
from lowalign.config.sections import TrainConfig
from lowalign.config.training import DPOLossConfig
from lowalign.data.micro_batches import micro_batches
from lowalign.errors import UserError
from lowalign.methods.dpo import DPO
from lowalign.methods.kto import KTO, labels, mismatched
from lowalign.methods.losses import PAIR_LOSSES
from tests.methods.made import apart, gradient, host_with, rankings, relative
from tests.tiny import tiny_folder

KINDS = ["lora", "prompt", "prefix"]
LOSSES = {
    "sigmoid": {},
    "cdpo": {"loss": "sigmoid", "label_smoothing": 0.1},
    "robust": {"loss": "sigmoid", "label_smoothing": 0.1, "robust": True},
    "hinge": {"loss": "hinge"},
    "ipo": {"loss": "ipo"},
    "simpo": {"loss": "simpo", "beta": 2.0},
    "orpo": {"loss": "orpo"},
    "rpo": {"loss": "sigmoid", "sft": 0.7},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama")


def row_logps(host, stack, e) -> list[torch.Tensor]:
    """For each completion, its supervised tokens' log-probs by the model's own logits, a row at a time."""
    logps_by_completion = []
    for i, row in enumerate(apart(e)):
        with host.use(*stack):
            (logps,) = host.logprobs([row])[0]
        logps_by_completion.append(logps[torch.tensor(e.mask(i))])
    return logps_by_completion


def plain_pair(name: str, c: DPOLossConfig, w, l, ref_w, ref_l):  # noqa: E741
    """The loss of one pair, from the log-probs of its tokens."""
    h = (w.sum() - ref_w.sum()) - (l.sum() - ref_l.sum())
    up, down = -F.logsigmoid(c.beta * h), -F.logsigmoid(-c.beta * h)
    odds = lambda t: t.mean() - torch.log(1 - t.mean().exp())  # noqa: E731
    match name:
        case "sigmoid" | "rpo":
            return up
        case "cdpo":
            return 0.9 * up + 0.1 * down
        case "robust":
            return (0.9 * up - 0.1 * down) / 0.8
        case "hinge":
            return torch.clamp(1 - c.beta * h, min=0)
        case "ipo":
            return ((w.mean() - ref_w.mean()) - (l.mean() - ref_l.mean()) - 1 / (2 * c.beta)) ** 2
        case "simpo":
            return -F.logsigmoid(c.beta * (w.mean() - l.mean()) - c.gamma)
        case "orpo":
            return -c.beta * F.logsigmoid(odds(w) - odds(l))


def plain_loss(host, name, config, examples) -> torch.Tensor:
    total = 0.0
    for e in examples:
        pi = row_logps(host, ("policy",), e)
        with torch.no_grad():
            ref = row_logps(host, (), e)
        k = range(len(pi))
        each = [plain_pair(name, config, pi[i], pi[j], ref[i], ref[j]) for i in k for j in k if e.rank[i] < e.rank[j]]
        best = [i for i in k if e.rank[i] == min(e.rank)]
        nll = -sum(pi[i].mean() for i in best) / len(best)
        total = total + e.weight * (torch.stack(each).mean() + {"rpo": 0.7, "orpo": 1.0}.get(name, 0.0) * nll)
    return total / sum(e.weight for e in examples)


def test_the_rows_are_the_models_own(folder):
    """The yardstick of these tests, against full logits without any of our kernels."""
    host, (e,) = host_with(folder), rankings((2,))
    with host.use("policy"), torch.no_grad():
        logits = host.base.model(torch.tensor([e.prompt + e.completions[0]])).logits[0].log_softmax(-1)
        n = len(e.completions[0])
        want = logits[-n - 1 : -1].gather(1, torch.tensor(e.completions[0])[:, None])[:, 0]
        torch.testing.assert_close(row_logps(host, ("policy",), e)[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"), [(n, "lora") for n in LOSSES] + [("sigmoid", "prompt"), ("sigmoid", "prefix")]
)
def test_packed_equals_separate_rows(folder, name, kind):
    config = DPOLossConfig(**({"loss": "sigmoid"} | LOSSES[name]))
    host, examples = host_with(folder, kind, noise=0.05), rankings((2, 4, 2), masked=True)
    examples[0].weight, examples[1].weight, examples[1].rank = 0.5, 3.0, [1, 0, 0, 2]  # two are the best
    want = plain_loss(host, name, config, examples)
    want.backward()
    want_gradient = gradient(host)
    host.training("on")
    method = DPO(host, examples, ("policy",), (), config, TrainConfig(batch_size=len(examples)))
    normalizers = method.normalizers(examples)
    for budget in (10_000, 60):  # however the step is cut
        parts = [method.loss(group, normalizers)[0] for group in micro_batches(examples, budget)]
        sum(parts).backward()
        assert abs(sum(parts) - want) <= 1e-5 * abs(want)
        assert relative(gradient(host), want_gradient) <= 5e-5  # 1.4e-6 seen
    host.training(None)


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_metrics_are_those_of_the_pairs(folder, loss):
    """Means over all pairs, whatever their weight; a reward is β log π/π_ref, without a reference β log π a token."""
    host, examples = host_with(folder), rankings((2, 3), masked=True)
    examples[0].weight, beta = 4.0, 0.3
    method = DPO(host, examples, ("policy",), (), DPOLossConfig(loss=loss, beta=beta), TrainConfig(batch_size=2))
    pairs = []
    with torch.no_grad():
        _, metrics = method.loss(examples, method.normalizers(examples))
        for e in examples:
            pi, ref = (row_logps(host, stack, e) for stack in (("policy",), ()))
            logp = [float(p.sum()) for p in pi]
            reward = [
                beta * float(p.mean() if loss == "simpo" else (p - r).sum()) for p, r in zip(pi, ref, strict=True)
            ]
            k = range(len(pi))
            pairs += [(logp[i], logp[j], reward[i], reward[j]) for i in k for j in k if e.rank[i] < e.rank[j]]
    chosen, rejected, up, down = (torch.tensor(column).double() for column in zip(*pairs, strict=True))
    want = {
        "logps/chosen": chosen.mean(), "logps/rejected": rejected.mean(), "rewards/chosen": up.mean(),
        "rewards/rejected": down.mean(), "rewards/margins": (up - down).mean(),
        "rewards/accuracies": (up > down).double().mean(),
    }  # fmt: skip
    assert len(pairs) == 4 and float(want["rewards/accuracies"]) != 0.5  # inverted it would be another number
    assert {name: float(metrics[name]) for name in want} == pytest.approx(
        {name: float(value) for name, value in want.items()}, rel=1e-4, abs=1e-5
    )


def test_every_name_of_the_option_has_a_loss():
    assert set(get_args(get_type_hints(DPOLossConfig)["loss"])) == {*PAIR_LOSSES, "kto"}


def test_known_reference_values_are_used(folder):
    host, examples = host_with(folder), rankings((2, 2))
    method = DPO(host, examples, ("policy",), (), DPOLossConfig(), TrainConfig(batch_size=2))
    computed, _ = method.loss(examples, method.normalizers(examples))
    with torch.no_grad():
        for e in examples:
            e.reference = [t.sum().item() for t in row_logps(host, (), e)]
    known, _ = method.loss(examples, method.normalizers(examples))
    torch.testing.assert_close(known, computed, rtol=1e-5, atol=1e-6)
    for e in examples:
        e.reference = [x + 3.0 * (r == 0) for x, r in zip(e.reference, e.rank, strict=True)]
    moved, metrics = method.loss(examples, method.normalizers(examples))
    assert moved > known and metrics["rewards/chosen"] < 0


@pytest.mark.parametrize("options", [{"sft": 0.7}, {"loss": "orpo"}])
def test_ties_do_not_add_to_the_sft_term(folder, options):
    """An Example in which all tie has no chosen completion, and the loss is not divided by it either."""
    host, examples = host_with(folder), rankings((2, 3))
    tie = Example([5, 6], [[7, 8], [9, 10, 11]], rank=[0, 0])
    method = DPO(host, examples, ("policy",), (), DPOLossConfig(**options), TrainConfig(batch_size=2))
    without, _ = method.loss(examples, method.normalizers(examples))
    with_tie, metrics = method.loss([*examples, tie], method.normalizers([*examples, tie]))
    assert with_tie.item() == pytest.approx(without.item(), rel=1e-5)
    assert metrics["nll"] > 0


def test_a_fresh_lora_begins_at_ln_2(folder):
    host, examples = host_with(folder, noise=0.0), rankings((2, 2, 4))
    method = DPO(host, examples, ("policy",), (), DPOLossConfig(), TrainConfig(batch_size=3))
    loss, metrics = method.loss(examples, method.normalizers(examples))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["rewards/margins"] == metrics["rewards/chosen"] == 0  # the very same forward: no rounding either


def test_the_reference_may_be_another_adapter(folder):
    host, examples = host_with(folder), rankings((2,))
    against_base = DPO(host, examples, ("policy",), (), DPOLossConfig(), TrainConfig(batch_size=1))
    against_itself = DPO(host, examples, ("policy",), ("policy",), DPOLossConfig(), TrainConfig(batch_size=1))
    assert against_itself.loss(examples, {"rankings": 1, "pairs": 1})[0].item() == pytest.approx(math.log(2), rel=1e-6)
    assert abs(against_base.loss(examples, {"rankings": 1, "pairs": 1})[0].item() - math.log(2)) > 1e-3


def thumbs() -> list[Example]:
    examples = [Example(e.prompt, [e.completions[0]], label=bool(i % 2)) for i, e in enumerate(rankings((2, 2, 2, 2)))]
    return [*examples, *rankings((2,), seed=9)]  # a pair counts as a thumb up and one down


@pytest.mark.parametrize("kind", KINDS)
def test_kto(folder, kind):
    host, examples = host_with(folder, kind, noise=0.05), thumbs()
    examples[0].weight, examples[4].weight = 2.0, 0.25
    examples = [examples[i] for i in (0, 2, 4, 1, 3)]  # in an order whose z0 is not held at 0
    config = DPOLossConfig(loss="kto", beta=0.5, desirable=1.5, undesirable=0.5)
    ratio = lambda e, i: row_logps(host, ("policy",), e)[i].sum() - row_logps(host, (), e)[i].sum().detach()  # noqa: E731
    with torch.no_grad():
        others = [
            Example(a.prompt, [answer])
            for a, b in zip(examples, examples[1:] + examples[:1], strict=True)
            for answer in b.completions
        ]
        z0 = max(0.0, sum(ratio(e, 0) for e in others).item() / 6)
    assert z0 > 0.1
    total, rewards = 0.0, {True: [], False: []}
    for e in examples:
        for i in range(len(e.completions)):
            up = e.label if e.rank is None else e.rank[i] == 0
            lead = 0.5 * (ratio(e, i) - z0)
            rewards[up].append(lead.item() + 0.5 * z0)
            total = total + e.weight * (1.5 * (1 - torch.sigmoid(lead)) if up else 0.5 * (1 - torch.sigmoid(-lead)))
    want = total / (2.0 + 3 + 2 * 0.25)
    want.backward()
    want_gradient = gradient(host)
    rows = [*examples, Example([5] * 40, [[6] * 40], label=True)]  # one that is longer than any mismatch
    method = KTO(host, rows, ("policy",), (), config, TrainConfig(batch_size=len(examples), token_budget=40))
    host.training("on")
    normalizers = method.normalizers(examples)
    assert normalizers["z0"] == pytest.approx(z0, rel=1e-4, abs=1e-6)
    parts = [method.loss(group, normalizers) for group in micro_batches(examples, 40)]
    assert len(parts) > 1
    sum(loss for loss, _ in parts).backward()
    host.training(None)
    assert abs(sum(loss for loss, _ in parts) - want) <= 1e-5 * want
    assert relative(gradient(host), want_gradient) <= 1e-5
    assert sum(float(m["kl"]) for _, m in parts) == pytest.approx(z0, rel=1e-4, abs=1e-6)
    for name, up in (("chosen", True), ("rejected", False)):  # β log π/π_ref
        mean = sum(rewards[up]) / len(rewards[up])
        assert sum(float(m[f"rewards/{name}"]) for _, m in parts) == pytest.approx(mean, rel=1e-4, abs=1e-5)


def test_kto_labels_and_mismatches():
    assert labels(thumbs())[:4] == [False, True, False, True]
    pair = rankings((2,), seed=9)[0]
    assert labels([pair]) == [rank == 0 for rank in pair.rank]
    a, b = thumbs()[0], pair  # both completions of the pair count, not only its chosen one
    assert [(m.prompt, m.completions) for m in mismatched([a, b], 100)] == [
        (a.prompt, b.completions),
        (b.prompt, a.completions),
    ]


def test_kto_of_a_prompt_with_a_long_answer_of_another_fits_the_base(tmp_path):
    """Each row has 40 tokens, all that a gpt2 of 40 positions has; the long prompt with the long answer would have 70."""
    host = host_with(tiny_folder(tmp_path / "gpt2", "gpt2", n_positions=40))
    long_prompt = Example(list(range(60, 95)), [list(range(100, 105))], label=True)
    long_answer = Example([50, 51, 52, 53, 54], [list(range(200, 235))], label=False)
    method = KTO(
        host, [long_prompt, long_answer], ("policy",), (), DPOLossConfig(loss="kto"), TrainConfig(batch_size=2)
    )
    assert math.isfinite(method.normalizers([long_prompt, long_answer])["z0"])
    first, second = mismatched([long_prompt, long_answer], 40)
    assert (first.prompt, first.completions) == ([60, 91, 92, 93, 94], long_answer.completions)
    assert (second.prompt, second.completions) == (long_answer.prompt, long_prompt.completions)
    without_prompt = Example([], [list(range(40))], label=True)
    assert mismatched([without_prompt, long_prompt], 40)[1].prompt == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": "ipo", "label_smoothing": 0.1},
            "--dpo.label-smoothing and --dpo.robust belong to --dpo.loss sigmoid, not ipo",
        ),
        ({"loss": "kto", "sft": 1.0}, "--dpo.sft needs pairs, which --dpo.loss kto does without"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UserError) as error:
        DPOLossConfig(**options)
    assert str(error.value) == message
