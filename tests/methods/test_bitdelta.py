"""Scale distillation: loss and gradient against plain transformers and autograd on dense weights, in fp32."""

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from lowalign import Base, Example, Host
from lowalign.config.bitdelta import DistilTrainConfig
from lowalign.config.sections import BaseConfig
from lowalign.export.bitdelta import compress
from lowalign.methods.bitdelta import BitDeltaDistillation, fidelity
from lowalign.model.adapters.signs import unpack_signs
from lowalign.model.forward import divergence
from lowalign.model.forward.divergence import HeadKL
from lowalign.model.forward.logprob import LMHead
from lowalign.train.teacher_states import teacher_states
from tests.bitdelta_models import base_and_fine_tune

FP32 = BaseConfig(quantization="none", dtype="float32", device="cpu")
EXAMPLES = [
    Example([5, 6, 7, 8], [[9, 10, 11], [12, 13]]),
    Example([14, 15], [[16, 17, 18, 19]], masks=[[True, False, True, True]]),
    Example([], [[20, 21, 22]]),
]
TOKENS = 3 + 2 + 3 + 2


@pytest.fixture(params=["llama", "gemma2", "bloom"])  # with a soft cap of the logits; one row per completion
def setup(request, tmp_path, monkeypatch):
    """host with the delta, and a teacher; the paths of base, fine-tune and delta."""
    monkeypatch.setenv("LOWALIGN_CACHE", str(tmp_path / "cache"))
    base, fine = base_and_fine_tune(tmp_path, request.param)
    compress(str(base), str(fine), tmp_path / "delta", onto="original", per_row=request.param == "gemma2")
    host = Host(Base.load(base, **vars(FP32), quiet=True))
    host.load("delta", tmp_path / "delta")
    return host, teacher_states(str(fine), EXAMPLES, FP32), (base, fine)


def dense_kl(host, base, fine):
    """Mean KL(fine ‖ W + exp(s) S) by plain transformers, and its gradient to each log-scale, by autograd."""
    student = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    teacher = AutoModelForCausalLM.from_pretrained(fine, dtype=torch.float32).eval()
    adapter = host.adapters["delta"]
    scales = {name: p.detach().clone().requires_grad_(True) for name, p in adapter.own_weights().items()}
    weights = dict(student.named_parameters()) | dict(adapter.kept)
    for name, matrix in adapter.matrices.items():
        weight = weights[f"{name}.weight"].detach()
        signs = unpack_signs(matrix.packed, weight.shape[1], torch.float32)
        weights[f"{name}.weight"] = weight + scales[f"{name}.log_scale"].exp()[:, None] * signs
    total = 0
    for e in EXAMPLES:
        for i, completion in enumerate(e.completions):
            ids = torch.tensor([e.prompt + completion])
            keep = torch.tensor([False] * len(e.prompt) + e.mask(i))[1:]
            logq = functional_call(student, weights, kwargs={"input_ids": ids}).logits[0, :-1][keep].log_softmax(-1)
            logp = teacher(input_ids=ids).logits[0, :-1][keep].log_softmax(-1).detach()
            total = total + (logp.exp() * (logp - logq)).sum()
    loss = total / TOKENS
    return loss.detach(), dict(zip(scales, torch.autograd.grad(loss, list(scales.values())), strict=True))


def test_loss_and_gradients(setup):
    host, teacher, (base, fine) = setup
    method = BitDeltaDistillation(host, EXAMPLES, ("delta",), DistilTrainConfig(), teacher)
    host.train_only("delta")
    flat = host.flat("delta")
    host.training("on")
    total = 0
    for batch in (EXAMPLES[:2], EXAMPLES[2:]):  # the sum over micro-batches is the step's
        loss, metrics = method.loss(batch, method.normalizers(EXAMPLES))
        assert torch.equal(metrics["loss"], loss.detach())
        total += loss.detach()
        loss.backward()
        flat.accumulate()
    host.training(None)
    wanted_loss, wanted = dense_kl(host, base, fine)
    torch.testing.assert_close(total, wanted_loss, rtol=1e-4, atol=1e-5)
    scale = max(g.abs().max() for g in wanted.values())
    for name, gradient in flat.gradients().items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-3 * scale.item())


def test_fidelity_is_what_plain_models_say(setup):
    host, teacher, (base, fine) = setup
    found = fidelity(host, ("delta",), EXAMPLES, teacher, token_budget=8)
    wanted_kl, _ = dense_kl(host, base, fine)
    assert found.tokens == TOKENS and found.kl == pytest.approx(wanted_kl.item(), rel=1e-4)
    for folder, loss in ((base, found.base), (fine, found.finetuned)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        nll = 0.0
        for e in EXAMPLES:
            for i, completion in enumerate(e.completions):
                ids = torch.tensor(e.prompt + completion)
                logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                nll -= logps[torch.tensor([False] * len(e.prompt) + e.mask(i))[1:]].sum().item()
        assert loss == pytest.approx(nll / TOKENS, rel=1e-4)


def test_a_delta_that_is_the_fine_tune_has_no_kl(setup):
    """With every α Sign(Δ) exact there would be nothing to learn: here the teacher is the delta itself."""
    host, _, _ = setup
    with host.use("delta"), torch.no_grad():
        own = dict(zip(map(id, EXAMPLES), host.states(EXAMPLES), strict=True))
    found = fidelity(host, ("delta",), EXAMPLES, lambda e: own[id(e)], token_budget=1000)
    assert abs(found.kl) < 1e-5 and found.delta == pytest.approx(found.finetuned, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 256])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_divergence_of_two_states_in_fp64(rows, softcap, monkeypatch):
    monkeypatch.setattr(divergence, "LOGIT_ROWS", rows)
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 20, dtype=torch.float64).requires_grad_(False)
    h, t = torch.randn(7, 6, dtype=torch.float64, requires_grad=True), torch.randn(7, 6, dtype=torch.float64)
    cap = lambda z: z if softcap is None else softcap * torch.tanh(z / softcap)  # noqa: E731
    p, q = (cap(head(x)).softmax(-1) for x in (t, h))
    wanted = (p * (p / q).log()).sum(-1)
    found = HeadKL.apply(h, t, LMHead(head, softcap=softcap))
    torch.testing.assert_close(found, wanted)
    factor = torch.rand(7, dtype=torch.float64)
    one, other = (torch.autograd.grad((x * factor).sum(), h)[0] for x in (found, wanted))
    torch.testing.assert_close(one, other)


def test_the_teacher_is_run_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWALIGN_CACHE", str(tmp_path / "cache"))
    _, fine = base_and_fine_tune(tmp_path)
    first = teacher_states(str(fine), EXAMPLES, FP32)
    load = Base.load
    monkeypatch.setattr(Base, "load", lambda *_, **__: pytest.fail("the fine-tuned model was loaded again"))
    again = teacher_states(str(fine), EXAMPLES, FP32)
    assert all(torch.equal(first(e), again(e)) and len(first(e)) == e.supervised for e in EXAMPLES)
    monkeypatch.setattr(Base, "load", load)
    (file,) = (tmp_path / "cache" / "data").glob("teacher-*")
    file.write_bytes(file.read_bytes()[:-9])  # damaged: computed anew
    assert all(torch.equal(first(e), teacher_states(str(fine), EXAMPLES, FP32)(e)) for e in EXAMPLES[:1])
