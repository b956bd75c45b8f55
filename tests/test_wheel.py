"""One extension for every Python: it uses Python's stable API alone, and is named for it."""

import shutil
import subprocess
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import fastllm
from fastllm.extension import compile as compiler

# What csrc/module.cpp takes of Python, all of it in the stable API since 3.10 (docs.python.org/3/c-api/stable.html).
STABLE = {
    "PyBool_FromLong", "PyDict_New", "PyDict_SetItemString", "PyErr_SetString", "PyExc_ValueError", "PyList_Append",
    "PyList_New", "PyModule_Create2", "PyUnicode_FromString", "_Py_Dealloc", "_Py_NoneStruct",
}  # fmt: skip


def _file() -> Path:
    if getattr(fastllm, "_C", None) is None:
        pytest.skip(f"the extension is not there: {fastllm.extension.missing()}")
    return Path(fastllm._C.__file__)


@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="no stable API without the global lock")
def test_it_is_named_for_every_python():
    assert compiler.extension_name() == "_C.abi3.so"


def test_it_takes_nothing_of_python_but_the_stable_api():
    if shutil.which("nm") is None:
        pytest.skip("no nm here")
    result = subprocess.run(["nm", "-D", "--undefined-only", _file()], capture_output=True, text=True, check=True)
    names = {line.split()[-1].partition("@")[0] for line in result.stdout.splitlines()}
    python = {name for name in names if name.startswith(("Py", "_Py"))}
    assert "PyModule_Create2" in python
    assert python <= STABLE, sorted(python - STABLE)
    assert not any("pybind11" in name for name in names)


def test_an_older_build_does_not_hide_a_new_one(tmp_path, monkeypatch):
    """Python prefers a module for itself alone to one for every Python."""
    own = tmp_path / ("_C" + EXTENSION_SUFFIXES[0])
    own.touch()
    monkeypatch.setattr(compiler, "find_compiler", lambda: ["c++"])
    monkeypatch.setattr(compiler, "build_steps", lambda *args: [])
    monkeypatch.setattr(compiler, "execute", lambda steps, work: (tmp_path / compiler.extension_name()).touch())
    monkeypatch.setenv("FASTLLM_CUDA", "0")
    line = compiler.build(tmp_path / compiler.extension_name(), tmp_path / "work")
    assert compiler.extension_name() in line
    assert [path.name for path in tmp_path.glob("_C*")] == [compiler.extension_name()]
