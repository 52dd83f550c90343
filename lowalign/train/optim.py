"""AdamW (32-bit, 8-bit, paged 8-bit) on flat fp32 weights, the learning-rate schedule, optimizer state as tensors."""

import contextlib
import ctypes
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowalign.config.sections import TrainConfig
from lowalign.errors import UserError
from lowalign.log import log

PAGED_FROM = 100_000  # elements; bitsandbytes does not page smaller states
PAGING_PAYS = 2**28  # bytes of state; less is a hundredth of a card of 24 GB (rank 16 on an 8B: 84 MB)


def make_optimizer(masters: Mapping[str, nn.Parameter], config: TrainConfig) -> Optimizer:
    """AdamW with one parameter group per adapter: its name and its flat master. auto: paged where that frees memory worth it."""
    groups = [{"name": name, "params": [master]} for name, master in masters.items()]
    options = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    cuda = all(master.is_cuda for master in masters.values())
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=cuda, **options)

    import bitsandbytes as bnb  # the import takes seconds

    size = state_bytes(config, sum(master.numel() for master in masters.values()))
    paged = config.optimizer == "paged_adamw_8bit" or (config.optimizer == "auto" and cuda and size >= PAGING_PAYS)
    if paged and not cuda:
        log("paged_adamw_8bit: no paging without a GPU; the optimizer state stays in memory, with the same results")
    for name, master in masters.items():
        if paged and cuda and master.numel() < PAGED_FROM:
            log(
                f'"{name}" has {master.numel():,} weights: its optimizer state is too small to page and stays on the GPU'
            )
    return bnb.optim.AdamW8bit(groups, is_paged=paged and cuda, **options)


def schedule(config: TrainConfig, step: int, steps: int) -> float:
    """Learning-rate factor at `step` (from 0) of `steps`.

    Rises linearly to 1 over ceil(warmup · steps) steps, then follows the schedule; it is never 0.
    """
    warmup = math.ceil(config.warmup * steps - 1e-9)  # 0.07 · 100 is 7.000000000000001
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def state_bytes(config: TrainConfig, numel: int) -> int:
    """Bytes of optimizer state for that many weights."""
    return 8 * numel if config.optimizer == "adamw" else 2 * numel + 8 * math.ceil(numel / 256)


def read_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The state as (tensors, numbers), by ADAPTER/KEY. The tensors are copies in CPU memory."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, int] = {}
    _wait_for_paged(optimizer)
    for name, state in _states(optimizer):
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach().to("cpu", copy=True)
            else:
                numbers[f"{name}/{key}"] = value
    return tensors, numbers


def load_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
    """Restore what `read_state` returned, bit for bit. Raises UserError when the state is another optimizer's.

    bitsandbytes' own load_state_dict would copy paged state into ordinary GPU memory. Here bitsandbytes allocates its
    buffers again (paged ones in managed memory), and they are filled.
    """
    saved: dict[str, dict] = {}
    for full, value in {**tensors, **numbers}.items():
        name, _, key = full.partition("/")
        saved.setdefault(name, {})[key] = value
    if not saved:  # saved before the first step
        return
    if isinstance(optimizer, torch.optim.AdamW):
        expected = {"step", "exp_avg", "exp_avg_sq"}
        _same_optimizer(expected, saved)
        whole = optimizer.state_dict()
        whole["state"] = {i: saved[group["name"]] for i, group in enumerate(optimizer.param_groups)}
        optimizer.load_state_dict(whole)
        return
    for i, group in enumerate(optimizer.param_groups):
        master = group["params"][0]
        optimizer.init_state(group, master, i, 0)
        state = optimizer.state[master]
        _same_optimizer(set(state), {group["name"]: saved.get(group["name"], {})})
        _wait_for_paged(optimizer)
        for key, value in saved[group["name"]].items():
            if isinstance(value, Tensor):
                state[key].copy_(value)
            else:
                state[key] = value


def paged_state_is_managed(optimizer: Optimizer) -> dict[str, bool]:
    """For each adapter, whether all of its 8-bit state is in managed memory, which the driver can page out."""
    managed = {id(t) for t in optimizer.page_mng.paged_tensors} if hasattr(optimizer, "page_mng") else set()
    return {
        name: "state1" in state and all(id(state[key]) in managed for key in ("state1", "state2"))
        for name, state in _states(optimizer)
    }


def free_paged_state(optimizer: Optimizer) -> None:
    """Give managed memory back, at the end of a run; the optimizer has no state then. bitsandbytes keeps it for the life of
    the process (0.50), so stages in one process would add up."""
    paged = [v for _, state in _states(optimizer) for v in state.values() if getattr(v, "is_paged", False)]
    if not paged:
        return
    from bitsandbytes.cextension import lib

    torch.cuda.synchronize()
    mine = {id(tensor) for tensor in paged}
    known = optimizer.page_mng.paged_tensors
    known[:] = [tensor for tensor in known if id(tensor) not in mine]
    pointers = [tensor.data_ptr() for tensor in paged]
    optimizer.state.clear()
    paged.clear()
    with contextlib.suppress(RuntimeError):  # some libraries do not show the runtime's functions
        for pointer in pointers:
            # Of the runtime that bitsandbytes is linked with, which allocated it.
            lib.cudaFree(ctypes.c_void_p(pointer))


def move_state(optimizer: Optimizer, name: str, device: torch.device | str) -> None:
    """Move the state of an idle adapter to CPU memory, or back. Paged state is left to the driver."""
    state = dict(_states(optimizer))[name]
    for key, value in state.items():
        if isinstance(value, Tensor) and not getattr(value, "is_paged", False):
            state[key] = value.to(device)


def _wait_for_paged(optimizer: Optimizer) -> None:
    """Before the host reads or fills paged state: kernels may still write it, and the host sees the memory directly."""
    if any(getattr(value, "is_paged", False) for _, state in _states(optimizer) for value in state.values()):
        torch.cuda.synchronize()


def _states(optimizer: Optimizer) -> Iterator[tuple[str, dict]]:
    for group in optimizer.param_groups:
        yield group["name"], optimizer.state.get(group["params"][0], {})


def _same_optimizer(expected: set[str], saved: Mapping[str, Mapping]) -> None:
    for name, state in saved.items():
        if set(state) != expected:
            raise UserError(
                f'the optimizer state of "{name}" is another optimizer\'s (it has {", ".join(sorted(state)) or "nothing"}); '
                "resume with the --train.optimizer the run was started with"
            )
