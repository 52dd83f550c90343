"""Optimizers, their state on disk, and the schedule."""

import math
import warnings

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowalign.config.sections import TrainConfig
from lowalign.errors import UserError
from lowalign.model.adapters.flat import FlatWeights
from lowalign.train.optim import (
    free_paged_state,
    load_state,
    make_optimizer,
    move_state,
    paged_state_is_managed,
    read_state,
    schedule,
    state_bytes,
)

KINDS = ("auto", "paged_adamw_8bit", "adamw_8bit", "adamw")
SHAPES = {"a": (70, 64), "b": (4099,), "c": (65, 64)}


def _parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def _gradients(step: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(100 + step)
    return {name: torch.randn(shape) * 10.0 ** -(step % 3) for name, shape in SHAPES.items()}


def _step(flats: dict[str, FlatWeights], optimizer: torch.optim.Optimizer, step: int) -> None:
    for i, flat in enumerate(flats.values()):
        flat.zero_grad()
        for name, gradient in _gradients(step + 50 * i).items():
            flat.gradients()[name].copy_(gradient)
    optimizer.step()


def _new(kind: str, **changes: object) -> tuple[dict[str, FlatWeights], torch.optim.Optimizer]:
    flats = {name: FlatWeights(_parameters()) for name in ("policy", "value")}
    config = TrainConfig(optimizer=kind, learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), **changes)
    return flats, make_optimizer({name: flat.master for name, flat in flats.items()}, config)


@pytest.mark.parametrize("kind", KINDS)
def test_flat_update_is_that_of_the_stock_optimizer_on_separate_tensors(kind):
    """Bit for bit: no 8-bit block holds two tensors."""
    flats, optimizer = _new(kind)
    plain = _parameters()
    stock = torch.optim.AdamW if kind == "adamw" else bnb.optim.AdamW8bit
    reference = stock(plain.values(), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(6):
        _step(flats, optimizer, step)
        for name, gradient in _gradients(step).items():
            plain[name].grad = gradient
        reference.step()
    for name, view in flats["policy"].tensors().items():
        assert torch.equal(view, plain[name])


@pytest.mark.parametrize("kind", KINDS)
def test_state_through_a_file_continues_bit_for_bit(kind, tmp_path):
    flats, optimizer = _new(kind)
    for step in range(3):
        _step(flats, optimizer, step)
    tensors, numbers = read_state(optimizer)
    save_file(tensors, tmp_path / "state.safetensors")
    held = {name: flat.master.detach().clone() for name, flat in flats.items()}
    for step in range(3, 7):
        _step(flats, optimizer, step)

    again, resumed = _new(kind)
    for name, flat in again.items():
        flat.master.data.copy_(held[name])
    load_state(resumed, load_file(tmp_path / "state.safetensors"), numbers)
    for step in range(3, 7):
        _step(again, resumed, step)
    for name, flat in flats.items():
        assert torch.equal(flat.master, again[name].master)
    one, other = read_state(optimizer), read_state(resumed)
    assert one[1] == other[1] and one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][key], other[0][key]) for key in one[0])
    if kind != "adamw":
        assert one[0]["policy/state1"].dtype == torch.uint8


def test_state_of_another_optimizer_is_refused():
    flats, optimizer = _new("adamw")
    _step(flats, optimizer, 0)
    for kind, saved in (("adamw_8bit", read_state(optimizer)), ("adamw", _stepped_8bit())):
        _, other = _new(kind)
        with pytest.raises(UserError, match='the optimizer state of "policy" is another optimizer\'s'):
            load_state(other, *saved)


def _stepped_8bit() -> tuple[dict, dict]:
    flats, optimizer = _new("adamw_8bit")
    _step(flats, optimizer, 0)
    return read_state(optimizer)


def test_state_is_loaded_into_the_buffers_that_bitsandbytes_makes(monkeypatch):
    """On CUDA those are in managed memory; a copy of them would not be."""
    flats, optimizer = _new("adamw_8bit")
    _step(flats, optimizer, 0)
    buffers: list[torch.Tensor] = []
    original = bnb.optim.AdamW8bit.get_state_buffer

    def spy(self, p, dtype=torch.float32):
        buffers.append(original(self, p, dtype))
        return buffers[-1]

    monkeypatch.setattr(bnb.optim.AdamW8bit, "get_state_buffer", spy)
    again, resumed = _new("adamw_8bit")
    load_state(resumed, *read_state(optimizer))
    assert paged_state_is_managed(resumed) == {"policy": False, "value": False}
    monkeypatch.setattr(resumed.page_mng, "paged_tensors", buffers)
    assert paged_state_is_managed(resumed) == {"policy": True, "value": True}
    _step(again, resumed, 1)
    assert paged_state_is_managed(resumed) == {"policy": True, "value": True}
    state = resumed.state[again["value"].master]
    state["state2"] = state["state2"].clone()
    assert paged_state_is_managed(resumed) == {"policy": True, "value": False}


