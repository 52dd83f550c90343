"""The output of a command that writes one file line by line: it grows by blocks, is resumed, and is never overwritten.

FILE                    the lines
.FILE.run/inputs.json   options and hashes of the inputs that FILE was started with, to detect changes on --resume
.FILE.run/.lock         one process at a time writes FILE
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, TextIO

from lowalign.config.recipe import MAY_CHANGE
from lowalign.config.yaml_flags import options
from lowalign.durable import json_line, write_json
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.train.lock import lock_folder
from lowalign.train.run_folder import B, Journal
from lowalign.train.signals import Interrupted, StopSignals


class Printed:
    """Lines that go to a stream, such as standard output: as a Journal, but there is nothing to resume."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lines: list[dict[str, Any]] = []

    def resume(self, blocks: Sequence[B]) -> Sequence[B]:
        """All blocks."""
        return blocks

    def fill(self, blocks: Sequence[B], compute: Callable[[B], Sequence[dict[str, Any]]], unit: str) -> None:
        """Print the lines that `compute` returns for each block. There is no progress bar: it would be among them."""
        for block in blocks:
            lines = compute(block)
            self.stream.write("".join(map(json_line, lines)))
            self.stream.flush()
            self.lines += lines


@contextlib.contextmanager
def output_of(config: Any, inputs: Mapping[str, object]) -> Iterator[Journal | Printed]:
    """Where a command's lines go: the file config.out, or standard output.

    config: a config with `out` and `resume`. inputs: what decides the lines besides the options, as JSON values by name.
    Raises UserError for a file that has content unless config.resume, and then unless options and inputs are the same.
    """
    if config.out is None:
        yield Printed(sys.stdout)
    elif config.out.exists() and not config.out.is_file():  # a pipe or a device
        with config.out.open("w") as stream:
            yield Printed(stream)
    else:
        folder = config.out.with_name(f".{config.out.name}.run")
        with lock_folder(folder):
            check_or_write(config, inputs, folder / "inputs.json")
            yield Journal(config.out)


def announce_new_file(config: Any) -> None:
    """With --resume where there is nothing to resume, say so before anything else is logged. config: as in output_of."""
    if config.resume and not config.out.exists():
        log(f"--resume: there is no {config.out} yet; this starts it")


def stoppable(command: Callable[[Any], None], config: Any) -> int:
    """Run a command whose output is `output_of`, until it ends or a signal arrives -> the exit code."""
    try:
        # Only the block in progress is lost, so a signal may arrive anywhere.
        with StopSignals(at_once=True):
            command(config)
            return 0
    except Interrupted as stopped:
        log(f"stopped by {stopped.signal.name}" + ("; go on with the same command and --resume" if config.out else ""))
        return 128 + stopped.signal


def check_or_write(config: Any, inputs: Mapping[str, object], file: Path) -> None:
    """Write what the lines of config.out depend on to `file`, or compare it with what is there. Raises as `output_of` does."""
    now = {name: str(attrgetter(name)(config)) for name, _ in options(type(config)) if name not in MAY_CHANGE}
    now |= {f"the content of {name}": _hash(value) for name, value in inputs.items()}
    if not config.out.exists() or config.out.stat().st_size == 0:
        write_json(file, now)
        return
    if not config.resume:
        raise UserError(f"{config.out} exists: go on with --resume, or choose another --out")
    try:
        before = json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{config.out} cannot be resumed: {file}, which says how it was started, is missing; choose another --out"
        ) from None
    changed = [f"{name}: {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
    if changed:
        listed = "\n  ".join(changed)
        raise UserError(
            f"--resume goes on with {config.out}, but these differ from what it was started with:\n  {listed}\n"
            "Use the same, or choose another --out"
        )


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
