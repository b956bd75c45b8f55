"""Programs that a call left running when its time was over: a compiler of C++ would take the time of the next calls."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Set
from pathlib import Path

from ..time_limit import OutOfTime


def _descendants(but: Set[int] = frozenset()) -> list[int]:
    """The processes that this one started, and after each one its own; not those of ``but``, nor what they started.
    Python's own are left out, and theirs are not: torch.compile keeps some for later calls. None where there is no
    /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            # The name, in parentheses, may hold anything: of a long one Linux keeps 15 bytes, not whole characters.
            parent = int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found, waiting = [], [os.getpid()]
    while waiting:
        below = [pid for pid in children.get(waiting.pop(), []) if pid not in but]
        found += below
        waiting += below
    return [pid for pid in found if not _is_python(pid)]


def _is_python(pid: int) -> bool:
    try:
        return os.path.realpath(f"/proc/{pid}/exe") == os.path.realpath(sys.executable)
    except OSError:
        return False


@contextlib.contextmanager
def none_left_running() -> Iterator[None]:
    """Ends the programs that the block started, where :class:`~fastllm.time_limit.OutOfTime` leaves it."""
    before = frozenset(_descendants())
    try:
        yield
    except OutOfTime:
        # A program first, what it waits for after it: in the other order it would go on with the next step.
        for pid in _descendants(but=before):
            with contextlib.suppress(OSError):  # it has ended
                os.kill(pid, signal.SIGKILL)
        raise
