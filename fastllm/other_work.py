"""Other work on this machine's cores: seen before torch is imported, and measured beside a run. Linux only.

Where others take the cores, threads that wait for each other spin on time that the others need. Generation with two
threads on two cores at a load of 16 took 3 to 12 s for 12 tokens while GCC's OpenMP spun, and 0.07 to 0.6 s without.
"""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping

# What names a thread's waiting already: the user's choice stays.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Cores that a run must lack before it says so, and seconds of measuring. Guesses: an idle machine's services take less.
LACKING = 0.5
LONG_ENOUGH = 10.0


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _running() -> tuple[float, int] | None:
    """The load of the last minute and how many threads run or wait for a core now, without this one; None: unknown."""
    try:
        with open("/proc/loadavg") as file:
            minute, _, _, threads, _ = file.read().split()
        return float(minute), int(threads.partition("/")[0]) - 1
    except (OSError, ValueError):
        return None


def wait_asleep(environment: MutableMapping[str, str]) -> bool:
    """Let OpenMP's threads wait asleep if the cores are taken, now and over the last minute; before torch is imported.

    Returns whether it did. ``environment`` is os.environ; what it says of waiting already stays.
    """
    found = _running()
    if found is None or any(name in environment for name in WAITING):
        return False
    minute, now = found
    if min(minute, now) < cores():
        return False
    environment["OMP_WAIT_POLICY"] = "passive"
    return True


def _busy() -> float | None:
    """Seconds that the cores of this process have worked, for any process or another virtual machine; None: unknown."""
    try:
        mine = os.sched_getaffinity(0)
        with open("/proc/stat") as file:
            rows = [line.split() for line in file if line.startswith("cpu") and line[3].isdigit()]
        ticks = 0
        for name, *counts in rows:
            user, nice, system, _, _, irq, softirq, steal = map(int, counts[:8])
            if int(name[3:]) in mine:
                ticks += user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None


def _own() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


class OtherWork:
    """Measures how many cores others keep busy, and says once that a run of ``threads`` threads lacks them.

    Other processes of the same run count as others, but for children that have ended.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self.told = False
        self.since = time.monotonic(), _busy(), _own()

    def _others(self, seconds: float, busy: float | None) -> float | None:
        """Cores that others kept busy on average over the last ``seconds``; None: unknown."""
        _, before, own = self.since
        if busy is None or before is None:
            return None
        return max(0.0, (busy - before) - (_own() - own)) / seconds

    def complaint(self) -> str | None:
        """Why the run is slow, once; None where it is not, or unknown, or not measured for :data:`LONG_ENOUGH` yet."""
        seconds = time.monotonic() - self.since[0]
        if self.told or seconds < LONG_ENOUGH:
            return None
        busy, mine = _busy(), cores()
        others = self._others(seconds, busy)
        self.since = time.monotonic(), busy, _own()
        if others is None or mine - others > self.threads - LACKING:
            return None
        self.told = True
        return (
            f"slow: other work keeps {others:.1f} of {mine} cores busy, and this run has {self.threads} "
            f"thread{'s' if self.threads > 1 else ''}: its steps take longer for it"
        )