def test_paged_on_cpu_is_one_notice_and_no_warning(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flats, optimizer = _new("paged_adamw_8bit")
        _step(flats, optimizer, 0)
        _step(flats, optimizer, 1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("paged_adamw_8bit: no paging without a GPU")


@pytest.mark.parametrize("kind", ["adamw_8bit", "adamw"])
def test_parked_state_comes_back_as_it_was(kind):
    flats, optimizer = _new(kind)
    _step(flats, optimizer, 0)
    before = read_state(optimizer)[0]
    move_state(optimizer, "value", "meta")
    there = {
        k: t.device.type for g in optimizer.param_groups for k, t in _tensors(optimizer, g) if g["name"] == "value"
    }
    assert set(there.values()) == {"meta"}
    assert all(t.device.type == "cpu" for k, t in _tensors(optimizer, optimizer.param_groups[0]))
    move_state(optimizer, "policy", "cpu")
    after = dict(_tensors(optimizer, optimizer.param_groups[0]))
    assert all(torch.equal(t, before[f"policy/{k}"]) for k, t in after.items())


def _tensors(optimizer: torch.optim.Optimizer, group: dict) -> list[tuple[str, torch.Tensor]]:
    return [(k, v) for k, v in optimizer.state[group["params"][0]].items() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("kind", KINDS)
def test_state_bytes(kind):
    flats, optimizer = _new(kind)
    _step(flats, optimizer, 0)
    numel = flats["policy"].master.numel()
    moments = ("state1", "state2", "absmax1", "absmax2", "exp_avg", "exp_avg_sq")
    real = sum(
        t.nbytes for key, t in read_state(optimizer)[0].items() if key.split("/") in [["policy", m] for m in moments]
    )
    assert real == state_bytes(TrainConfig(optimizer=kind), numel)


def test_schedule_by_hand():
    def factors(kind: str, warmup: float, steps: int) -> list[float]:
        return [schedule(TrainConfig(schedule=kind, warmup=warmup), step, steps) for step in range(steps)]

    assert factors("constant", 0.5, 4) == [0.5, 1, 1, 1]
    assert factors("linear", 0.2, 10) == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    half = math.sqrt(2) / 4
    assert factors("cosine", 0.0, 4) == pytest.approx([1, 0.5 + half, 0.5, 0.5 - half])
    assert factors("cosine", 0.03, 1) == [1]
    # A rounding error (0.07 · 100 is 7.000000000000001) is not an eighth step of warm-up.
    assert factors("linear", 0.07, 100)[6] == 1 and factors("linear", 0.07, 100)[5] < 1


def test_paged_state_waits_for_the_device(monkeypatch):
    """The host reads and fills managed memory directly, while kernels may still write it: wait before each, and only there."""
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    flats, optimizer = _new("paged_adamw_8bit")
    _step(flats, optimizer, 0)
    tensors, numbers = read_state(optimizer)
    load_state(optimizer, tensors, numbers)
    assert events == []  # on the CPU there is no managed memory

    class Managed(torch.Tensor):
        is_paged = True

        def copy_(self, other):
            events.append("fill")
            return super().copy_(other)

        def detach(self):
            events.append("read")
            return super().detach()

    def manage(state):
        state["state1"] = state["state1"].as_subclass(Managed)

    init = optimizer.init_state
    monkeypatch.setattr(optimizer, "init_state", lambda *a: init(*a) or manage(optimizer.state[a[1]]))
    load_state(optimizer, tensors, numbers)
    assert events == ["wait", "fill"] * 2  # policy, value
    events.clear()
    read_state(optimizer)
    assert events[0] == "wait" and events.count("wait") == 1 and events.count("read") >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_eps(kind):
    """After its first step Adam has moved each weight by lr · g / (|g| + ε)."""
    master = nn.Parameter(torch.zeros(500))
    config = TrainConfig(optimizer=kind, learning_rate=0.1, eps=0.5)
    optimizer = make_optimizer({"policy": master}, config)
    master.grad = torch.linspace(-2, 2, 500)
    optimizer.step()
    want = [-0.1 * g / (abs(g) + 0.5) for g in master.grad.tolist()]
    assert master.tolist() == pytest.approx(want, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind,weights,paged", [
    ("auto", 130_000_000, False),  # 260 MB of state: a hundredth of a card of 24 GB
    ("auto", 140_000_000, True),
    ("paged_adamw_8bit", 200_000, True),
    ("adamw_8bit", 140_000_000, False),
])  # fmt: skip
def test_paged_where_it_frees_memory_worth_it(kind, weights, paged, monkeypatch):
    """Of a card; the masters only say how many weights they have."""
    made = {}
    monkeypatch.setattr(bnb.optim, "AdamW8bit", lambda groups, is_paged, **options: made.update(paged=is_paged))

    class OnCard(nn.Parameter):
        is_cuda = True

    halves = {name: OnCard(torch.empty(weights // 2, device="meta")) for name in ("policy", "value")}
    make_optimizer(halves, TrainConfig(optimizer=kind))
    assert made["paged"] == paged


@pytest.mark.parametrize("found", [True, False])
def test_managed_memory_is_given_back(found, monkeypatch):
    """The calls on a card, with memory of the CPU in the place of the managed: after the device is done, each buffer once,
    none that belongs to another optimizer."""
    from bitsandbytes.cextension import lib

    events = []

    def free(pointer):
        if not found:
            raise RuntimeError("Method 'cudaFree' not available")
        events.append(pointer.value)

    monkeypatch.setattr(lib, "cudaFree", free, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    flats, optimizer = _new("adamw_8bit")
    _step(flats, optimizer, 0)
    monkeypatch.setattr(optimizer.page_mng, "paged_tensors", other := [torch.zeros(3)])
    expected = set()
    for state in optimizer.state.values():
        for key in ("state1", "state2"):
            state[key].is_paged = True
            optimizer.page_mng.paged_tensors.append(state[key])
            expected.add(state[key].data_ptr())
    free_paged_state(optimizer)
    assert events[0] == "wait" and set(events[1:]) == (expected if found else set())
    assert len(events) == 1 + (len(expected) if found else 0)
    assert len(other) == 1 and not optimizer.state
    events.clear()
    free_paged_state(optimizer)
    plain = _new("adamw")[1]
    free_paged_state(plain)
    assert events == []
