"""Hosts and rankings that the tests of the preference methods share."""

import torch

from lowalign import Base, Example, Host
from lowalign.config.sections import AdapterConfig
from lowalign.model.adapters.kinds import peft_config


def host_with(folder, kind: str = "lora", head: bool = False, noise: float = 0.1) -> Host:
    """A host in fp32 with a "policy" that is not at its start (a LoRA's B is zero there, and so is A's gradient)."""
    host = Host(Base.load(folder, quantization="none", dtype="float32", device="cpu", quiet=True))
    torch.manual_seed(0)
    host.add("policy", peft_config(AdapterConfig(kind=kind, r=4, virtual_tokens=3)))
    if head:
        host.add_scalar_head("policy")
    with torch.no_grad():
        for p in host.parameters("policy"):
            p.add_(torch.randn_like(p) * noise)
    host.train_only("policy")
    return host


def rankings(sizes=(2, 2, 4, 3, 2), seed: int = 0, masked: bool = False) -> list[Example]:
    """Rankings of these numbers of completions, in any order of rank."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(4, 300, (int(n),), generator=g).tolist()  # noqa: E731
    examples = []
    for k in sizes:
        completions = [draw(n) for n in torch.randint(2, 14, (k,), generator=g)]
        masks = [[t % 3 != 1 for t in range(len(c))] for c in completions] if masked else None
        rank = torch.randperm(k, generator=g).tolist()
        examples.append(Example(draw(torch.randint(2, 12, (1,), generator=g)), completions, masks, rank))
    return examples


def gradient(host: Host) -> torch.Tensor:
    """The policy's gradient, which is then forgotten."""
    whole = torch.cat([p.grad.flatten() for p in host.parameters("policy")])
    for p in host.parameters("policy"):
        p.grad = None
    return whole


def apart(e: Example) -> list[Example]:
    """Each completion as an Example of its own."""
    return [Example(e.prompt, [c], None if e.masks is None else [e.masks[i]]) for i, c in enumerate(e.completions)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())
