"""The fused LoRA step against peft's own forward of the same layer."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowalign.model.adapters import lora_step

TOLERANCE = 1e-6  # of the largest value, in fp32; three products of 24 to 40 terms are within 3e-7
IN, OUT = 40, 24


def base_layer(kind: str) -> nn.Module:
    if kind == "conv1d":
        layer = Conv1D(OUT, IN)
    elif kind == "nf4":
        layer = Linear4bit(IN, OUT, bias=True, compute_dtype=torch.float32, quant_type="nf4")
        weight = torch.randn(OUT, IN) / IN**0.5
        layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer)
        layer.support_avx512bf16_for_cpu = False
        layer = layer.to("cpu")
    else:
        layer = nn.Linear(IN, OUT)
    if layer.bias is not None:
        nn.init.normal_(layer.bias.data)
    return layer.requires_grad_(False)


def with_loras(kind: str = "linear", dtype=torch.float32, **options) -> nn.Module:
    """A layer with the LoRAs frozen and trained, both active. options: of the trained one."""
    torch.manual_seed(0)
    model = nn.Sequential(base_layer(kind))
    model.is_loaded_in_4bit = kind == "nf4"
    for name, own in (("frozen", {}), ("trained", options)):
        config = LoraConfig(r=4, lora_alpha=12, target_modules=["0"], init_lora_weights=False, **own)
        config.fan_in_fan_out = kind == "conv1d"
        inject_adapter_in_model(config, model, name)
    layer = model[0]
    layer._active_adapter, layer._disable_adapters = ["frozen", "trained"], False
    for name, p in layer.named_parameters():
        p.requires_grad_("trained" in name)
        if "lora_" in name:
            p.data = p.data.to(dtype)
    lora_step.fuse(layer)
    return layer


def outputs(layer: nn.Module, forward, x_grad: bool = True) -> dict[str, torch.Tensor | None]:
    """Its output, and the gradients of a fixed function of it."""
    torch.manual_seed(1)
    x = torch.randn(2, 7, IN).requires_grad_(x_grad)
    layer.zero_grad()
    y = forward(x)
    (y * torch.randn(y.shape)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def peft_forward(layer: nn.Module):
    return lambda x: type(layer).forward(layer, x)


@pytest.mark.parametrize("x_grad", [True, False], ids=["", "first-layer"])
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("kind", ["linear", "nf4", "conv1d"])
def test_equals_peft(kind, rslora, x_grad):
    layer = with_loras(kind, use_rslora=rslora)
    ours, theirs = outputs(layer, layer, x_grad), outputs(layer, peft_forward(layer), x_grad)
    for name, value in theirs.items():
        if value is None:
            assert ours[name] is None, name
        else:
            assert (ours[name] - value).abs().max() <= TOLERANCE * value.abs().max(), name
    assert all(ours[f"lora_{m}.trained.weight"].any() and ours[f"lora_{m}.frozen.weight"] is None for m in "AB")
    assert (ours["x"] is not None) == x_grad


def test_without_an_adapter_it_is_the_base_bit_for_bit():
    for kind in ("linear", "nf4", "conv1d"):
        layer = with_loras(kind)
        for active, disabled in (([], False), (["elsewhere"], False), (["trained"], True)):
            layer._active_adapter, layer._disable_adapters = active, disabled
            ours, base = outputs(layer, layer), outputs(layer, layer.base_layer)
            assert torch.equal(ours["y"], base["y"]) and torch.equal(ours["x"], base["x"])


def test_what_it_keeps():
    """x and the trained product of rank r, besides the weights: nothing of the size of the output."""
    layer = with_loras()
    kept = []

    def pack(t):
        kept.append(t)
        return t

    x = torch.randn(3, 7, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    weights = {p.data_ptr() for p in layer.parameters()}
    assert sorted(t.shape for t in kept if t.data_ptr() not in weights) == [(21, 4), (21, IN)]
    assert x.data_ptr() in {t.data_ptr() for t in kept}


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=str)
def test_others_are_computed_as_in_peft(options):
    """DoRA and a bias by peft; of dropout the noise is peft's, and without it (evaluation) the step is fused."""
    layer = with_loras(**options)
    ours, theirs = outputs(layer, layer), outputs(layer, peft_forward(layer))
    for name, value in theirs.items():
        if value is not None:
            torch.testing.assert_close(ours[name], value, rtol=0, atol=TOLERANCE * value.abs().max().item())
    layer.eval()
    torch.testing.assert_close(layer(torch.ones(2, IN)), type(layer).forward(layer, torch.ones(2, IN)))


def test_adapters_in_more_precision_than_the_base():
    """A fresh one on a 16-bit base, before its working copy is made, adds what it adds alone."""
    layer = with_loras(dtype=torch.float64)
    ours, theirs = outputs(layer, layer), outputs(layer, peft_forward(layer))
    assert all(v is None or (ours[n] - v).abs().max() <= TOLERANCE * v.abs().max() for n, v in theirs.items())
    fresh = with_loras()
    frozen, trained = fresh.lora_A["frozen"], fresh.lora_B["trained"]
    trained.weight.data.zero_()
    fresh.lora_A["trained"].double(), trained.double()
    x = torch.randn(3, frozen.in_features)
    both = fresh(x)
    fresh._active_adapter = ["frozen"]
    assert torch.equal(both, fresh(x))


def test_under_autocast_it_is_pefts():
    layer = with_loras()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = layer(torch.ones(2, IN)), type(layer).forward(layer, torch.ones(2, IN))
    assert torch.equal(ours, theirs)
