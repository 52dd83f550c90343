"""The part of a card that is left free; the driver's answers are given."""

import pytest
import torch

from lowalign.model.base import card_memory

GIB = 2**30


@pytest.fixture
def card(monkeypatch):
    """A card of 24 GiB with 20 free, of which PyTorch holds 3 and uses 2. -> the limits that are set."""
    limits = []
    answers = {
        "mem_get_info": lambda index: (20 * GIB, 24 * GIB),
        "memory_reserved": lambda index: 3 * GIB,
        "memory_allocated": lambda index: 2 * GIB,
        "current_device": lambda: 1,
        "get_per_process_memory_fraction": lambda index: limits[-1][0] if limits else 1.0,
        "set_per_process_memory_fraction": lambda fraction, index: limits.append((fraction, index)),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return limits


@pytest.mark.parametrize("device,index", [("cuda", 1), ("cuda:0", 0), (torch.device("cuda", 3), 3)])
def test_all_but_what_is_left_free(device, index, card):
    card_memory.limit(device, 0.75)
    assert card == [(22.25 / 24, index)]  # 20 free and 3 that are PyTorch's already, less 0.75
    assert card_memory.free(device, 0.75) == 20.25 * GIB  # less the 2 in use


def test_a_lower_limit_is_kept(card):
    """Such as that of a benchmark which makes a large card a small one."""
    torch.cuda.set_per_process_memory_fraction(0.5, 0)
    card_memory.limit("cuda:0", 0.7)
    assert card[-1] == (0.5, 0)
    card_memory.limit("cuda:0", 50.0)  # more than there is: the allocator refuses the first tensor
    assert card[-1] == (0.0, 0)
