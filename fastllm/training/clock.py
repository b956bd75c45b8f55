"""How long a run has trained, and whether it has been asked to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..timing import synchronize


class Clock:
    """Seconds of training; stands still within ``pause()``, for evaluation, checkpoints and set-up."""

    def __init__(self, device: torch.device, seconds: float):
        self._device, self._start = device, time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        synchronize(self._device)  # work that is still queued is training
        before = self.seconds
        yield
        self._start = time.perf_counter() - before


class StopRequest:
    """Within the block, the first SIGINT, SIGTERM or SIGHUP (the terminal is gone) sets ``signal``; a second one acts
    as it always would. A SIGHUP that the process was told to ignore, as nohup does, stays ignored."""

    def __init__(self):
        self.signal = 0
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: object) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        # Taken first: a signal may come, and be noted, in the middle.
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids handlers
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()
