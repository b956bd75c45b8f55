"""The extension itself: how it is built, what it needs of torch, and its GPU kernels run on a CPU."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastllm
from fastllm.backends import why_not
from fastllm.extension import compile as build
from fastllm.extension import load as extension
from fastllm.kernels import device
from fastllm.kernels.device import DeviceInfo
from fastllm.registry import OPS

ROOT = Path(__file__).parents[2]
BUILT = importlib.util.find_spec("fastllm._C")

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler here"
)


def test_gpu_kernels_on_a_cpu(tmp_path):
    """Every GPU kernel but the sort, thread by thread, under AddressSanitizer and UBSan: bits and bounds."""
    program = tmp_path / "emulate"
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = ROOT / "tests" / "emulate_embedding.cpp"
    subprocess.run([*build.find_compiler(), *flags, str(source), "-o", str(program)], check=True)
    # LD_PRELOAD of another library would come before the sanitizer's own.
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    result = subprocess.run([str(program), "60"], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "60 cases agree\n"


def test_the_extension_needs_only_the_stable_interface():
    """What it takes from outside: torch's C shim, Python's C API, libc, libstdc++. Nothing of c10:: or at::."""
    if BUILT is None or shutil.which("nm") is None:
        pytest.skip("no extension or no nm here")
    result = subprocess.run(["nm", "-D", "--undefined-only", BUILT.origin], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in result.stdout.splitlines() if line.strip()]
    allowed = ("aoti_torch_", "torch_", "Py", "_Py", "_ITM_", "__gmon_start__", "_ZNSt15__exception_ptr", "_Unwind_")
    foreign = [n for n in names if not n.startswith(allowed) and not any(v in n for v in ("@GLIBC", "@CXXABI", "@GCC"))]
    assert foreign == []
    assert any(n.startswith("aoti_torch_") for n in names)


def test_build_info_tells_how_it_was_built():
    if BUILT is None:
        pytest.skip("no extension here")
    info = fastllm._C.build_info()
    assert info["torch_target"] == "2.10"
    assert info["cpu_capability"] in ("default", "avx2", "avx512")
    assert (info["cuda"] is None) == (info["cuda_architectures"] == [])
    assert "-ffp-contract=off" in info["flags"]
    assert extension.module() is fastllm._C
    assert info["sources"] == build.fingerprint()


def _build(tmp_path, env):
    """compile/ alone, away from the package, as setup.py loads it; into a folder of the test's."""
    run = f"import compile, pathlib, sys; sys.exit(compile.main(pathlib.Path({str(tmp_path)!r})))"
    full = {k: v for k, v in os.environ.items() if k not in ("FASTLLM_CUDA", "FORCE_CUDA", "CXX", "CUDA_HOME")}
    full["PYTHONPATH"] = str(ROOT / "fastllm" / "extension")
    return subprocess.run([sys.executable, "-c", run], env={**full, **env}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"CXX": "/nonexistent/c++"}, "the extension was not built: there is no C++ compiler (/nonexistent/c++)"),
        ({"FASTLLM_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "FASTLLM_CUDA=1, but there is no nvcc in /nonexistent"),
        ({"FORCE_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "FASTLLM_CUDA=1, but there is no nvcc in /nonexistent"),
        ({"FASTLLM_CUDA": "yes"}, "FASTLLM_CUDA: expected auto, 0 or 1, got 'yes'"),
        ({"FASTLLM_CUDA": "0", "MAX_JOBS": "many"}, "MAX_JOBS: expected a positive number, got 'many'"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_one_clear_line(tmp_path, env, expected):
    result = _build(tmp_path, env)
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert expected in result.stderr


@pytest.mark.parametrize(
    ("env", "cuda", "asked"),
    [({}, None, False), ({}, "13.0", True), ({"FASTLLM_CUDA": "1"}, None, True), ({"FORCE_CUDA": "1"}, None, True),
     ({"TORCH_CUDA_ARCH_LIST": "9.0"}, None, True), ({"FASTLLM_CUDA": "0"}, "13.0", False)],
)  # fmt: skip
def test_nvcc_is_looked_for_where_its_code_could_run_or_is_asked_for(monkeypatch, env, cuda, asked):
    for name in ("FASTLLM_CUDA", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**env, "CUDA_HOME": "/nonexistent"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(build.CannotBuild) as error:
        build.find_cuda(build.Torch(ROOT, ROOT, "2.13.0", cuda))
    assert ("there is no nvcc in /nonexistent" in str(error.value)) == asked


def test_architectures_are_read_as_pytorch_reads_them(monkeypatch):
    for text, expected in (
        ("", ("7.5", "8.0", "9.0+PTX")),
        ("8.0;9.0+PTX", ("8.0", "9.0+PTX")),
        ("8.0 9.0a, 10.0", ("8.0", "9.0a", "10.0")),
        ("Ampere;Hopper", ("8.0", "8.6+PTX", "9.0+PTX")),
    ):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
        assert build.architectures() == expected
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "hoppy")
    with pytest.raises(ValueError, match="expected entries such as"):
        build.architectures()


# An A100, an RTX 3090, an RTX 4090, an H100, a B200, an RTX 5090, a T4.
GPUS = (80, 86, 89, 90, 100, 120, 75)


@pytest.mark.parametrize(
    ("built", "served"),
    [
        ("7.5;8.0;9.0+PTX", set(GPUS)),
        ("9.0+PTX", {90, 100, 120}),
        ("8.0", {80, 86, 89}),
        ("8.6", {86, 89}),
        ("9.0a", {90}),
        ("10.0f 7.5", {100, 75}),
    ],
)
def test_a_gpu_that_the_extension_has_no_code_for_is_pytorchs(monkeypatch, built, served):
    entries = built.replace(";", " ").split()
    monkeypatch.setattr(extension, "_info", {"cuda": "13.0", "cuda_architectures": entries})
    monkeypatch.setattr(extension, "_missing", None)
    for arch in GPUS:
        info = DeviceInfo("", "nvidia", arch, "", 100, 2**16)
        monkeypatch.setattr(device, "device_info", lambda where, info=info: info)
        reason = why_not("native", "cuda", (torch.float32,), OPS["embedding"])
        assert (reason is None) == (arch in served), arch
        assert reason is None or f"TORCH_CUDA_ARCH_LIST={arch // 10}.{arch % 10} python -m fastllm.build" in reason


@pytest.mark.parametrize(
    ("of_torch", "wish", "why"),
    [("12.8", "auto", "nvcc 13.0 is newer than torch's CUDA 12.8"), ("12.8", "1", None), ("13.2", "auto", None)],
)
def test_an_nvcc_that_is_newer_than_torchs_cuda_is_taken_on_request_alone(tmp_path, monkeypatch, of_torch, wish, why):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.1\n")
    nvcc.chmod(0o755)
    for name, value in {"CUDA_HOME": str(tmp_path), "FASTLLM_CUDA": wish, "TORCH_CUDA_ARCH_LIST": "9.0"}.items():
        monkeypatch.setenv(name, value)
    if why is None:
        assert build.find_cuda(build.Torch(ROOT, ROOT, "2.13.0", of_torch)).version == "13.0"
    else:
        with pytest.raises(build.CannotBuild, match=why):
            build.find_cuda(build.Torch(ROOT, ROOT, "2.13.0", of_torch))


def test_headers_are_found_without_importing_torch():
    found = build.find_torch()
    assert (found.version, found.cuda) == (torch.__version__, torch.version.cuda)
    assert (found.lib / "libtorch_cpu.so").exists() or sys.platform != "linux"


def test_without_the_extension_the_op_runs_eagerly_and_says_so_once():
    code = """
import sys, warnings
sys.modules["fastllm._C"] = None
import torch, fastllm
weight = torch.randn(5, 3, requires_grad=True)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(3):
        fastllm.functional.embedding(torch.tensor([1, 4, 1]), weight).sum().backward()
assert weight.grad[1].tolist() == [6.0, 6.0, 6.0]
messages = [str(w.message) for w in told]
assert len(messages) == 1, messages
assert messages[0].startswith("embedding: eager instead of native: the extension fastllm._C was not built"), messages
try:
    with fastllm.backend("native"):
        fastllm.functional.embedding(torch.tensor([1]), weight)
except fastllm.BackendError as error:
    assert "python -m fastllm.build" in str(error)
else:
    raise AssertionError("a backend that is not there was served")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def _python_without_extension(code, tmp_path, **env):
    """``code`` in a Python that has the package but no extension in it, and an empty cache."""
    start = """
import importlib.machinery, sys
class Hide(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "fastllm._C": raise ModuleNotFoundError(name)
        return None
sys.meta_path.insert(0, Hide)
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "fastllm._C" else find(name, package)
import torch, fastllm
def look():
    return fastllm.functional.embedding(torch.tensor([1, 2]), torch.arange(6.0).view(3, 2)).tolist()
"""
    env = {**os.environ, "FASTLLM_CACHE": str(tmp_path / "cache"), **env}
    return subprocess.run([sys.executable, "-c", start + code], env=env, capture_output=True, text=True, check=False)


# Stands in for the compiler, which takes half a minute: the installed extension, copied.
COPY = f"""
import shutil
import fastllm.extension.compile as compiler
compiler.find_compiler = lambda: ["c++"]
compiler.build = lambda target, work: (shutil.copy({BUILT.origin if BUILT else ""!r}, target), "built")[1]
"""


def test_the_first_use_builds_what_installing_could_not(tmp_path):
    if BUILT is None:
        pytest.skip("no extension here")
    use = "assert look() == [[2, 3], [4, 5]]\n"
    use += "assert fastllm.extension.missing() is None, fastllm.extension.missing()\n"
    use += "assert fastllm._C.build_info() and 'native' in str(fastllm.info())"
    first = _python_without_extension(COPY + use, tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stderr == "fastllm: compiling the extension, this once (a minute or two) ...\nbuilt\n"
    again = _python_without_extension(use, tmp_path)
    assert (again.returncode, again.stderr) == (0, "")


def test_a_first_use_that_cannot_compile_says_why_and_does_not_try_again(tmp_path):
    fail = """
import fastllm.extension.compile as compiler
def build(target, work): raise compiler.CannotBuild("no such instruction")
compiler.find_compiler, compiler.build = lambda: ["c++"], build
"""
    use = "assert look() == [[2, 3], [4, 5]]; print(fastllm.extension.missing())"
    for shown in ("compiling the extension", "eager instead of native"):
        result = _python_without_extension(fail + use, tmp_path)
        assert result.returncode == 0, result.stderr
        assert "was not built: no such instruction" in result.stdout
        assert shown in result.stderr
    assert "compiling" not in result.stderr
    result = _python_without_extension(use, tmp_path / "other", FASTLLM_BUILD="0")
    assert "was not built (python -m fastllm.build" in result.stdout
    assert not (tmp_path / "other").exists()


def test_the_first_use_with_a_compiler_builds_what_one_without_could_not(tmp_path):
    if BUILT is None:
        pytest.skip("no extension here")
    look = "assert look() == [[2, 3], [4, 5]]; print(fastllm.extension.missing())\n"
    # The same environment, for it is part of the cache's key: PATH alone decides whether there is a compiler.
    without = "import os; os.environ['PATH'] = ''\n"
    first = _python_without_extension(without + look, tmp_path, CXX="c++")
    assert (first.returncode, "was not built: there is no C++ compiler (c++)" in first.stdout) == (0, True), first
    assert "compiling" not in first.stderr
    second = _python_without_extension(COPY + look, tmp_path, CXX="c++")
    assert (second.returncode, second.stdout) == (0, "None\n"), second


@pytest.mark.parametrize(
    ("name", "value"), [("machine", "aarch64"), ("libc_ver", ("glibc", "2.17"))], ids=["architecture", "C library"]
)
def test_machines_that_cannot_load_each_others_extension_share_no_cache(name, value, monkeypatch):
    here = extension.cache_folder()
    monkeypatch.setattr(platform, name, lambda: value)
    assert extension.cache_folder() != here
    monkeypatch.undo()
    assert extension.cache_folder() == here


def test_a_cache_that_cannot_be_written_names_the_variable_that_moves_it(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTLLM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.delenv("FASTLLM_BUILD", raising=False)
    monkeypatch.setattr(extension, "_may_build", True)
    monkeypatch.setattr(extension, "_missing", None)
    extension.build_at_first_use()
    assert re.search("was not built: .*cache.*FASTLLM_CACHE names another folder", extension._missing)


def test_what_a_failed_compilation_said_is_kept_where_the_reason_says(tmp_path, monkeypatch):
    def fails(target, work):
        (work / "build.log").write_text("all of it")
        raise build.CannotBuild(f"error: no such thing (all of it in {work / 'build.log'})")

    monkeypatch.setattr(build, "build", fails)
    with pytest.raises(build.CannotBuild) as error:
        extension._build_into(tmp_path, tmp_path / "_C.so")
    path = re.search(r"\(all of it in (.*)\)", str(error.value))[1]
    assert Path(path).read_text() == "all of it"
    assert (tmp_path / "failed").read_text() == str(error.value)
    assert {file.name for file in tmp_path.iterdir()} == {"build.log", "failed"}


def test_what_a_killed_compilation_left_is_removed_by_the_next_one(tmp_path, monkeypatch):
    code = """
import os, signal, sys
from pathlib import Path
from fastllm.extension import load

def killed(target, work):
    target.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

load.compiler.build = killed
load._build_into(Path(sys.argv[1]), Path(sys.argv[1], "_C.so"))
"""
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert ended.returncode == -9
    (left,) = tmp_path.iterdir()
    (other := left.with_name(f"{left.name.rpartition('-')[0]}-{os.getppid()}")).mkdir()  # of a process that is running
    monkeypatch.setattr(build, "build", lambda target, work: target.write_text("whole"))
    extension._build_into(tmp_path, tmp_path / "_C.so")
    assert set(tmp_path.iterdir()) == {tmp_path / "_C.so", other}
    assert (tmp_path / "_C.so").read_text() == "whole"


def test_building_in_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTLLM_CUDA", "0")
    (tmp_path / "fastllm").touch()
    assert build.main(tmp_path / "fastllm") == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"fastllm: the extension was not built: .*fastllm/build.*\n", error), error


def test_an_extension_from_other_sources_is_not_used(monkeypatch):
    if BUILT is None:
        pytest.skip("no extension here")
    monkeypatch.setattr(extension, "_module", None)
    monkeypatch.setattr(extension, "_missing", None)
    monkeypatch.setattr(build, "fingerprint", lambda: "0123456789abcdef")
    extension._load()
    assert extension.module() is None
    assert "built from other sources than those here (python -m fastllm.build rebuilds it)" in extension.missing()
    with fastllm.backend("native"), pytest.raises(fastllm.BackendError, match="other sources"):
        fastllm.functional.embedding(torch.tensor([0]), torch.zeros(1, 1))
