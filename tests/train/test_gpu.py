"""What only a CUDA device shows: paging, before and after a resume, and parking."""

import pytest
import torch
from torch import nn

from lowalign.config.sections import TrainConfig
from lowalign.model.adapters.flat import FlatWeights
from lowalign.train.optim import load_state, make_optimizer, move_state, paged_state_is_managed, read_state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _new(kind: str) -> tuple[dict[str, FlatWeights], torch.optim.Optimizer]:
    torch.manual_seed(0)
    shapes = {"large": (400, 300), "small": (50, 100)}
    flats = {name: FlatWeights({"a": nn.Parameter(torch.randn(shape).cuda())}) for name, shape in shapes.items()}
    return flats, make_optimizer({name: f.master for name, f in flats.items()}, TrainConfig(optimizer=kind))


def _step(flats: dict[str, FlatWeights], optimizer: torch.optim.Optimizer, step: int) -> None:
    torch.manual_seed(step)
    for flat in flats.values():
        flat.gradients()["a"].copy_(torch.randn(flat.gradients()["a"].shape))
    optimizer.step()


@pytest.mark.parametrize("kind", ["paged_adamw_8bit", "adamw_8bit", "adamw"])
def test_state_is_paged_before_and_after_a_resume_which_is_bit_exact(kind, capsys):
    flats, optimizer = _new(kind)
    notice = '"small" has 5,120 weights: its optimizer state is too small to page and stays on the GPU'
    assert (notice in capsys.readouterr().err) == (kind == "paged_adamw_8bit")
    for step in range(3):
        _step(flats, optimizer, step)
    paged = {"large": kind == "paged_adamw_8bit", "small": False}
    assert paged_state_is_managed(optimizer) == paged

    again, resumed = _new(kind)
    for name, flat in flats.items():
        again[name].load(flat.tensors())
    load_state(resumed, *read_state(optimizer))
    assert paged_state_is_managed(resumed) == paged
    for step in range(3, 6):
        _step(flats, optimizer, step)
        _step(again, resumed, step)
    assert paged_state_is_managed(resumed) == paged
    for name, flat in flats.items():
        assert torch.equal(flat.tensors()["a"], again[name].tensors()["a"])


@pytest.mark.parametrize("kind", ["adamw_8bit", "adamw"])
def test_an_adapter_parked_in_cpu_memory_comes_back_as_it_was(kind):
    (flats, optimizer), (stayed, reference) = _new(kind), _new(kind)
    for each in ((flats, optimizer), (stayed, reference)):
        _step(*each, 0)
    for device in ("cpu", "cuda"):
        flats["large"].move(device)
        move_state(optimizer, "large", device)
        assert flats["large"].master.device.type == flats["large"].master.grad.device.type == device
    for each in ((flats, optimizer), (stayed, reference)):
        _step(*each, 1)
    assert torch.equal(flats["large"].master, stayed["large"].master)
