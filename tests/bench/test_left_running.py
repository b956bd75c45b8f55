"""A call of the bench whose time is over leaves no program behind that would slow the next ones."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastllm.bench.left_running import none_left_running
from fastllm.time_limit import OutOfTime, time_limit

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here to look for programs in")
# A shell that waits for a program of its own, as a compiler's driver does.
PROGRAM = ["sh", "-c", "sleep 60; true"]


@pytest.fixture
def started():
    programs = []
    yield programs
    for program in programs:
        program.kill()
        program.wait()


def stopped(started, program, **options):
    """A call that starts ``program``, and whose time is over."""
    with none_left_running(), time_limit(0.2):
        started.append(subprocess.Popen(program, **options))
        time.sleep(60)


def test_programs_of_a_call_that_is_stopped_are_ended(started):
    with pytest.raises(OutOfTime):
        stopped(started, PROGRAM, stdout=subprocess.PIPE)
    (shell,) = started
    assert shell.wait(5) < 0
    # Until the shell's own program has ended, too, it keeps the pipe open.
    assert shell.communicate(timeout=5)[0] == b""


def test_others_go_on(started):
    started.append(subprocess.Popen(PROGRAM))
    with none_left_running():
        started.append(subprocess.Popen(PROGRAM))
    with pytest.raises(OutOfTime):
        stopped(started, [sys.executable, "-c", "import time; time.sleep(60)"])
    assert [program.poll() for program in started] == [None, None, None]


def test_what_an_earlier_program_starts_later_goes_on(started):
    started.append(subprocess.Popen(["sh", "-c", "read line; sleep 60; true"], stdin=subprocess.PIPE, text=True))
    (shell,) = started

    def call():
        with none_left_running(), time_limit(5):
            with shell.stdin:
                shell.stdin.write("\n")
            while not Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text():
                time.sleep(0.01)
            raise OutOfTime

    with pytest.raises(OutOfTime):
        call()
    with pytest.raises(subprocess.TimeoutExpired):
        shell.wait(0.5)
