"""Handling of SIGINT and SIGTERM: `StopSignals` lets a loop save and stop; `stop_at_once` raises immediately."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Interrupted(BaseException):
    """SIGINT or SIGTERM asked to stop. Not an Exception, like KeyboardInterrupt: `except Exception` around user code must not catch it."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.signal = received


class StopSignals:
    """Within it, the first SIGINT or SIGTERM is noted in `received` and `check` raises Interrupted; a second one ends the
    process."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self._restore = _install(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

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


@contextlib.contextmanager
def stop_at_once() -> Iterator[None]:
    """Within it, SIGINT and SIGTERM raise Interrupted wherever they arrive."""

    def leave(number: int, _: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number))

    restore = _install(leave)
    try:
        yield
    finally:
        restore()


def _install(handler: Callable[[int, FrameType | None], None]) -> Callable[[], None]:
    """Install a handler of both signals -> a function that restores the earlier ones. Python allows this only in the main
    thread; in another one it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore
