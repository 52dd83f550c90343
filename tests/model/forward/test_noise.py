"""NEFTune: the size of the noise, and where there is none."""

import math

import pytest
import torch

from lowalign import Base, Example, Host
from lowalign.config.sections import AdapterConfig, TrainConfig
from lowalign.data.pack import pack
from lowalign.methods.sft import SFT
from lowalign.model.adapters.kinds import peft_config
from lowalign.model.forward.noise import embedding_noise, with_noise
from tests.tiny import tiny_folder

EXAMPLES = [Example([5, 6, 7], [[8, 9]]), Example([4] * 30, [[11, 12, 13, 14, 15]]), Example([], [[6, 7, 8]])]


def test_the_size_follows_from_the_length_of_each_example() -> None:
    """alpha / √(L · d) is the largest noise of an example of L tokens (the paper's Algorithm 1)."""
    alpha, hidden = 5.0, 4096
    words = torch.zeros(43, hidden)
    with embedding_noise(alpha):
        noise = with_noise(words, pack(EXAMPLES).positions)
    for part, length in zip(noise.split([5, 35, 3]), (5, 35, 3), strict=True):
        largest = alpha / math.sqrt(length * hidden)
        assert 0.999 * largest < part.abs().max() <= largest
        assert part.std().item() == pytest.approx(largest / math.sqrt(3), rel=0.02) and abs(part.mean()) < largest / 50


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    folder = tiny_folder(tmp_path_factory.mktemp("noise"), "llama")
    host = Host(Base.load(folder, quantization="none", dtype="float32", device="cpu", quiet=True))
    torch.manual_seed(0)
    for kind in ("lora", "prompt"):
        host.add(kind, peft_config(AdapterConfig(kind=kind, r=4, virtual_tokens=3)))
        with torch.no_grad():
            for p in host.parameters(kind):
                p.add_(torch.randn_like(p) * 0.1)
    return host


def loss_and_gradient(host: Host, kind: str, neftune: float, checkpointing: str = "off") -> tuple[float, torch.Tensor]:
    host.train_only(kind)
    host.training(checkpointing)
    method = SFT(host, EXAMPLES, (kind,), TrainConfig())
    method.neftune = neftune
    torch.manual_seed(3)
    loss, _ = method.loss(EXAMPLES, method.normalizers(EXAMPLES))
    gradients = torch.autograd.grad(loss, list(host.parameters(kind)))
    host.training(None)
    return loss.item(), torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_recomputed_layers_see_the_same_noise(host: Host, kind: str) -> None:
    kept, recomputed = (loss_and_gradient(host, kind, 5.0, checkpointing) for checkpointing in ("off", "on"))
    assert kept[0] == recomputed[0] and torch.equal(kept[1], recomputed[1])
    again, plain = loss_and_gradient(host, kind, 5.0), loss_and_gradient(host, kind, 0.0)
    assert again[0] == kept[0] and torch.equal(again[1], kept[1])
    assert abs(plain[0] - kept[0]) > 1e-6


def test_no_noise_without_gradients(host: Host) -> None:
    method = SFT(host, EXAMPLES, ("lora",), TrainConfig())
    with torch.no_grad():
        plain, _ = method.loss(EXAMPLES, method.normalizers(EXAMPLES))
        method.neftune = 5.0
        noisy, _ = method.loss(EXAMPLES, method.normalizers(EXAMPLES))
    assert plain == noisy
