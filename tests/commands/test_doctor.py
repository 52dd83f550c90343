"""The doctor reports what the machine has, and finds what is broken."""

import importlib

import pytest
import torch

from lowalign.cli import main
from lowalign.commands import doctor


@pytest.mark.parametrize("name", ["torch", "transformers", "peft", "bitsandbytes", "datasets", "safetensors"])
def test_versions_are_those_of_the_modules(name):
    assert doctor.versions()[name] == importlib.import_module(name).__version__


def test_what_it_prints(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["torch", torch.__version__] for line in lines)
    states = {line[6:22].strip(): line.split()[0] for line in lines if line.split()[0] in ("ok", "no", "FAIL")}
    assert set(states) == {
        *("versions", "memory", "disk", "device", "bfloat16", "4-bit base"),
        *("paged optimizer", "packed attention", "7B model"),
    }
    assert states["4-bit base"] == "ok"
    assert states["device"] == ("ok" if torch.cuda.is_available() else "no")


def test_a_wrong_4_bit_kernel_fails(monkeypatch, capsys):
    """Dequantized weights are 2 % too large, so that the layer and its separate dequantization disagree."""
    import bitsandbytes.functional as F

    right = F.dequantize_4bit
    monkeypatch.setattr(F, "dequantize_4bit", lambda *a, **k: right(*a, **k) * 1.02)
    state, note = doctor._nf4()
    assert state == "FAIL"
    assert "off by 2.0%" in note


def test_a_requirement_that_is_not_met_fails(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda _: ["torch>=99", "no-such-package>=1", "trl; extra == 'bench'"]
    )
    state, note = doctor._ranges()
    assert state == "FAIL"
    assert f"torch>=99, found {torch.__version__}" in note
    assert "no-such-package>=1 is missing" in note
    assert "trl" not in note
    assert main(["doctor"]) == 1
    assert "FAIL  versions" in capsys.readouterr().out


def test_an_exception_in_a_check_is_a_finding():
    def broken():
        raise OSError("libcuda is gone")

    assert doctor._try("device", broken) == ("FAIL", "device", "OSError: libcuda is gone")


@pytest.mark.gpu
def test_on_a_gpu_everything_works():
    for check in (doctor._device, doctor._bfloat16, doctor._nf4, doctor._paging, doctor._attention):
        assert check()[0] == "ok", check
