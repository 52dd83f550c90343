"""A new kind of adapter is a class and an entry in KINDS: nothing else needs to know it."""

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lowalign import Base, Example, Host
from lowalign.errors import UserError
from lowalign.model.adapters import adapters, kinds
from lowalign.model.adapters.adapter import Adapter
from lowalign.model.policy import check_start
from tests.tiny import tiny_folder

EXAMPLES = [Example([5, 6, 7, 8], [[9, 10, 11], [12, 13]])]


@dataclass
class ScaleConfig(PeftConfig):
    """Of the kind below."""

    start: float = 1.0


class ScaledNorm(nn.Module, BaseTunerLayer):
    """The last norm, its output multiplied by the active scales."""

    adapter_layer_names = ("scales",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.scales, self.names = base_layer, nn.ParameterDict(), []

    def forward(self, x):
        x = self.base_layer(x)
        for name in self.names:
            x = (x * self.scales[name]).to(x.dtype)
        return x


class Scale(Adapter):
    """One number."""

    option, title, config_class, peft_type = "scale", "scale", ScaleConfig, "SCALE"
    identity_at_start = True

    def __init__(self, base, name, config):
        super().__init__(base, name, config)
        if not isinstance(base.model.base_model.norm, ScaledNorm):
            base.model.base_model.norm = ScaledNorm(base.model.base_model.norm)
        base.model.base_model.norm.scales[name] = nn.Parameter(torch.tensor([config.start]))

    @staticmethod
    def layers(model):
        return [m for m in model.modules() if isinstance(m, ScaledNorm)]

    @staticmethod
    def activate(layers, names):
        for layer in layers:
            layer.names = names

    def own_weights(self):
        return {"scale": self.base.model.base_model.norm.scales[self.name]}

    def file_name(self, key):
        return key

    def remove(self):
        del self.base.model.base_model.norm.scales[self.name]


@pytest.fixture
def host(tmp_path, monkeypatch):
    for module in (kinds, adapters):
        monkeypatch.setattr(module, "KINDS", (*kinds.KINDS[:3], Scale))
    monkeypatch.setitem(kinds.BY_PEFT_TYPE, "SCALE", Scale)
    base = Base.load(
        tiny_folder(tmp_path / "base", "llama"), quantization="none", dtype="float32", device="cpu", quiet=True
    )
    return Host(base)


def logps(host, *names):
    with host.use(*names), torch.no_grad():
        return torch.cat([t for row in host.logprobs(EXAMPLES) for t in row])


def test_a_new_kind(host, tmp_path):
    bare, checksum = logps(host), host.base.checksum()
    host.add("lora", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    host.add("scale", ScaleConfig(peft_type="SCALE"))
    assert "the scale starts as the base: log-probs equal" in check_start(host, ("scale",), (), EXAMPLES)
    host.adapters["scale"].own_weights()["scale"].data.fill_(0.5)
    alone = logps(host, "scale")
    assert not torch.equal(alone, bare) and not torch.equal(logps(host, "lora", "scale"), logps(host, "lora"))
    assert torch.equal(logps(host), bare) and host.base.checksum() == checksum
    with pytest.raises(RuntimeError, match="must equal its reference"):
        check_start(host, ("scale",), (), EXAMPLES)

    host.train_only("scale")
    flat = host.flat("scale")
    with host.use("scale"):
        torch.cat([t for row in host.logprobs(EXAMPLES) for t in row]).sum().backward()
    flat.accumulate()
    assert flat.has_gradient == {"scale"} and flat.gradients()["scale"].any()

    host.save("scale", tmp_path / "saved", parents=("lora",))
    host.load("loaded", tmp_path / "saved")
    assert torch.equal(logps(host, "loaded"), alone)
    host.delete("loaded")
    host.delete("scale")
    assert torch.equal(logps(host), bare)


def test_a_config_of_no_kind(host):
    with pytest.raises(
        UserError, match="is not supported; use LoraConfig, PromptTuningConfig, PrefixTuningConfig or ScaleC"
    ):
        host.add("other", PeftConfig(peft_type="OTHER"))
