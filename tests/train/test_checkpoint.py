"""What is on the disk: whole, verified, rotated."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lowalign.errors import UserError
from lowalign.train import checkpoint, lock
from tests.train import toy

WEIGHTS = {"policy/a": torch.arange(6.0).view(2, 3), "policy/b": torch.tensor([1e-30, -0.0, 3.0])}


def _save(out: Path, step: int, keep: int = 2, **changes: object) -> Path:
    parts = {"weights": WEIGHTS, "optimizer": {"policy/state1": torch.arange(9, dtype=torch.uint8)}, "method": {}}
    return checkpoint.save(out, step, parts | changes, {"number": 0.1 + 0.2, "step": step}, keep)


def _names(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path):
    folder = _save(tmp_path, 40)
    assert folder == tmp_path / "checkpoints" / "step-000040"
    newest = checkpoint.newest_valid(tmp_path)
    assert (newest.folder, newest.step, newest.state) == (folder, 40, {"number": 0.1 + 0.2, "step": 40})
    for name, tensor in newest.read("weights").items():
        assert torch.equal(tensor, WEIGHTS[name]) and torch.equal(tensor.signbit(), WEIGHTS[name].signbit())
    assert newest.read("optimizer")["policy/state1"].tolist() == list(range(9)) and newest.read("method") == {}


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    checkpoint.save_best(tmp_path, 5, WEIGHTS)
    for step in (2, 10, 100, 1_000_000):
        _save(tmp_path, step)
    assert _names(tmp_path) == ["best", "step-000100", "step-1000000"]
    assert checkpoint.steps(tmp_path) == [100, 1_000_000]
    _save(tmp_path, 1_000_001, keep=1)
    assert checkpoint.steps(tmp_path) == [1_000_001] and checkpoint.read_best(tmp_path)[0] == 5


def test_rotation_never_drops_the_one_just_written_for_a_later_damaged_one(tmp_path):
    for step in (10, 20):
        _save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000020" / "weights.safetensors").write_bytes(b"")
    _save(tmp_path, 15, keep=1)
    assert checkpoint.newest_valid(tmp_path).step == 15
    _save(tmp_path, 20, keep=1)  # takes the damaged one's place
    assert checkpoint.newest_valid(tmp_path).step == 20 and _names(tmp_path) == ["step-000020"]


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit flipped": lambda f: _flip_a_bit(f / "weights.safetensors"),
    "cut short": lambda f: os.truncate(f / "optimizer.safetensors", 20),
    "a byte more": lambda f: (f / "method.safetensors").open("ab").write(b"x"),
    "a file missing": lambda f: (f / "weights.safetensors").unlink(),
    "no state": lambda f: (f / "state.json").unlink(),
    "half a state": lambda f: os.truncate(f / "state.json", 100),
    "no JSON object": lambda f: (f / "state.json").write_text("[]"),
    "not text": lambda f: (f / "state.json").write_bytes(b"\xff\xfe"),
    "another step's": lambda f: (f / "state.json").write_text((f / "state.json").read_text().replace("20", "21")),
    "another format": lambda f: (f / "state.json").write_text(
        (f / "state.json").read_text().replace('format": 1', 'format": 9')
    ),
    "a file instead": lambda f: (shutil.rmtree(f), f.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, capsys, damage):
    _save(tmp_path, 10)
    folder = _save(tmp_path, 20)
    DAMAGE[damage](folder)
    assert checkpoint.newest_valid(tmp_path).step == 10
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"checkpoint {folder} is damaged and skipped: ")


def test_a_damaged_checkpoint_costs_steps_and_no_bits(tmp_path):
    straight, _, _ = toy.run(tmp_path / "straight")
    toy.run(tmp_path / "run", hook=toy.signal_at(7))
    _flip_a_bit(tmp_path / "run" / "checkpoints" / "step-000007" / "optimizer.safetensors")
    host, _, _ = toy.run(tmp_path / "run", resume=True)
    assert torch.equal(toy.weights(host), toy.weights(straight))


def test_nothing_is_lost_when_no_checkpoint_is_whole(tmp_path):
    toy.run(tmp_path)
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        os.truncate(folder / "optimizer.safetensors", 20)
    before = _names(tmp_path)
    with pytest.raises(UserError, match="no checkpoint is intact; or choose another --out"):
        toy.run(tmp_path, resume=True)
    assert _names(tmp_path) == before


def test_a_fresh_run_does_not_go_over_an_earlier_one(tmp_path, capsys):
    toy.run(tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="there are checkpoints of an earlier run: go on with --resume"):
        toy.run(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    capsys.readouterr()
    toy.run(tmp_path / "new", resume=True)
    assert "has no checkpoint to resume: starting from the beginning" in capsys.readouterr().err


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    toy.run(tmp_path)
    method = toy.ToyMethod(toy.ToyHost(), {"value": 1.0})
    with pytest.raises(UserError, match="step-000008 is of the adapters policy, not of value"):
        toy.run(tmp_path, method=method, resume=True)


def test_left_overs_of_a_killed_run_are_removed(tmp_path):
    toy.run(tmp_path, hook=toy.signal_at(3))
    checkpoints = tmp_path / "checkpoints"
    for name in (".saving-step-000006", ".old-step-000001"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "weights.safetensors").write_bytes(b"half")
    for file in (
        checkpoints / "best" / ".saving-weights.safetensors-0a1b2c3d",
        tmp_path / ".saving-metrics.jsonl-0a1b2c3d",
    ):
        file.write_bytes(b"half")
    toy.run(tmp_path, resume=True)
    assert not [p for p in tmp_path.rglob(".*") if p.name != ".lock"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, value):
    _save(tmp_path, 10)
    weights = WEIGHTS | {"policy/b": torch.tensor([0.0, value, 1.0])}
    for write in (lambda: _save(tmp_path, 11, weights=weights), lambda: checkpoint.save_best(tmp_path, 11, weights)):
        with pytest.raises(UserError, match=r"after step 11 policy/b holds NaN or infinity; .*step-000010, is intact"):
            write()
    assert _names(tmp_path) == ["step-000010"]


# -- the disk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error"), OSError(28, "No space left on device"), RuntimeError("write")]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_failed_write_is_told_and_leaves_nothing(tmp_path, monkeypatch, error, first):
    """Three libraries raise three classes of error on a full disk."""
    if not first:
        _save(tmp_path, 10)
    before = _names(tmp_path) if not first else []

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    last = (
        f"The last checkpoint, {tmp_path}/checkpoints/step-000010, is intact." if not first else "There is no earlier"
    )
    for write, path in (
        (lambda: _save(tmp_path, 20), "step-000020"),
        (lambda: checkpoint.save_best(tmp_path, 20, WEIGHTS), "best/weights.safetensors"),
    ):
        with pytest.raises(UserError) as caught:
            write()
        text = str(caught.value)
        # 9 fp32 weights, and 9 bytes of optimizer state in a whole checkpoint
        needed = 45 if path == "step-000020" else 36
        assert text.startswith(f"{tmp_path}/checkpoints/{path} could not be written ({error}). It needs {needed} bytes")
        assert last in text
    assert [name for name in _names(tmp_path) if name != "best"] == before and not list(tmp_path.rglob(".saving*"))


def _resume_on_a_full_disk(out: Path, limit: int, changes: dict) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        toy.run(out, resume=True, **changes)
    except UserError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (out / "message").write_text(str(error))
        os._exit(1)


FULL = {  # the largest file that can be written, options, the file that breaks off
    "cutting the metrics": (100, {"eval_every": 0}, "metrics.jsonl cannot be written: File too large"),
    "a line of metrics": (None, {"eval_every": 0}, "metrics.jsonl cannot be written: File too large"),
    "the best weights": (10_000, {}, "best/weights.safetensors could not be written"),
    "the weights": (10_000, {"eval_every": 0}, "step-000006 could not be written"),
    "the optimizer state": (30_000, {"eval_every": 0, "optimizer": "adamw"}, "step-000006 could not be written"),
}


@pytest.mark.parametrize("what", FULL)
def test_a_disk_that_fills_up_in_the_middle_of_a_file(tmp_path, what):
    limit, changes, expected = FULL[what]
    straight, _, _ = toy.run(tmp_path / "straight", **changes)
    out = tmp_path / "run"
    toy.run(out, hook=toy.signal_at(4), **changes)
    before = {p: p.read_bytes() for p in (out / "checkpoints").rglob("*") if p.is_file()}
    limit = limit or (out / "metrics.jsonl").stat().st_size + 20
    assert toy.in_child(_resume_on_a_full_disk, out, limit, changes) == 1
    text = (out / "message").read_text()
    assert expected in text and ("Checkpoints are intact" in text or "step-000004, is intact" in text)
    assert {p: p.read_bytes() for p in (out / "checkpoints").rglob("*") if p.is_file()} == before
    assert not list(out.rglob(".saving*"))
    host, _, _ = toy.run(out, resume=True, **changes)
    assert torch.equal(toy.weights(host), toy.weights(straight))


def test_too_little_space_is_told_before_the_run(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=200_000))
    monkeypatch.setattr(lock, "RESULTS", 0)  # which is more than checkpoints this small take
    with pytest.raises(
        UserError, match=r"not enough disk space .* \d+,\d+ bytes are needed \(4 of \d+,\d+\), 200,000 are free"
    ):
        toy.run(tmp_path, optimizer="adamw")
    assert not (tmp_path / "metrics.jsonl").exists()
    toy.run(tmp_path, optimizer="adamw_8bit")  # 2 bytes of state for a weight instead of 8


def test_the_estimate_is_about_what_a_checkpoint_takes(tmp_path, monkeypatch):
    estimates: list[int] = []
    monkeypatch.setattr(checkpoint, "check_space", lambda out, one, keep: estimates.append(one))
    for kind in ("adamw", "adamw_8bit"):
        toy.run(tmp_path / kind, optimizer=kind)
        folder = checkpoint.newest_valid(tmp_path / kind).folder
        real = sum(p.stat().st_size for p in folder.iterdir())
        assert abs(real - estimates[-1]) < 5000  # headers, maps and state.json, which do not grow with the weights


def test_the_files_are_what_the_format_says(tmp_path):
    """Names by adapter and tensor, fp32, shapes of the module; state.json in plain numbers."""
    host, method, _ = toy.run(tmp_path)
    folder = tmp_path / "checkpoints" / "step-000008"
    assert sorted(p.name for p in folder.iterdir()) == [
        "method.safetensors", "optimizer.safetensors", "state.json", "weights.safetensors",
    ]  # fmt: skip
    saved = load_file(folder / "weights.safetensors")
    named = {f"policy/{name}": p for name, p in host.adapters["policy"].named_parameters()}
    assert saved.keys() == named.keys() and all(torch.equal(saved[name], p) for name, p in named.items())
    assert torch.equal(load_file(folder / "method.safetensors")["rounds"], method.rounds)
    state = json.loads((folder / "state.json").read_text())["state"]
    assert state["method"] == {"seen": 7} and state["optimizer"] == {"policy/step": 8} and state["evaluated"] == 8
