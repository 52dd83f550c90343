"""Handling of SIGINT and SIGTERM: a loop saves and stops at the first one, and the process ends at the second one."""

import os
import signal
import threading
from types import FrameType

from lowalign import processes


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
            # A launcher passes on what the terminal has sent already, and kills by itself what does not end.
            if processes.count() == 1:
                os._exit(128 + number)
            return
        self.received = signal.Signals(number)
        if not processes.is_main():
            return
        # print may not be called in a handler: it could interrupt another print.
        again = " Send it again to stop at once." if processes.count() == 1 else ""
        os.write(2, f"\n{self.received.name}: saving, then stopping.{again}\n".encode())

    def check(self) -> None:
        """Raise Interrupted when a signal has arrived. Not where there are several processes: one that stops by itself
        would leave the others waiting for it."""
        if self.received is not None and processes.count() == 1:
            raise Interrupted(self.received)

    def check_together(self) -> None:
        """`check` at a point that all processes reach: all raise when one has received a signal."""
        received = [number for number in processes.gather(self.received) if number]
        if received:
            self.received = signal.Signals(received[0])
            raise Interrupted(self.received)
