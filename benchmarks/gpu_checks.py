"""What could be silently wrong on a card, for gpu.py. A check returns {"checks": {what: (value, bound)}}; it passes when no value
is above its bound. In 16 bit results differ by rounding: bounds are about three times what a correct CPU gives in bf16."""

import contextlib
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from gpu_ppo import measure_ppo
from gpu_setup import Setup
from torch import Tensor, nn

from lowalign import Base, Example, Host
from lowalign.config.sections import AdapterConfig, Sampling, TrainConfig
from lowalign.methods.sft import SFT
from lowalign.model.adapters.flat import FlatWeights
from lowalign.model.adapters.kinds import peft_config
from lowalign.model.attention import blockwise, packed
from lowalign.model.attention.self_test import TOLERANCE
from lowalign.train.accumulate import MicroBatches
from lowalign.train.optim import free_paged_state, load_state, make_optimizer, paged_state_is_managed, read_state
from lowalign.train.signals import StopSignals

HEADS = [(1, 64), (4, 128), (7, 128), (2, 256), (4, 96)]  # groups, head size: Phi, Llama-3, Qwen2.5, Gemma, and 96
ROWS = [(180, (150, 40, 1)), (60, (90,)), (20, (30, 25))]  # tokens of the prompt and of its completions
TINY_ROWS = [(14, (11, 9, 1)), (5, (12,)), (6, (4, 5))]


def self_tests(setup: Setup) -> dict:
    """The attention that trains and that of the sampler, for the heads of the usual models."""
    device, checks = torch.device(setup.device), {}
    if setup.tiny:
        why_wrong = packed._why_wrong(packed._by_segment, device, torch.bfloat16, 2, 16, 16)
        return {"checks": {f"segment by segment {why_wrong}": (int(bool(why_wrong)), 0)}}
    for groups, size in HEADS:
        for way in (packed._varlen, packed._by_segment):
            why_wrong = packed._why_wrong(way, device, torch.bfloat16, groups, size, size)
            checks[f"{way.__name__} {groups} x {size} {why_wrong}"] = int(bool(why_wrong)), 0
        right = blockwise._varlen_is_right(device, torch.bfloat16, 2 * groups, 2, size)
        checks[f"sampler {groups} x {size}"] = int(not right), 0
    for size, values in ((100, 100), (192, 128)):  # not the flash kernel's
        why_wrong = packed._why_wrong(packed._by_segment, device, torch.bfloat16, 2, size, values)
        checks[f"heads {size}, values {values} {why_wrong}"] = int(bool(why_wrong)), 0
    return {"checks": checks, "tolerance": TOLERANCE}


def base_against_cpu(setup: Setup) -> dict:
    """Base.load: log-probs and gradients in bf16 on the device, against fp32 on the CPU, packed with shared prompts."""
    results = [
        _logps_and_gradients(Base.load(setup.folder(), device=device, dtype=dtype, quiet=True), _rows(setup))
        for device, dtype in ((setup.device, "bfloat16"), ("cpu", "float32"))
    ]
    (logps, gradient), (exact_logps, exact_gradient) = results
    spread = exact_logps.std()
    return {
        "checks": {
            "log-probs, mean distance": (((logps - exact_logps).abs().mean() / spread).item(), 0.03),
            "log-probs, largest distance": (((logps - exact_logps).abs().max() / spread).item(), 0.3),
            "gradient": (_distance(gradient, exact_gradient), 0.15),
        }
    }


def checkpointing(setup: Setup) -> dict:
    """Gradients with the activations recomputed, in CPU memory, in tiles, are those with the activations kept."""
    base = Base.load(setup.folder(), device=setup.device, quiet=True)
    tile = {"tile": 32 if setup.tiny else 128}
    modes = {
        "off": ("off", {}), "on": ("on", {}), "offload": ("offload", {}), "every second input": ("on", {"every": 2}),
        "a kept layer": ("on", {"keep_layers": 1}), "tiles": ("on", tile), "tiles and offload": ("offload", tile),
    }  # fmt: skip
    kept, checks = None, {}
    for mode, (kind, options) in modes.items():
        _, gradient = _logps_and_gradients(base, _rows(setup), kind, **{"tile": 0} | options)
        if kept is None:
            kept = gradient
        # Tiles round in other places; the flash kernel's backward adds in any order, so bits may differ on a card.
        checks[f"{mode} against off"] = _distance(gradient, kept), 0.0 if setup.tiny and "tile" not in options else 0.02
    return {"checks": checks}


