"""Several processes of one run, as torchrun or `accelerate launch` start them.

Each has the base and all adapters, draws the same rows, and computes its share of a step; gradients, sums and samples are
then put together, so that all stay equal. Process 0 writes the files and the log. Without a launcher there is one process,
and nothing here communicates.
"""

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lowalign.errors import UserError

if TYPE_CHECKING:  # the command line imports this module, and answers --help without torch
    from torch import Tensor

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets
PATIENCE = datetime.timedelta(hours=2)  # one process may tokenize or save while the others wait


def count() -> int:
    """Number of processes of the run."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in LAUNCHER) else 1


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def is_main() -> bool:
    """Whether this process writes the files and the log."""
    return rank() == 0


def device() -> str:
    """The device of this process: a card of its own, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if count() > 1 else "cuda"


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the other processes for the duration of a run. May be nested. Raises UserError when they cannot be reached."""
    import torch
    import torch.distributed as dist

    if count() == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        local, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= cards:
            raise UserError(f"process {rank()} has no card: this machine has {cards}; start as many processes as cards")
        torch.cuda.set_device(local)
    with _explained():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(lengths: Sequence[int]) -> list[int]:
    """Which of these rows this process computes, in ascending order: the longest first, each to the process with the fewest
    tokens so far. All processes get the same division."""
    tokens, own = [0] * count(), []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = tokens.index(min(tokens))
        tokens[least] += lengths[i]
        if least == rank():
            own.append(i)
    return sorted(own)


def sum_(tensor: "Tensor") -> None:
    """Replace a tensor by its sum over the processes; all get the same bits."""
    if count() > 1:
        import torch.distributed as dist

        with _explained():
            dist.all_reduce(tensor)


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank. value: JSON."""
    if count() == 1:
        return [value]
    import torch
    import torch.distributed as dist

    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    with _explained():
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count())]
        dist.all_gather(sizes, torch.tensor([len(content)]))
        parts = [torch.zeros(max(map(int, sizes)), dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, torch.cat([content, parts[0][len(content) :]]))
    return [json.loads(bytes(part[: int(size)].numpy())) for part, size in zip(parts, sizes, strict=True)]


def gather_shares(own: Sequence[int], values: Sequence[Any], total: int) -> list[Any]:
    """The values of `total` rows, of which each process has some. own: the rows of `values`, which are JSON."""
    whole: list[Any] = [None] * total
    for indices, part in gather([list(own), list(values)]):
        for i, value in zip(indices, part, strict=True):
            whole[i] = value
    return whole


def from_main(value: Any) -> Any:
    """The value that process 0 has, as JSON."""
    return gather(value if is_main() else None)[0]


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Process 0 does the block before the others, which then find what it has put into a cache."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def wait() -> None:
    """Go on when all processes are here."""
    gather(None)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """torch's error when a process has gone, as a UserError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"another process of this run has ended or cannot be reached: {reason}. Its message says why; go on with the "
            "same command and --resume"
        ) from error
