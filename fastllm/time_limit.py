"""A limit on the time of a block, by the main thread's alarm."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator

# Seconds: a timer of 0 never ends, and this is the shortest that the system knows.
_SOONEST = 1e-6


class OutOfTime(BaseException):
    """A time limit has passed. No Exception, so that no code on the way takes it for an error of its own."""


@contextlib.contextmanager
def time_limit(limit: float) -> Iterator[None]:
    """Raises :class:`OutOfTime` in the block after ``limit`` seconds, at the main thread's next step of Python.

    Blocks nest; the outer one's time goes on. No limit where it is infinite, on another thread, and on Windows. One
    below 0 is 0: none of the time is left.
    """
    limit = max(limit, _SOONEST)

    def stop(*_):
        raise OutOfTime(f"stopped after {limit:.0f} s")

    interruptible = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if limit == math.inf or not interruptible:
        yield
        return
    outer, _ = signal.getitimer(signal.ITIMER_REAL)
    before = signal.signal(signal.SIGALRM, stop)
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:  # the limit may have passed just before that
            signal.signal(signal.SIGALRM, before)
            if outer:
                signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - began), _SOONEST))
