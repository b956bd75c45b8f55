"""A call of the bench whose time is over leaves no program behind that would slow the next ones."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from alarm import ring

from fastllm.bench.left_running import none_left_running
from fastllm.time_limit import OutOfTime, time_limit

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here to look for programs in")
# A shell that waits for a program of its own, as a compiler's driver does; that one says when it runs.
PROGRAM = ["sh", "-c", "sh -c 'echo runs; exec sleep 60'; true"]


@pytest.fixture
def started():
    programs = []
    yield programs
    for program in programs:
        program.kill()
        program.wait()
        program.stdout.close()


def start(started, program=PROGRAM, **options):
    """Starts ``program``, and waits until it runs."""
    started.append(subprocess.Popen(program, stdout=subprocess.PIPE, **options))
    assert started[-1].stdout.readline() == b"runs\n"


def stopped(started, program=PROGRAM):
    """A call that starts ``program``, and whose time is over."""
    with none_left_running(), time_limit(600):
        start(started, program)
        ring()


def test_programs_of_a_call_that_is_stopped_are_ended(started):
    with pytest.raises(OutOfTime):
        stopped(started)
    (shell,) = started
    assert shell.wait(60) < 0
    # Until the shell's own program has ended, too, it keeps the pipe open.
    assert shell.communicate(timeout=50)[0] == b""


def test_no_program_goes_on_when_what_it_waits_for_is_ended(started):
    waits = PROGRAM[-1].removesuffix("; true")
    for depth in range(8):
        waits = f"sh -c {shlex.quote(waits)}; echo {depth} goes on"
    # Several times: an order by the processes' numbers is mostly the right one.
    for _ in range(12):
        with pytest.raises(OutOfTime):
            stopped(started, ["sh", "-c", waits])
        assert started[-1].communicate(timeout=50)[0] == b""


def test_others_go_on(started):
    start(started)
    with none_left_running():
        start(started)
    with pytest.raises(OutOfTime):
        stopped(started, [sys.executable, "-c", "import time; print('runs', flush=True); time.sleep(60)"])
    assert [program.poll() for program in started] == [None, None, None]


def test_what_an_earlier_program_starts_later_goes_on(started):
    program = ["sh", "-c", f"read line; {PROGRAM[-1]}"]
    started.append(subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    (shell,) = started

    def call():
        with none_left_running():
            with shell.stdin:
                shell.stdin.write(b"\n")
            assert shell.stdout.readline() == b"runs\n"
            raise OutOfTime

    with pytest.raises(OutOfTime):
        call()
    with pytest.raises(subprocess.TimeoutExpired):
        shell.wait(0.5)


def test_a_program_of_any_name_is_found(tmp_path, started):
    """Linux keeps 15 bytes of a name, which may end within a character."""
    program = tmp_path / ("a" * 14 + "\u00e4")
    program.write_text(f"#!/bin/sh\n{PROGRAM[-1]}\n")
    program.chmod(0o755)
    with pytest.raises(OutOfTime):
        stopped(started, [str(program)])
    assert started[0].wait(60) < 0