def out_of_memory_in_gradients(setup: Setup) -> dict:
    """Memory runs out in a forward or a backward: smaller micro-batches give the same gradient."""
    base = Base.load(setup.folder(), device=setup.device, quiet=True)
    host, rows = _host(base), _rows(setup) * 4
    with _no_memory_for_all(setup, host, "forward", lambda: _step(host, rows)) as limit:
        whole, budget = limit.whole, sum(e.length for e in rows)
        with limit:
            smaller, forward_budget = _step(host, rows)
    with _no_memory_for_all(setup, host, "backward", lambda: _step(host, rows, "on")) as limit, limit:
        again, backward_budget = _step(host, rows, "on")
    checks = {
        "forward: gradient": (_distance(smaller, whole[0]), 0.05),
        "backward: gradient": (_distance(again, whole[0]), 0.05),
        "forward: share of the token budget left": (forward_budget / budget, 0.5),
        "backward: share of the token budget left": (backward_budget / budget, 0.5),
    }
    return {"checks": checks}


def out_of_memory_in_sampling(setup: Setup) -> dict:
    """Memory runs out while sampling: every sample still ends, and its log-probs are those of the model."""
    base = Base.load(setup.folder(), device=setup.device, quiet=True)
    host, new = _host(base), 16 if setup.tiny else 256
    prompts = [list(range(5, 5 + (10 if setup.tiny else 200) + i)) for i in range(4)]
    sampling = Sampling(max_new_tokens=new, min_new_tokens=new)
    run = lambda: host.generate(prompts, 16, sampling)  # noqa: E731
    with host.use("policy"), _no_memory_for_all(setup, host, "sampling", run) as limit:
        with limit:
            samples = run()
        lengths = [len(c.ids) for row in samples for c in row]
        difference = _sampler_difference(host, prompts, samples)
    return {"checks": {"samples that are missing": (64 * new - sum(lengths), 0), "log-probs": (difference, 0.3)}}


def paging(setup: Setup) -> dict:
    """Paged state is in managed memory before and after a resume, gives the same bits as unpaged state, and is given back."""
    kinds = {kind: _optimizer(kind, setup.device) for kind in ("paged_adamw_8bit", "adamw_8bit")}
    for flat, optimizer in kinds.values():
        for step in range(3):
            _optimizer_step(flat, optimizer, step)
    flat, optimizer = kinds["paged_adamw_8bit"]
    paged = paged_state_is_managed(optimizer)["policy"]
    again, resumed = _optimizer("paged_adamw_8bit", setup.device)
    again.load(flat.tensors())
    load_state(resumed, *read_state(optimizer))
    paged_again = paged_state_is_managed(resumed)["policy"]
    for each in ((flat, optimizer), (again, resumed), kinds["adamw_8bit"]):
        _optimizer_step(*each, 3)
    weights = [f.tensors()["a"] for f in (flat, again, kinds["adamw_8bit"][0])]
    different = sum(not torch.equal(weights[0], other) for other in weights[1:])
    left = len(optimizer.page_mng.paged_tensors)
    for each in (optimizer, resumed):
        free_paged_state(each)
    freed = left - len(optimizer.page_mng.paged_tensors)
    expected = not setup.tiny
    return {
        "checks": {
            "not paged": (int(paged != expected), 0),
            "not paged after the resume": (int(paged_again != expected), 0),
            "other bits": (different, 0),
            "buffers kept": (left - freed, 0),
        }
    }


def ppo_round(setup: Setup) -> dict:
    """A round with four roles. PPO itself asserts that the ratio of its first step is 1, bit for bit."""
    result = measure_ppo(Base.load(setup.folder(), device=setup.device, quiet=True), True)
    if "failed" in result:
        raise AssertionError(result["failed"])
    return {"checks": {"KL of zero": (int(result["kl"] == 0), 0)}, "kl": result["kl"], "length": result["length"]}


def sampler(setup: Setup) -> dict:
    """Log-probs of the sampler against teacher forcing over 300 tokens, with a LoRA, prompts shared by samples."""
    base = Base.load(setup.folder(), device=setup.device, quiet=True)
    host, new = _host(base), 40 if setup.tiny else 300
    prompts = [list(range(5, 5 + n)) for n in ((9, 30) if setup.tiny else (20, 150, 330))]
    with host.use("policy"):
        samples = host.generate(prompts, 4, Sampling(max_new_tokens=new, min_new_tokens=new))
        worst = _sampler_difference(host, prompts, samples)
        mean = _sampler_difference(host, prompts, samples, largest=False)
    return {"checks": {"largest distance": (worst, 0.5), "mean distance": (mean, 0.05)}, "tokens": new}


# -- what they share --------------------------------------------------------------------------------------------------


