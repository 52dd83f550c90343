"""A limit on the time that a template may run: it is a program of somebody else, and may loop for ever."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lowalign.errors import UserError

SECONDS = 2.0
TICK = 0.1


class _Stop(BaseException):
    """Raised in the thread that runs too long; not an Exception, so that no template engine wraps it."""


class TookTooLong(UserError):
    """A template did not end within its time. It ends the command: each further row would take as long."""


class _Watchdog:
    """One thread that looks at the deadlines of all blocks, as a thread for each would cost more than most templates."""

    def __init__(self) -> None:
        self._lock, self._deadlines, self._thread = threading.Lock(), {}, None

    def begin(self, thread: int, seconds: float) -> None:
        with self._lock:
            self._deadlines[thread] = time.monotonic() + seconds
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._watch, daemon=True, name="time-limit")
                self._thread.start()

    def end(self, thread: int) -> None:
        with self._lock:
            if self._deadlines.pop(thread, None) is None:  # it was stopped: do not let that arrive any later
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)

    def _watch(self) -> None:
        while True:
            time.sleep(TICK)
            with self._lock:
                now = time.monotonic()
                for thread in [t for t, deadline in self._deadlines.items() if now > deadline]:
                    del self._deadlines[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Stop))


_WATCHDOG = _Watchdog()


@contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Stop the Python code in the block after this time. Not to be nested. Raises TookTooLong."""
    thread = threading.get_ident()
    try:
        _WATCHDOG.begin(thread, seconds)
        try:
            yield
        finally:
            _WATCHDOG.end(thread)
    except _Stop as error:
        raise TookTooLong(f"it ran for more than {seconds:g} seconds") from error
