"""SFT's loss and gradients against a plain full-logits computation in fp32, whatever the micro-batch."""

import pytest
import torch
import torch.nn.functional as F

from lowalign import Base, Example, Host
from lowalign.config.sections import AdapterConfig, TrainConfig
from lowalign.data.micro_batches import micro_batches
from lowalign.methods.sft import SFT
from lowalign.model.adapters.kinds import peft_config
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama")


def rows() -> list[Example]:
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(4, 300, (n,), generator=g).tolist()  # noqa: E731
    examples = [Example(draw(int(p)), [draw(int(c))]) for p, c in torch.randint(1, 20, (7, 2), generator=g)]
    examples.append(Example(draw(6), [draw(8)], masks=[[True, True, False, False, False, True, True, False]]))
    return [*examples, Example([], [draw(9)])]


def host_with(folder, kind) -> Host:
    host = Host(Base.load(folder, quantization="none", dtype="float32", device="cpu", quiet=True))
    torch.manual_seed(0)
    host.add("policy", peft_config(AdapterConfig(kind=kind, r=4, virtual_tokens=3)))
    with torch.no_grad():  # a LoRA's B is zero at first, and so is A's gradient
        for p in host.parameters("policy"):
            p.add_(torch.randn_like(p) * 0.1)
    host.train_only("policy")
    return host


def plain_loss(host, examples) -> torch.Tensor:
    """Cross entropy of full logits, one row at a time, over the supervised tokens of all rows."""
    total, count = 0.0, 0
    with host.use("policy"):
        for e in examples:
            ids = torch.tensor([e.prompt + e.completions[0]])
            labels = torch.tensor(
                [[-100] * len(e.prompt) + [t if m else -100 for t, m in zip(e.completions[0], e.mask(0), strict=True)]]
            )
            logits = host.base.model(ids).logits
            total = total + F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
            count += int((labels[:, 1:] != -100).sum())
    return total / count


def gradient(host) -> torch.Tensor:
    whole = torch.cat([p.grad.flatten() for p in host.parameters("policy")])
    for p in host.parameters("policy"):
        p.grad = None
    return whole


def test_equals_full_logits(folder):
    host, examples = host_with(folder, "lora"), rows()
    method = SFT(host, examples, ("policy",), TrainConfig(batch_size=9))
    want = plain_loss(host, examples)
    want.backward()
    want_gradient = gradient(host)
    host.training("on")
    loss, metrics = method.loss(examples, method.normalizers(examples))
    loss.backward()
    assert abs(loss - want) <= 1e-6 * want
    assert metrics["loss"] == loss
    assert (gradient(host) - want_gradient).norm() <= 1e-5 * want_gradient.norm()  # 7.1e-7 seen


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_the_micro_batch_changes_nothing(folder, kind):
    host = host_with(folder, kind)
    host.training("on")
    method = SFT(host, rows(), ("policy",), TrainConfig(batch_size=9))
    examples = method.batch(0)
    results = []
    for budget in (1000, 60, 1):
        groups = micro_batches(examples, budget)
        normalizers = method.normalizers(examples)
        loss = 0.0
        for group in groups:
            part, _ = method.loss(group, normalizers)
            part.backward()
            loss += part.item()
        results.append((len(groups), loss, gradient(host)))
    assert [n for n, _, _ in results] == sorted({n for n, _, _ in results}) and results[-1][0] == 9
    for _, loss, grad in results[1:]:
        assert loss == pytest.approx(results[0][1], rel=1e-6)
        assert (grad - results[0][2]).norm() <= 1e-5 * results[0][2].norm()  # 4.8e-7 seen


def test_each_pass_sees_every_row_once(folder):
    method = SFT(None, rows(), ("policy",), TrainConfig(batch_size=4, seed=3))
    seen = [id(e) for step in range(9) for e in method.batch(step)]  # 36 = 4 passes over 9 rows
    for k in range(4):
        assert len(set(seen[9 * k : 9 * k + 9])) == 9
    assert seen[:9] != seen[9:18]
    assert [id(e) for e in method.batch(5)] == seen[20:24]
