"""Handling of SIGINT and SIGTERM: a loop saves and stops at the first one, and the process ends at the second one."""

import os
import signal
import threading
from types import FrameType


class Interrupted(BaseException):
    """SIGINT or SIGTERM has arrived. Not an Exception, like KeyboardInterrupt: `except Exception` around user code must
    not catch it."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.signal = received


class StopSignals:
    """Within it, SIGINT and SIGTERM are noted in `received` and `check` raises Interrupted.

    at_once: raise Interrupted wherever the signal arrives instead. Python handles signals only in the main thread; in
    another one nothing is installed.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.at_once:
            raise Interrupted(signal.Signals(number))
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        # print may not be called in a handler: it could interrupt another print.
        os.write(2, f"\n{self.received.name}: saving, then stopping. Send it again to stop at once.\n".encode())

    def check(self) -> None:
        """Raise Interrupted when a signal has arrived."""
        if self.received is not None:
            raise Interrupted(self.received)
