"""Trainings of tokenizers that Ctrl-C ends at once, where the trainer itself would first run to its end."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator

import tokenizers

# Characters that the trainer's thread is handed at a time, and how many such portions may wait. Guesses.
PORTION, WAITING = 1 << 20, 8
# Seconds until the waiting thread looks for a signal: Windows cannot interrupt a wait.
LOOK = 0.2


def _portions(texts: Iterable[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for text in texts:
        portion.append(text)
        size += len(text) + 1
        if size >= PORTION:
            yield portion
            portion, size = [], 0
    yield portion


def train_from_texts(inner: tokenizers.Tokenizer, texts: Iterable[str], trainer) -> None:
    """Like ``inner.train_from_iterator(texts, trainer)``, but a signal's exception leaves it at once.

    The trainer is native code that sees no signal, and it may take hours. So it works in a thread of its own, and this
    one waits for it. ``texts`` are read in this thread. After an exception the trainer stops at its next text; when it
    has read them all it goes on in the background and ends with the process.

    Raises:
        BaseException: what ``texts``, the trainer or a signal handler raises.
    """
    handed: queue.Queue[list[str] | None] = queue.Queue(WAITING)
    failures: list[BaseException] = []
    given_up = threading.Event()

    def take() -> Iterator[str]:
        while (portion := handed.get()) is not None:
            for text in portion:
                if given_up.is_set():
                    raise InterruptedError
                yield text

    def work() -> None:
        try:
            inner.train_from_iterator(take(), trainer)
        except BaseException as error:  # a panic in it is no Exception to Python
            failures.append(error)

    def hand(portion: list[str] | None) -> None:
        while worker.is_alive():
            with contextlib.suppress(queue.Full):
                return handed.put(portion, timeout=LOOK)

    worker = threading.Thread(target=work, name="tokenizer training", daemon=True)
    worker.start()
    try:
        for portion in _portions(texts):
            hand(portion)
            if failures:
                break
        hand(None)
        while worker.is_alive():
            worker.join(LOOK)
    except BaseException:
        given_up.set()
        # The thread may be waiting for a next portion. Room for it is there when one that waits is taken back.
        with contextlib.suppress(queue.Empty):
            handed.get_nowait()
        handed.put([""])
        raise
    if failures:
        raise failures[0]