def _rows(setup: Setup) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, 380, (n,), generator=generator).tolist()  # noqa: E731
    return [Example(draw(p), [draw(n) for n in lengths]) for p, lengths in (TINY_ROWS if setup.tiny else ROWS)]


def _host(base: Base) -> Host:
    """With a LoRA whose update is not zero, the same on every device."""
    host = Host(base)
    host.add("policy", peft_config(AdapterConfig(r=8)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in host.parameters("policy"):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 / p.shape[-1] ** 0.5)
    return host


def _logps_and_gradients(base: Base, rows: Sequence[Example], mode: str = "on", **options) -> tuple[Tensor, Tensor]:
    """fp32 on the CPU: log-probs of all completion tokens, and the gradient of their sum."""
    host = _host(base)
    host.train_only("policy")
    flat = host.flat("policy")
    host.training(mode, **options)
    with host.use("policy"):
        logps = torch.cat([row for example in host.logprobs(rows) for row in example])
    (logps.sum() / len(logps)).backward()
    flat.accumulate()
    host.training(None)
    result = logps.detach().float().cpu(), flat.master.grad.float().cpu().clone()
    host.delete("policy")
    return result


def _distance(gradient: Tensor, expected: Tensor) -> float:
    """Relative to the norm; infinite for NaN."""
    return ((gradient - expected).norm() / expected.norm()).nan_to_num(torch.inf).item()


def _step(host: Host, rows: list[Example], mode: str = "off") -> tuple[Tensor, int]:
    """The gradient of an SFT step in as few micro-batches as fit, and the token budget it ended with."""
    config = TrainConfig(token_budget=sum(e.length for e in rows), checkpointing=mode)
    host.train_only("policy")
    flats = {"policy": host.flat("policy")}
    host.training(mode)
    batches = MicroBatches(SFT(host, rows, ("policy",), config), flats, config.token_budget, StopSignals())
    batches.gradients(rows, 0)
    host.training(None)
    return flats["policy"].master.grad.float().cpu().clone(), batches.budget


class _Limit(contextlib.AbstractContextManager):
    """Within it there is memory for less than all at a time. whole: what `run` gave with enough."""

    def __init__(self, whole: object, within: contextlib.AbstractContextManager) -> None:
        self.whole, self.within = whole, within

    def __enter__(self) -> None:
        self.within.__enter__()

    def __exit__(self, *error) -> None:
        self.within.__exit__(*error)


@contextlib.contextmanager
def _no_memory_for_all(setup: Setup, host: Host, where: str, run) -> Iterator[_Limit]:
    """On a card: run once, and then allow 60 % of what that took beyond what was there. On the CPU the first attempt fails."""
    if setup.tiny:
        whole = run()
        yield _Limit(whole, _failing_once(host, where))
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole = run()
    took = torch.cuda.max_memory_allocated() - held
    yield _Limit(whole, _capped(held + int(0.6 * took)))


@contextlib.contextmanager
def _capped(size: int) -> Iterator[None]:
    before = torch.cuda.get_per_process_memory_fraction()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before)


@contextlib.contextmanager
def _failing_once(host: Host, where: str) -> Iterator[None]:
    """The first forward, backward or sampler's token raises what a card raises."""
    left = [1]

    def fail(*_: object) -> None:
        if left[0]:
            left[0] = 0
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    layer = host.base.model.base_model.layers[0]
    if where == "backward":
        backward = Tensor.backward
        with mock.patch.object(Tensor, "backward", lambda loss, *a, **k: (fail(), backward(loss, *a, **k))[1]):
            yield
        return
    handle = layer.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def _sampler_difference(host: Host, prompts, samples, largest: bool = True) -> float:
    examples = [Example(p, [c.ids for c in row]) for p, row in zip(prompts, samples, strict=True)]
    forced = torch.cat([row for example in host.logprobs(examples) for row in example]).float().cpu()
    drawn = torch.cat([torch.as_tensor(c.logprobs).float().cpu() for row in samples for c in row])
    difference = (forced - drawn).abs()
    return (difference.max() if largest else difference.mean()).item()


def _optimizer(kind: str, device: str) -> tuple[FlatWeights, torch.optim.Optimizer]:
    torch.manual_seed(0)
    flat = FlatWeights({"a": nn.Parameter(torch.randn(500, 400).to(device))})
    return flat, make_optimizer({"policy": flat.master}, TrainConfig(optimizer=kind))


def _optimizer_step(flat: FlatWeights, optimizer: torch.optim.Optimizer, step: int) -> None:
    torch.manual_seed(step)
    flat.gradients()["a"].copy_(torch.randn(500, 400))
    optimizer.step()
