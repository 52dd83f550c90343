"""The rows of a source encoded by several processes, block by block, with the results of one process.

The processes are new ones, not forks: this one may have threads and a device. Each is told a stretch of a file at a time and sends
what it becomes; it is taken in the order of the stretches. The processes get no Ctrl-C of their own: they end with this one.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from lowalign.config.sections import DataConfig
from lowalign.data import cache
from lowalign.data.blocks import Block, BlockEncoder
from lowalign.data.rows.mapping import Mapping
from lowalign.data.sources.read import FileSource, find_source
from lowalign.data.sources.stretches import Stretch, count, cut
from lowalign.errors import UserError
from lowalign.log import log

STRETCH = 4 * 2**20  # bytes
LARGE = 32 * 2**20  # bytes of files that are worth the start of processes, some seconds each
AHEAD = 32 * 2**20  # bytes of results that may wait for their turn
ENCODERS = ("sft", "preferences")  # that lowalign.data.worker has
START = "import sys; sys.path[:] = sys.argv[2:]; from lowalign.data.worker import main; main(int(sys.argv[1]))"


def process_count(name: str, mapping: Mapping, config: DataConfig, encoder: str) -> int:
    """How many processes encode this source: --data.processes, or by its size."""
    source = find_source(name)
    if not isinstance(source, FileSource) or config.limit or not mapping.row_by_row or encoder not in ENCODERS:
        return 1
    if os.name != "posix" or not sys.executable or sum(path.stat().st_size for path in source.files) < LARGE:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(config.processes or cores, count(source, STRETCH)))


@dataclass
class _Turn:
    """A stretch and what has come of it. waiting: bytes of it."""

    connection: Connection
    messages: deque[tuple[str, Any]] = field(default_factory=deque)
    ended: bool = False


class Workers:
    """Processes that encode the rows of one source. To be used in a `with` block, which ends them."""

    def __init__(self, count: int, encoder: BlockEncoder, mapping: Mapping) -> None:
        """Raises OSError, EOFError or a pickling error where they cannot be started."""
        self._processes: list[tuple[subprocess.Popen, Connection]] = []
        try:
            for _ in range(count):
                self._start()
            job = (
                encoder.chat.tokenizer,
                encoder.chat.arguments,
                mapping.arguments,
                encoder.config,
                encoder.encoder.name,
            )
            for _, connection in self._processes:
                connection.send(job)
            same = [cache.tokenizer_hash(encoder.chat.tokenizer), encoder.chat.templates]
            for _, connection in self._processes:
                if connection.recv() != ("ready", same):
                    raise EOFError("another tokenizer")
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the processes, whatever they do."""
        for process, connection in self._processes:
            connection.close()
            process.kill()
        for process, _ in self._processes:
            process.wait()

    def messages(self, stretches: Iterator[Stretch]) -> Iterator[tuple[str, Any]]:
        """What the processes send, in the order of the stretches. Raises UserError when one of them has ended."""
        order: deque[_Turn] = deque()
        active: dict[Connection, _Turn] = {}
        ahead = 0

        def give(connection: Connection) -> None:
            active.pop(connection, None)
            if (stretch := next(stretches, None)) is not None:
                connection.send(stretch)
                active[connection] = _Turn(connection)
                order.append(active[connection])

        for _, connection in self._processes:
            give(connection)
        while order:
            first = order[0]
            while first.messages:
                message = first.messages.popleft()
                ahead -= _size(message)
                yield message
            if first.ended:
                order.popleft()
                continue
            for connection in wait([first.connection] if ahead > AHEAD else list(active)):
                message = self._receive(connection)
                ahead += _size(message)
                turn = active[connection]
                turn.messages.append(message)
                if message[0] != "block":
                    turn.ended = True
                    give(connection)

    def _start(self) -> None:
        ours, theirs = Pipe()
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", START, str(theirs.fileno()), *sys.path]
        options = {"pass_fds": [theirs.fileno()], "stdin": subprocess.DEVNULL, "start_new_session": True}
        self._processes.append((subprocess.Popen(command, env=environment, **options), ours))
        theirs.close()

    def _receive(self, connection: Connection) -> tuple[str, Any]:
        try:
            return connection.recv()
        except (EOFError, ConnectionError) as error:
            process = next(process for process, own in self._processes if own is connection)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            code = process.returncode
            how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with {code}"
            raise UserError(
                f"a process that tokenizes rows {how}, perhaps for lack of memory. Nothing of the rows is kept; start again, with "
                "fewer processes: --data.processes 1"
            ) from error


def blocks_of(name: str, mapping: Mapping, whole: BlockEncoder, processes: int, bar: Any) -> Iterator[Block]:
    """The blocks of all rows without a group key, encoded by this process or by several; `whole` is left as if it had encoded
    all of them. bar: counts the rows. Raises UserError as reading does."""
    workers = None
    if processes > 1:
        try:
            workers = Workers(processes, whole, mapping)
        except (OSError, EOFError, pickle.PicklingError, TypeError, AttributeError) as error:
            log(f"one process tokenizes {name}: others could not be started ({error})")
    if workers is None:
        yield from whole.encode(_counted(mapping.rows(name, whole.config.limit), bar))
        return
    with workers:
        start = 0
        for kind, content in workers.messages(cut(find_source(name), STRETCH)):
            match kind:
                case "block":
                    yield content._replace(numbers=[start + number for number in content.numbers])
                case "end":
                    part, stats = content
                    start = whole.merge(part) + part.rows
                    whole.stats.merge(stats)
                    bar.update(part.rows)
                case "error":
                    raise UserError(content)
                case _:
                    raise RuntimeError(f"in a process that tokenizes rows:\n{content}")


def _counted(rows: Iterator[Any], bar: Any) -> Iterator[Any]:
    for row in rows:
        yield row
        bar.update()


def _size(message: tuple[str, Any]) -> int:
    return len(message[1].records) if message[0] == "block" else 0
