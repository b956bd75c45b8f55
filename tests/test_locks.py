"""Locks on file systems without locks, and an interrupt while torch is imported."""

import errno
import os
import subprocess
import sys
import warnings

import pytest

from fastllm.config import InputError
from fastllm.data.pipeline import run as pipeline
from fastllm.extension import load
from fastllm.files import sole_writer

fcntl = pytest.importorskip("fcntl")
ROOT = os.environ.get("FASTLLM_ROOT") or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def places(folder):
    """Every place that takes a lock."""
    return {
        "sole_writer": lambda: sole_writer(folder, "lock"),
        "prepare": lambda: pipeline._locked(folder / "out"),
        "extension": lambda: load._locked(folder / "lock"),
    }


@pytest.mark.parametrize("name", ["sole_writer", "prepare", "extension"])
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_written_with_a_warning(name, code, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    for function in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, function, refuse)
    with pytest.warns(RuntimeWarning, match="this file system has no locks"), places(tmp_path)[name]():
        pass


@pytest.mark.parametrize("name", ["sole_writer", "prepare"])
@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_another_process_is_told_of(name, code, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    for function in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, function, refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="another"), places(tmp_path)[name]():
            pass


def interrupted(folder, *command):
    """What a process says in which an interrupt comes while torch is imported."""
    torch = folder / "torch"
    torch.mkdir(exist_ok=True)
    (torch / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(folder), ROOT])
    return subprocess.run(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": path}, cwd=folder, capture_output=True, text=True
    )


def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path):
    script = tmp_path / "fastllm"
    script.write_text("import sys\nfrom fastllm.cli import main\nsys.exit(main())\n")
    for command in (("-m", "fastllm", "info"), (str(script), "info")):
        done = interrupted(tmp_path, *command)
        assert done.stderr == "fastllm info: error: interrupted\n"
        assert done.returncode in (-2, 130)


def test_a_program_that_imports_the_library_gets_its_traceback(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import fastllm\n")
    assert "Traceback" in interrupted(tmp_path, str(program)).stderr
