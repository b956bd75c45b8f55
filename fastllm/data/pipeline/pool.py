"""Batches cleaned by several processes, their results in the batches' order; a process that dies costs one document.

A batch whose process died or hung is done again, item by item: the item that does it a second time is rejected.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from ...config import InputError
from ..clean import CleanConfig, Rejection
from ..sources import Failure
from .config import PipelineConfig
from .work import Batch, BatchResult, run_batch

# What a worker may allocate, beyond what it has when it starts. A guess.
MEMORY = 4 << 30
# Seconds that a batch may take beyond what its documents may, for starting a worker on a busy machine. A guess.
GRACE = 30.0


def _serve(connection, cleaning: CleanConfig, config: PipelineConfig) -> None:
    """A worker: takes items, gives results, and ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard == resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, hard))
    except (ImportError, ValueError, OSError):
        pass  # no such limit on this system: a worker that takes all memory is then the system's to end
    while True:
        try:
            items = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = run_batch(items, cleaning, config)
        except InputError as error:
            answer = str(error)
        try:
            connection.send(answer)
        except OSError:
            return


class _Worker:
    def __init__(self, pool: Pool):
        context: Any = pool.context  # of a class that only its platform has
        self.connection, other = context.Pipe()
        arguments = (other, pool.cleaning, pool.config)
        self.process: BaseProcess = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        other.close()
        self.number: int | None = None
        self.deadline = 0.0

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


class Pool:
    """``workers`` processes. A context manager."""

    def __init__(self, workers: int, cleaning: CleanConfig, config: PipelineConfig):
        self.cleaning, self.config = cleaning, config
        # A server forks the workers: they inherit none of this process's threads and none of each other's pipes.
        methods = multiprocessing.get_all_start_methods()
        self.context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self.context.set_forkserver_preload(["fastllm.data.pipeline.work"])
        self._count = workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc) -> None:
        for worker in self._workers:
            worker.stop()

    @property
    def _patience(self) -> float:
        # A document that hangs in compiled code does not hear the alarm that its own limit rings.
        return 5 * self.config.document_seconds + GRACE

    def results(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, BatchResult]]:
        """Each batch with its result, in order. Few batches are read ahead, so that memory stays as it is."""
        source = iter(batches)
        self._workers = [_Worker(self) for _ in range(self._count)]
        ahead = 2 * self._count + 2
        waiting: deque[tuple[int, Batch]] = deque()
        held: dict[int, Batch] = {}
        done: dict[int, BatchResult] = {}
        given = taken = 0
        ended = False
        while True:
            while not ended and given - taken < ahead:
                batch = next(source, None)
                if batch is None:
                    ended = True
                    break
                held[given] = batch
                waiting.append((given, batch))
                given += 1
            for worker in self._workers:
                if worker.number is None and waiting:
                    self._give(worker, *waiting.popleft())
            while taken in done:
                yield held.pop(taken), done.pop(taken)
                taken += 1
            if ended and taken == given:
                return
            if given - taken < ahead and not ended:
                continue
            self._collect(held, done)

    def _give(self, worker: _Worker, number: int, batch: Batch) -> None:
        worker.number, worker.deadline = number, time.monotonic() + self._patience
        try:
            worker.connection.send(batch.items)
        except OSError:
            worker.deadline = 0.0  # it has died: _collect finds out

    def _collect(self, held: dict[int, Batch], done: dict[int, BatchResult]) -> None:
        busy = [worker for worker in self._workers if worker.number is not None]
        ready = wait([worker.connection for worker in busy], timeout=1.0)
        now = time.monotonic()
        for worker in busy:
            number = worker.number
            if number is None or (worker.connection not in ready and now < worker.deadline):
                continue
            worker.number = None
            answer = None
            if worker.connection in ready:
                try:
                    answer = worker.connection.recv()
                except (EOFError, OSError):
                    answer = None
            if answer is None:
                self._workers.remove(worker)
                worker.stop()
                answer = self._one_by_one(held[number])
                self._workers.append(_Worker(self))
            if isinstance(answer, str):
                raise InputError(answer)
            done[number] = answer

    def _one_by_one(self, batch: Batch) -> BatchResult:
        result = BatchResult()
        worker = _Worker(self)
        try:
            for item in batch.items:
                answer: BatchResult | str | None = None
                reason = "too_slow"
                try:
                    worker.connection.send([item])
                    if worker.connection.poll(self._patience):
                        answer = worker.connection.recv()
                except (EOFError, OSError):
                    reason = "crashed"
                if answer is None:
                    worker.stop()
                    code = worker.process.exitcode
                    worker = _Worker(self)
                    answer = BatchResult()
                    answer.counts["documents"] += 1
                    details = {"exit_code": code} if reason == "crashed" else {"seconds": self._patience}
                    answer.reject(Rejection(item.id, reason, {} if isinstance(item, Failure) else details))
                if isinstance(answer, str):
                    raise InputError(answer)
                result.add(answer)
        finally:
            worker.stop()
        return result
