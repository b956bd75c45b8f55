"""A run on cores that others use: it sleeps where it waits, and says once why it is slow."""

import os
import time

import pytest

from fastllm import other_work
from fastllm.other_work import LONG_ENOUGH, OtherWork, wait_asleep

pytestmark = pytest.mark.runs_on("anywhere")


@pytest.mark.parametrize(
    ("load", "given", "asleep"),
    [
        ((5.0, 6), {}, True), ((5.0, 1), {}, False), ((0.3, 6), {}, False), (None, {}, False),
        ((5.0, 6), {"OMP_WAIT_POLICY": "active"}, False), ((5.0, 6), {"GOMP_SPINCOUNT": "9"}, False),
    ],
)  # fmt: skip
def test_threads_sleep_where_the_cores_are_taken_and_nobody_chose(monkeypatch, load, given, asleep):
    monkeypatch.setattr(other_work, "_running", lambda: load)
    monkeypatch.setattr(other_work, "cores", lambda: 2)
    environment = dict(given)
    assert wait_asleep(environment) is asleep
    assert environment == (given | {"OMP_WAIT_POLICY": "passive"} if asleep else given)


def measured(monkeypatch, threads, windows):
    """What is said after each window of (seconds, busy core seconds, own seconds), on four cores."""
    now, busy, own = 0.0, 0.0, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(other_work, "_busy", lambda: busy)
    monkeypatch.setattr(other_work, "_own", lambda: own)
    monkeypatch.setattr(other_work, "cores", lambda: 4)
    work, said = OtherWork(threads), []
    for seconds, all_of_them, mine in windows:
        now, busy, own = now + seconds, busy + all_of_them, own + mine
        said.append(work.complaint())
    return said


def test_a_run_that_lacks_cores_says_so_once(monkeypatch):
    long = 2 * LONG_ENOUGH
    first, early, slow, again = measured(
        monkeypatch, 2, [(long, 2.1 * long, 2 * long), (1.0, 4.0, 1.0), (long, 4 * long, long), (long, 4 * long, long)]
    )
    assert first is early is again is None
    assert "other work keeps 3.0 of 4 cores busy, and this run has 2 threads" in slow


def test_cores_that_are_enough_and_unknown_ones_are_no_complaint(monkeypatch):
    long = LONG_ENOUGH
    assert measured(monkeypatch, 2, [(long, 4 * long, 2 * long)]) == [None]
    monkeypatch.undo()
    monkeypatch.setattr(other_work, "_busy", lambda: None)
    monkeypatch.setattr(other_work, "LONG_ENOUGH", 0.0)
    assert OtherWork(64).complaint() is None


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="Linux alone tells what its cores do")
def test_the_clocks_are_the_systems():
    """What this process spends is part of what its cores spend, and both only grow."""
    busy, own = other_work._busy(), other_work._own()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert other_work._own() - own >= 0.05
    assert other_work._busy() - busy >= 0.05
    assert other_work._running()[1] >= 0
