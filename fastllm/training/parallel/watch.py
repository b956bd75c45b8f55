"""Notices that the ranks have come to a standstill, and says which one the others wait for."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback

import torch.distributed as dist

# How a process ends that has waited too long; torchrun then starts all of them again, or gives up.
EXIT_HANG = 75
# The order of a step: who is further back keeps the others waiting. Phases beyond may take their time.
PHASES = ("data", "step")


class Watch:
    """A thread that publishes where this rank is, and ends the process when that stays so for ``timeout`` seconds.

    Before it does, it names the ranks that are furthest back and the line of Python that each was last in. Evaluation
    and checkpoints are not timed: the others then wait within a step, and notice.
    """

    def __init__(self, rank: int, size: int, timeout: float):
        self._rank, self._size, self._timeout = rank, size, timeout
        self._at = (0, "start", time.monotonic())
        self._stop = threading.Event()
        store = dist.distributed_c10d._get_default_store()
        # A connection of its own: the main thread may be waiting on the other.
        self._store = store.clone() if hasattr(store, "clone") else store
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """This rank has come to ``phase`` of the step after ``step``."""
        self._at = (step, phase, time.monotonic())

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _key(self, rank: int) -> str:
        return f"fastllm/at/{rank}"

    def _where(self) -> str:
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        own = [frame for frame in frames if "fastllm" in frame.filename] or frames
        return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno} in {own[-1].name}"

    def _run(self) -> None:
        interval = min(5.0, self._timeout / 5)
        while not self._stop.wait(interval):
            step, phase, since = self._at
            order = PHASES.index(phase) if phase in PHASES else -1 if phase == "start" else len(PHASES)
            self._store.set(self._key(self._rank), f"{step} {order} {socket.gethostname()} {self._where()}")
            if phase in PHASES and time.monotonic() - since > self._timeout:
                self._end(step)

    def _end(self, step: int) -> None:
        places = {}
        for rank in range(self._size):
            if self._store.check([self._key(rank)]):
                at, order, host, where = self._store.get(self._key(rank)).decode().split(" ", 3)
                places[rank] = ((int(at), int(order)), f"rank {rank} on {host}, at {where}")
            else:
                places[rank] = ((-1, -1), f"rank {rank}, which never said where it was")
        behind = min(place for place, _ in places.values())
        hanging = [text for place, text in places.values() if place == behind]
        if len(hanging) == self._size:
            said = "all ranks are in the same place: " + "; ".join(hanging)
        else:
            said = "waiting for " + "; ".join(hanging)
        print(
            f"fastllm train: error: rank {self._rank}: step {step + 1} has stood still for {self._timeout:g} s; {said}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(file=sys.stderr, all_threads=False)
        os._exit(EXIT_HANG)
