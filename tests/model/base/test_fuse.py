"""The fused norm, rotary embedding and SwiGLU against transformers' own modules."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from lowalign import Base, Example, Host
from lowalign.model.base import fused_ops
from lowalign.model.base.fuse import PARTS, fuse
from lowalign.model.base.fused_ops import RMSNorm, Rotary, SwiGLU
from lowalign.plan.meter import Meter
from tests.tiny import tiny_folder, tiny_model

TOLERANCE = 1e-6  # of the largest value, in fp32; seen: 3e-7


def close(ours, stock, tolerance=TOLERANCE) -> None:
    assert ours.dtype == stock.dtype and ours.shape == stock.shape
    assert (ours - stock).abs().max() <= tolerance * stock.abs().max()


def same(ours, stock, *inputs, tolerance=TOLERANCE) -> None:
    """Values and gradients of two functions of the same inputs."""
    results = []
    for function in (ours, stock):
        own = [x.detach().clone().requires_grad_() for x in inputs]
        y = function(*own)
        torch.manual_seed(3)
        (y * torch.randn_like(y)).sum().backward()
        results.append([y.detach(), *(x.grad for x in own)])
    for a, b in zip(*results, strict=True):
        close(a, b, tolerance)


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("kind,offset", [(LlamaRMSNorm, 0.0), (Olmo2RMSNorm, 0.0), (Gemma2RMSNorm, 1.0)])
def test_norm(kind, offset, dtype, tolerance):
    torch.manual_seed(0)
    module = kind(48, eps=1e-3).to(dtype).requires_grad_(False)
    module.weight.copy_(torch.randn(48))
    x = torch.randn(2, 5, 48, dtype=dtype) * 0.1
    if dtype == torch.float64 and kind is not Gemma2RMSNorm:
        stock = lambda x: module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)  # noqa: E731
    elif dtype == torch.float64:
        stock = lambda x: (1 + module.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)  # noqa: E731
    else:
        stock = module
    same(lambda x: RMSNorm.apply(x, module.weight, 1e-3, offset, "off"), stock, x, tolerance=tolerance)


def test_swiglu_and_rotary():
    torch.manual_seed(0)
    gate, up = torch.randn(2, 2, 5, 24) * 3
    same(lambda g, u: SwiGLU.apply(g, u, "off"), lambda g, u: nn.functional.silu(g) * u, gate, up)
    q, k = torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(2, 1, 5, 8)
    cos, sin = torch.randn(2, 2, 5, 8)  # halves that differ: of more general rotations than the models use
    for x in (q, k):
        same(lambda x: Rotary.apply(x, cos, sin, "off"), lambda x: apply_rotary_pos_emb(x, x, cos, sin)[0], x)
        same(lambda x: Rotary.apply(x, cos[:1], sin[:1], "off"), lambda x: apply_rotary_pos_emb(x, x, cos[:1], sin[:1])[0], x)  # fmt: skip


@pytest.mark.parametrize(
    "kind,parts",
    [("llama", "norm rotary mlp"), ("mistral", "norm rotary mlp"), ("qwen3", "norm rotary mlp"), ("gemma2", "norm rotary"),
     ("phi3", "norm"), ("gpt2", "")],
)  # fmt: skip
def test_a_model_computes_the_same(kind, parts):
    stock = tiny_model(kind).requires_grad_(False)
    fused = copy.deepcopy(stock)
    fuse(fused)
    changed = {type(m).__name__ for m in fused.modules() if "forward" in vars(m)}
    words = {"norm": "Norm", "rotary": "Attention", "mlp": "MLP"}
    assert {part for part in PARTS if any(words[part] in name for name in changed)} == set(parts.split())
    words = stock.get_input_embeddings()(torch.arange(3, 40)[None])
    # Whole models of weights 1.5 times as large as usual amplify rounding; seen: 3e-6.
    same(lambda x: fused(inputs_embeds=x).logits, lambda x: stock(inputs_embeds=x).logits, words, tolerance=3e-5)


def test_each_part_has_its_switch_and_others_stay():
    for part in PARTS:
        model = tiny_model()
        fuse(model, parts=(part,))
        changed = {type(m).__name__ for m in model.modules() if "forward" in vars(m)}
        assert changed == {{"norm": "LlamaRMSNorm", "rotary": "LlamaAttention", "mlp": "LlamaMLP"}[part]}

    class Scaled(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    class Gelu(LlamaMLP):
        pass

    model = nn.ModuleList([Scaled(4), Gelu(tiny_model().config)])
    model[1].act_fn = nn.GELU()
    fuse(model)
    assert not any("forward" in vars(m) for m in model)
    assert "forward" not in vars(LlamaRMSNorm(4))  # classes do not change


def test_a_dry_run_sees_one_kernel_each():
    with torch.device("meta"):
        gate, up, norm = torch.empty(3, 8, requires_grad=True), torch.empty(3, 8), torch.empty(8)
        q, cos = torch.empty(1, 2, 3, 8, requires_grad=True), torch.empty(1, 3, 8)
    kernels = {}
    for compile in ("auto", "off"):
        with Meter() as meter:
            (
                SwiGLU.apply(gate, up, compile),
                RMSNorm.apply(gate, norm, 1e-6, 0.0, compile),
                Rotary.apply(q, cos, cos, compile),
            )
        kernels[compile] = sum(meter.work.kernels.values())
    assert kernels["auto"] == 3 and kernels["off"] > 10


def test_where_it_cannot_be_compiled_it_runs_as_it_is(monkeypatch, capsys):
    def no_compiler(function):
        def call(*args):
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    fused_ops._compiled.cache_clear()
    gate, up = torch.randn(2, 3, 8)
    for _ in range(2):
        assert torch.equal(SwiGLU.apply(gate, up, "on"), SwiGLU.apply(gate, up, "off"))
    assert capsys.readouterr().err.count("swiglu_forward cannot be compiled here (RuntimeError: no C++ compiler)") == 1
    fused_ops._compiled.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 5, 6])
def test_compiled_is_the_same(rows):
    """A minute of compiling."""
    torch.manual_seed(0)
    weight, x, (gate, up) = torch.randn(48), torch.randn(rows, 48), torch.randn(2, rows, 24)
    q, (cos, sin) = torch.randn(1, 2, rows, 8), torch.randn(2, 1, rows, 8)
    norm, swiglu, rotary = (
        lambda compile: lambda x: RMSNorm.apply(x, weight, 1e-6, 1.0, compile),
        lambda compile: lambda g, u: SwiGLU.apply(g, u, compile),
        lambda compile: lambda q: Rotary.apply(q, cos, sin, compile),
    )
    for function, inputs in ((norm, (x,)), (swiglu, (gate, up)), (rotary, (q,))):
        same(function("on"), function("off"), *inputs)


@pytest.mark.slow
def test_compiled_functions_are_recomputed_in_a_backward(tmp_path):
    """Gradients under checkpointing equal those without, bit for bit, and those of stock code within rounding."""
    folder = tiny_folder(tmp_path)
    gradients = {}
    for options in ({"exact": True}, {"compile": "on"}):
        host = Host(Base.load(folder, quantization="none", dtype="float32", device="cpu", quiet=True, **options))
        torch.manual_seed(0)
        host.add("policy", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        host.train_only("policy")
        for checkpointing in ("off", "on"):
            host.training(checkpointing)
            with host.use("policy"):
                host.logprobs([Example([5, 6, 7], [[8, 9, 10], [11, 12]])])[0][0].sum().backward()
            key = (*options, checkpointing)
            gradients[key] = torch.cat([p.grad.flatten() for p in host.parameters("policy")])
            for p in host.parameters("policy"):
                p.grad = None
    assert torch.equal(gradients["compile", "off"], gradients["compile", "on"])
    close(gradients["compile", "on"], gradients["exact", "on"], tolerance=3e-5)
