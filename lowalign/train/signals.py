"""The first SIGINT or SIGTERM asks the loop to save and leave; the second leaves at once."""

import os
import signal
import threading
from types import FrameType


class Interrupted(Exception):
    """A signal asked the run to stop; raised between micro-batches."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.signal = received


class StopSignals:
    """Within it, SIGINT and SIGTERM are noted in `received` and `check` raises Interrupted.

    Python lets only the main thread take signals; in another thread nothing is installed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        # print may not be called in a handler: it could interrupt another print.
        os.write(2, f"\n{self.received.name}: saving, then leaving. Once more to leave at once.\n".encode())

    def check(self) -> None:
        """Raise Interrupted when a signal has arrived."""
        if self.received is not None:
            raise Interrupted(self.received)
