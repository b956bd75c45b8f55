"""Notices that the ranks have come to a standstill, and says which one the others wait for."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

# How a process ends that has waited too long; torchrun then starts all of them again, or gives up.
EXIT_HANG = 75
# The phases of a step, in order, that are timed: who is further back keeps the others waiting.
TIMED = ("data", "step")
# Frames in here are the package's own. Its folder is compared, not its name: a clone's path may hold the name as well.
PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
# Seconds between two words of a rank, and how many of them there are at least before the timeout. Guesses.
INTERVAL, WORDS = 5.0, 5
# Another rank has this many of its intervals, and at least a second, to say where it is before it is judged. A guess.
PATIENCE = 3
# Where in the store a rank that ends leaves why, and what stands in the place of a number in its last words.
VERDICT, LAST = "fastllm/standstill", "last"


class Watch:
    """A thread that publishes where this rank is, and ends the process when that stays so for ``timeout`` seconds.

    Before it does, it names the ranks that are furthest back and the line of Python that each was last in. It judges by
    what each rank has published since, so that no rank is named for a place that it has left. Evaluation and
    checkpoints are not timed: the others then wait within a step, and notice.
    """

    def __init__(self, rank: int, size: int, timeout: float):
        self._rank, self._size, self._timeout = rank, size, timeout
        self._interval = min(INTERVAL, timeout / WORDS)
        self._at = (0, "start", time.monotonic())
        self._said = 0
        self._stop = threading.Event()
        store: Any = dist.distributed_c10d._get_default_store()
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

    def verdict(self) -> str | None:
        """What a rank that ended for a standstill has said, if one has."""
        try:
            return self._store.get(VERDICT).decode() if self._store.check([VERDICT]) else None
        except RuntimeError:  # the process that keeps the store is gone
            return None

    def _where(self) -> str:
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        own = [frame for frame in frames if frame.filename.startswith(PACKAGE)] or frames
        return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno} in {own[-1].name}"

    def _publish(self, last: bool = False) -> None:
        """Say where this rank is, with a number that grows; ``last``: nothing will follow."""
        self._said += 1
        step, phase, _ = self._at
        order = TIMED.index(phase) if phase in TIMED else -1 if phase == "start" else len(TIMED)
        said = f"{LAST if last else self._said} {step} {order} {socket.gethostname()} {self._where()}"
        self._store.set(_key(self._rank), said)

    def _read(self, rank: int) -> str | None:
        return self._store.get(_key(rank)).decode() if self._store.check([_key(rank)]) else None

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._publish()
            step, phase, since = self._at
            if phase in TIMED and time.monotonic() - since > self._timeout:
                self._end(step)
        self._publish(last=True)

    def _latest(self) -> tuple[dict[int, str | None], set[int]]:
        """What every rank has said last, and which of them have said nothing since this was called."""
        before = {rank: self._read(rank) for rank in range(self._size) if rank != self._rank}
        silent = {rank for rank, said in before.items() if said is None or not said.startswith(f"{LAST} ")}
        until = time.monotonic() + max(1.0, PATIENCE * self._interval)
        while silent and time.monotonic() < until:
            time.sleep(min(0.1, self._interval))
            silent = {rank for rank in silent if self._read(rank) == before[rank]}
        return {rank: self._read(rank) for rank in range(self._size)}, silent

    def _end(self, step: int) -> None:
        self._publish(last=True)
        latest, silent = self._latest()
        places = {}
        for rank, said in latest.items():
            if said is None:
                places[rank] = ((-1, -1), f"rank {rank}, which never said where it was")
            else:
                _, at, order, host, where = said.split(" ", 4)
                unheard = ", which does not say where it is any more" if rank in silent else ""
                places[rank] = ((int(at), int(order)), f"rank {rank} on {host}, at {where}{unheard}")
        behind = min(place for place, _ in places.values())
        hanging = [text for place, text in places.values() if place == behind]
        if len(hanging) == self._size:
            said = "all ranks are in the same place: " + "; ".join(hanging)
        else:
            said = "waiting for " + "; ".join(hanging)
        said = f"step {step + 1} has stood still for {self._timeout:g} s; {said}"
        self._store.set(VERDICT, said)
        print(f"fastllm train: error: rank {self._rank}: {said}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(EXIT_HANG)


def _key(rank: int) -> str:
    return f"fastllm/at/{rank}"
