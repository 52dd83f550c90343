"""The stored log-probs of the reference are read again only where all that decides them is the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lowalign import Base, Example, Host
from lowalign.config.sections import TrainConfig
from lowalign.data.cache import cache_folder
from lowalign.data.examples import Examples
from lowalign.model.host import completion_logps
from lowalign.train.reference_cache import fill_reference_logps
from lowalign.train.signals import StopSignals
from tests.methods.made import host_with
from tests.tiny import tiny_folder

PAIR = Example([5, 6, 7], [[70, 71, 72, 73], [80, 81]], rank=[0, 1])
OTHERS = {
    "another mask": replace(PAIR, masks=[[True, True, False, False], [True, True]]),
    "another prompt": replace(PAIR, prompt=[5, 6, 8]),
    "another completion": replace(PAIR, completions=[[70, 71, 72, 74], [80, 81]]),
    "another end of the prompt": replace(PAIR, prompt=[5, 6], completions=[[7, 70, 71, 72], [73, 80, 81]]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWALIGN_CACHE", str(tmp_path / "cache"))


def filled(host, example: Example, stack=()) -> list[float]:
    """What it sets in the Example; checked against a forward of its own."""
    example = replace(example)
    fill_reference_logps(host, stack, [example], TrainConfig(batch_size=1), StopSignals())
    with torch.no_grad(), host.use(*stack):
        want = completion_logps(host, [example]).tolist()
    assert example.reference == pytest.approx(want, rel=1e-6, abs=1e-6)
    return example.reference


def files() -> int:
    return len(list(cache_folder().glob("reference-*.safetensors")))


@pytest.mark.parametrize("other", OTHERS)
def test_another_example_is_computed_anew(folder, other):
    host = host_with(folder)
    first = filled(host, PAIR)
    assert filled(host, PAIR) == first and files() == 1
    assert filled(host, OTHERS[other]) != pytest.approx(first, rel=1e-3) and files() == 2


def test_rows_that_are_made_when_asked_for_get_the_same(folder):
    """As a list, also from disk."""
    pairs = [replace(PAIR, prompt=[5, 6, 7 + i]) for i in range(5)]
    host, train = host_with(folder), TrainConfig(batch_size=2)
    as_list = [replace(pair) for pair in pairs]
    fill_reference_logps(host, (), as_list, train, StopSignals())
    for _ in range(2):
        made = Examples([[replace(pair) for pair in pairs]], places=np.arange(5))
        fill_reference_logps(host, (), made, train, StopSignals())
        assert [e.reference for e in made] == [e.reference for e in as_list] and made.parts[0][0].reference is None
    assert files() == 1


def test_another_dtype_is_computed_anew(folder):
    """The weights on disk are the same, and bfloat16 rounds what is computed with them."""
    values = []
    for dtype in ("float32", "bfloat16"):
        host = Host(Base.load(folder, quantization="none", dtype=dtype, device="cpu", quiet=True))
        values.append(filled(host, PAIR))
    assert values[0] != pytest.approx(values[1], rel=1e-5) and files() == 2


def test_other_weights_of_the_reference_are_computed_anew(folder):
    host = host_with(folder)
    bare, first = filled(host, PAIR), filled(host, PAIR, ("policy",))
    with torch.no_grad():
        host.adapters["policy"].file_parameters()[next(iter(host.adapters["policy"].file_parameters()))].add_(0.5)
    assert bare != first != filled(host, PAIR, ("policy",)) and files() == 3
