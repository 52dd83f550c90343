"""Checkpoints: written atomically, verified before use, rotated after a newer one is complete.

    OUT/checkpoints/step-000040/   weights.safetensors   fp32 weights, ADAPTER/TENSOR
                                   optimizer.safetensors optimizer state, ADAPTER/KEY
                                   method.safetensors    the method's tensors
                                   state.json            step, JSON values, size and sha256 of the three files
    OUT/checkpoints/best/weights.safetensors             weights with the lowest held-out loss (ppo: highest reward); step in its metadata

Random states are not stored: the engine seeds torch from (seed, step) before each step.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowalign import processes
from lowalign.durable import file_hash, new_folder, remove_folder, remove_leftovers, sync, write_file, write_point
from lowalign.errors import UserError
from lowalign.log import log

FORMAT = 1
PARTS = ("weights", "optimizer", "method")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. state: the argument of `save`."""

    folder: Path
    step: int
    state: dict

    def read(self, part: str) -> dict[str, Tensor]:
        """The tensors of one of PARTS, in CPU memory."""
        return load_file(self.folder / f"{part}.safetensors")


def save(out: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: dict, keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`.

    parts: for each of PARTS, tensors in CPU memory. Raises UserError when a weight is not finite or writing fails; the
    earlier checkpoints are then untouched.
    """
    folder = _folder(out, step)
    _refuse_not_finite(out, step, parts["weights"])
    with _explained(folder, out, _bytes(parts)), new_folder(folder) as temp:
        write_point("save-begin")
        files = {}
        for part in PARTS:
            path = temp / f"{part}.safetensors"
            save_file(dict(parts[part]), path)
            sync(path)
            files[path.name] = _fingerprint(path)
            write_point(f"save-{part}")
        record = {"format": FORMAT, "step": step, "files": files, "state": state}
        (temp / "state.json").write_text(json.dumps(record, indent=1) + "\n")
        sync(temp / "state.json")
        write_point("save-state")
    write_point("save-renamed")
    _rotate(out, step, keep)
    return folder


def save_best(out: Path, step: int, weights: Mapping[str, Tensor]) -> None:
    """Write these weights as the best so far, in place of the last best. Raises UserError like `save`."""
    path = out / "checkpoints" / "best" / "weights.safetensors"
    _refuse_not_finite(out, step, weights)
    with _explained(path, out, _bytes({"weights": weights})):
        write_file(path, lambda temp: save_file(dict(weights), temp, {"step": str(step)}), "best")


def read_best(out: Path) -> tuple[int, dict[str, Tensor]] | None:
    """(step, weights by ADAPTER/TENSOR) with the lowest held-out loss; None when there was no evaluation."""
    path = out / "checkpoints" / "best" / "weights.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def by_adapter(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Weights named ADAPTER/TENSOR, by adapter and tensor."""
    adapters: dict[str, dict[str, Tensor]] = {}
    for full, tensor in weights.items():
        adapter, _, name = full.partition("/")
        adapters.setdefault(adapter, {})[name] = tensor
    return adapters


def newest_valid(out: Path) -> Checkpoint | None:
    """The newest checkpoint that passes verification; damaged newer ones are logged and skipped."""
    for step in reversed(steps(out)):
        folder = _folder(out, step)
        try:
            return Checkpoint(folder, step, _verified(folder, step))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log(f"checkpoint {folder} is damaged and skipped: {error}")
    return None


def at_step(out: Path, step: int) -> Checkpoint:
    """The checkpoint of a step. Raises UserError when there is none, or it is damaged."""
    if step not in steps(out):
        there = ", ".join(map(str, steps(out))) or "none"
        raise UserError(f"{out} has no checkpoint of step {step}; there are: {there}")
    folder = _folder(out, step)
    try:
        return Checkpoint(folder, step, _verified(folder, step))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {error}") from error


def steps(out: Path) -> list[int]:
    """The steps of all checkpoints, in ascending order."""
    matches = (re.fullmatch(r"step-(\d+)", p.name) for p in (out / "checkpoints").glob("step-*"))
    return sorted(int(match[1]) for match in matches if match)


def starting_point(out: Path, resume: bool) -> Checkpoint | None:
    """The checkpoint to continue from; None to start from the beginning. Raises UserError unless OUT fits `resume`."""
    if not processes.is_main():
        step = processes.from_main(None)
        return None if step is None else at_step(out, step)
    newest = newest_valid(out) if resume else None
    if newest is not None:
        log(f"resuming from {newest.folder}")
    elif steps(out):
        why = "no checkpoint is intact" if resume else "there are checkpoints of an earlier run: go on with --resume"
        raise UserError(f"{out}: {why}; or choose another --out")
    elif resume:
        log(f"{out} has no checkpoint to resume: starting from the beginning")
    clean(out, best=newest is None)
    processes.from_main(None if newest is None else newest.step)
    return newest


def clean(out: Path, best: bool) -> None:
    """Remove incomplete files of a killed run; with `best`, also the best weights of an earlier run."""
    folder = out / "checkpoints"
    if best:
        shutil.rmtree(folder / "best", ignore_errors=True)
    for place in (out, folder, folder / "best"):
        remove_leftovers(place)


def check_space(out: Path, one: int, keep: int) -> None:
    """Raises UserError unless the disk has room for `keep` checkpoints of `one` bytes, the best, and one being written."""
    existing = sum(p.stat().st_size for p in (out / "checkpoints").rglob("*") if p.is_file())
    needed, free = one * (keep + 2) - existing, shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"not enough disk space for checkpoints in {out}: {needed:,} bytes are needed ({keep + 2} of {one:,}), "
            f"{free:,} are free; make room, lower --train.keep or choose another --out"
        )


def _folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:06d}"


def _bytes(parts: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(t.nbytes for tensors in parts.values() for t in tensors.values())


def _fingerprint(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def _verified(folder: Path, step: int) -> dict:
    """The state of a checkpoint. Raises OSError, ValueError, KeyError or TypeError when it is damaged."""
    record = json.loads((folder / "state.json").read_text())
    if record["format"] != FORMAT or record["step"] != step:
        raise ValueError(f"state.json is of format {record['format']}, step {record['step']}")
    for part in PARTS:
        name = f"{part}.safetensors"
        if _fingerprint(folder / name) != record["files"][name]:
            raise ValueError(f"{name} is not the file that was written")
    return record["state"]


def _rotate(out: Path, step: int, keep: int) -> None:
    # A checkpoint of a later step is damaged (the run resumed from an earlier one), so it does not count as newer.
    for old in [s for s in steps(out) if s <= step][: -max(1, keep)]:
        remove_folder(_folder(out, old), "rotate-aside")
    write_point("rotate-done")


def _refuse_not_finite(out: Path, step: int, weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"after step {step} {name} holds NaN or infinity; it was not saved. {last(out)} "
                "Start anew with a lower --train.learning-rate."
            )


@contextlib.contextmanager
def _explained(path: Path, out: Path, needed: int) -> Iterator[None]:
    """Turn a failed write into a UserError that names the last intact checkpoint."""
    try:
        yield
    # On a full disk safetensors, Python and torch raise different errors.
    except (SafetensorError, OSError, RuntimeError) as error:
        free = shutil.disk_usage(out).free
        raise UserError(
            f"{path} could not be written ({error}). It needs {needed:,} bytes; {free:,} are free on that disk. "
            f"{last(out)} Make room and go on with --resume."
        ) from error


def last(out: Path) -> str:
    """A sentence that names the last checkpoint."""
    saved = steps(out)
    return f"The last checkpoint, {_folder(out, saved[-1])}, is intact." if saved else "There is no earlier checkpoint."
