"""Dequantized weights compute what the 4-bit layers compute, and leave them as they were."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from lowalign import Base
from lowalign.model import dequantized as module
from lowalign.model.attention.product import has_bf16
from lowalign.model.dequantized import dequantized, dequantized_bytes
from tests.tiny import tiny_folder

IDS = torch.arange(5, 25)[None]
LINEAR = 7 * 2  # of two layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base"), "llama")


def load(folder, quantization="none", dtype="float32"):
    return Base.load(folder, quantization, dtype=dtype, device="cpu", quiet=True).model


@torch.no_grad()
def logits(model, dequantize=None):
    if dequantize is None:
        return model(IDS).logits
    with dequantized(model, dequantize):
        return model(IDS).logits


def replaced(model) -> int:
    return sum("forward" in vars(m) for m in model.modules() if isinstance(m, Linear4bit))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantized_weights_change_nothing(dtype, folder):
    model = load(folder, "nf4", dtype)
    four_bit = [m for m in model.modules() if isinstance(m, Linear4bit)]
    width = 2 if dtype == "bfloat16" and has_bf16() else 4
    assert dequantized_bytes(model) == sum(m.in_features * m.out_features for m in four_bit) * width
    for choice in ("off", "on", "auto"):
        with dequantized(model, choice):
            assert replaced(model) == (0 if choice == "off" else LINEAR)
        assert replaced(model) == 0
        got, want = logits(model, dequantize=choice), logits(model)
        # A packed weight is multiplied by another kernel, to 8 bits of mantissa; the others by the same one.
        assert torch.equal(got, want) if dtype == "float32" else (got - want).abs().max() <= 0.05 * want.abs().max()


@pytest.mark.parametrize("choice,share,lines", [("auto", 2, 0), ("on", 1.1, 1)])
def test_dequantizing_leaves_memory_free(choice, share, lines, folder, monkeypatch, capsys):
    model = load(folder, "nf4")
    for free, layers in ((share * 1.02, LINEAR), (share * 0.98, 0)):
        memory = type("memory", (), {"available": free * dequantized_bytes(model)})
        monkeypatch.setattr(module.psutil, "virtual_memory", lambda memory=memory: memory)
        with dequantized(model, choice):
            assert replaced(model) == layers
        assert capsys.readouterr().err.count("--sampling.dequantize on needs") == (0 if layers else lines)
