"""`lowalign doctor`: versions, device, and a test of each feature that may not work on this machine."""

import importlib.util
import logging
import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import psutil
from packaging.requirements import Requirement

from lowalign import __version__
from lowalign.config.cards import GIB

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors")


class Finding(NamedTuple):
    """One line of the output. state: "ok", "no" (lowalign works without it) or "FAIL" (lowalign cannot be used)."""

    state: str
    what: str
    note: str


def doctor() -> int:
    """Print the findings. Returns 0, or 1 when one of them is FAIL."""
    print(f"lowalign {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print("\n".join(f"      {name:16}  {version}" for name, version in versions().items()))
    findings = [_try("versions", _ranges), _try("memory", _memory), _try("disk", _disk)]
    device = _try("device", _device)
    findings.append(device)
    if device.state != "FAIL":
        checks = {
            "bfloat16": _bfloat16,
            "4-bit base": _nf4,
            "paged optimizer": _paging,
            "packed attention": _attention,
            "7B model": _seven_b,
        }
        findings += [_try(what, check) for what, check in checks.items()]
    print("\n".join(f"{f.state:>4}  {f.what:16}  {f.note}" for f in findings))
    return int(any(f.state == "FAIL" for f in findings))


def versions() -> dict[str, str]:
    """The installed version of each package that results depend on."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def _try(what: str, check: Callable[[], tuple[str, str]]) -> Finding:
    try:
        state, note = check()
        return Finding(state, what, note)
    except Exception as error:  # whatever goes wrong is the finding
        return Finding("FAIL", what, f"{type(error).__name__}: {error}")


def _ranges() -> tuple[str, str]:
    """Are the requirements of the installed lowalign met?"""
    try:
        required = [Requirement(line) for line in metadata.requires("lowalign") or ()]
    except metadata.PackageNotFoundError:
        return "no", "lowalign runs from a folder and is not installed, so the versions it requires are unknown"
    unmet = []
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            unmet.append(f"{requirement} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement}, found {version}")
    if unmet:
        return "FAIL", "pip install -U lowalign; " + "; ".join(unmet)
    return "ok", "all within the ranges that lowalign requires"


def _memory() -> tuple[str, str]:
    memory = psutil.virtual_memory()
    return "ok", f"{memory.available / GIB:.1f} GiB of {memory.total / GIB:.1f} free, {psutil.cpu_count()} cores"


def _disk() -> tuple[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    here = shutil.disk_usage(".").free / GIB
    return "ok" if here > 1 else "no", f"{here:.0f} GiB free here (a 7B model takes 15 GiB in {HF_HUB_CACHE})"


def _device() -> tuple[str, str]:
    import torch

    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        return "no", f"no GPU ({built}): everything runs on the CPU"
    free, total = torch.cuda.mem_get_info()
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    memory = f"{free / GIB:.1f} GiB of {total / GIB:.1f} free"
    return "ok", f"{name}, {memory}, compute {major}.{minor}, CUDA {torch.version.cuda}"


def _bfloat16() -> tuple[str, str]:
    import torch

    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "no", "this card has none (it came with the Ampere generation): use --base.dtype float16"
    x = torch.ones(8, 8, dtype=torch.bfloat16, device=_where())
    return ("ok", "works") if (x @ x == 8).all() else ("FAIL", "a matrix product of ones is wrong")


def _nf4() -> tuple[str, str]:
    """Quantize one layer; compare its product and gradient with those of the same weights in fp32."""
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its notice about optional CPU kernels
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    layer = Linear4bit(512, 256, bias=False, compute_dtype=torch.float32, quant_type="nf4", device="meta")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to(_where())
    packed, state = quantize_4bit(weight.to(_where()), compress_statistics=True, quant_type="nf4")
    fp32 = dequantize_4bit(packed, state)
    loss = ((fp32.cpu() - weight).norm() / weight.norm()).item()
    x = torch.randn(8, 512, device=_where(), requires_grad=True)
    y = layer.train()(x)
    y.sum().backward()
    error = max(((y - x @ fp32.T).norm() / y.norm()).item(), ((x.grad - fp32.sum(0)).norm() / x.grad.norm()).item())
    if error > 0.01 or not 0.05 < loss < 0.15:
        return "FAIL", f"NF4 gives wrong products (off by {error:.1%}) or loses too much ({loss:.1%})"
    return "ok", f"NF4 keeps a Gaussian weight to {loss:.1%}; product and gradient right to {error:.0e}"


def _paging() -> tuple[str, str]:
    import torch

    if not torch.cuda.is_available():
        return "no", "needs CUDA; here the 8-bit optimizer state is in ordinary memory"
    from bitsandbytes.optim import PagedAdamW8bit

    weight = torch.nn.Parameter(torch.zeros(1 << 17, device="cuda"))
    weight.grad = torch.ones_like(weight)
    optimizer = PagedAdamW8bit([weight], lr=0.01)
    optimizer.step()
    torch.cuda.synchronize()
    stepped = torch.allclose(weight, torch.full_like(weight, -0.01), rtol=0.1)  # Adam's first step is the learning rate
    paged = getattr(optimizer.state[weight]["state1"], "is_paged", False)
    return ("ok", "its state is in managed memory") if stepped and paged else ("FAIL", f"{stepped=}, {paged=}")


def _attention() -> tuple[str, str]:
    import torch
    import torch.nn.functional as F

    if not torch.cuda.is_available() or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "no", "the varlen kernel needs CUDA; here segments are computed one by one, with the same results"
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = torch.randn(3, 64, 4, 64, device="cuda", dtype=torch.bfloat16)
    bounds = torch.tensor([0, 64], device="cuda", dtype=torch.int32)
    out = varlen_attn(q, k, v, bounds, bounds, 64, 64, window_size=(-1, 0))
    expected = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True).transpose(0, 1)
    close = torch.allclose(out, expected, atol=2e-2, rtol=2e-2)
    return ("ok", "the varlen kernel works") if close else ("FAIL", "the varlen kernel differs from plain attention")


def _seven_b() -> tuple[str, str]:
    import torch

    if not torch.cuda.is_available():
        return "no", "needs a CUDA card; the CPU is for the demo, the tests and models of a few million weights"
    total = torch.cuda.mem_get_info()[1] / GIB
    if total < 22:
        return "no", f"made for 24 GB, this card has {total:.0f}: try a smaller base or a shorter --data.max-length"
    return "ok", "the card is large enough: lowalign sft lora/sft --model … --data … --out …"


def _where() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
