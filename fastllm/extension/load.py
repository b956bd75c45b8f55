"""The compiled extension ``fastllm._C``: loading it, building it at its first use, and its operators.

Installing compiles it wherever torch and a compiler are there already. Where torch came later, the first call that the
extension would serve compiles it, once, into a cache (``FASTLLM_CACHE``, else ``$XDG_CACHE_HOME/fastllm``, else
``~/.cache/fastllm``); ``FASTLLM_BUILD=0`` leaves that out.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import cpu
from ..locks import lock as take_lock
from . import compile as compiler

NAME = "fastllm._C"
# What decides how it is compiled, beside the sources, torch and Python.
_ENVIRONMENT = (
    "FASTLLM_CUDA",
    "FORCE_CUDA",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
    "DEBUG",
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
)
_FAILED = "failed"

_module: ModuleType | None = None
# Why there is no extension; None: there is one.
_missing: str | None = None
_may_build = False
# What the extension says of itself; empty without one.
_info: dict[str, Any] = {}
_fakes: dict[str, Callable] = {}
_operators: dict[str, Callable] = {}
# The extension's operators as what their __call__ calls, which a compiler cannot trace. For callers who know that there
# is an extension and that nothing is being compiled, it is 1 us nearer than :func:`operator`.
DIRECT: dict[str, Callable] = {}


def module() -> ModuleType | None:
    """``fastllm._C``, or None where it is not there."""
    return _module


def missing() -> str | None:
    """Why the extension is not there, and what to do; None if it is."""
    return _missing


def has_cuda() -> bool:
    """Whether it was built with CUDA code."""
    return _info.get("cuda") is not None


def gpu_obstacle(arch: int) -> str | None:
    """Why its CUDA code does not run on an NVIDIA GPU of the architecture ``arch``, 90 for sm_90; None if it does."""
    entries = _info.get("cuda_architectures", ())
    if any(_runs_on(entry, arch) for entry in entries):
        return None
    return (
        f"the extension was built for {', '.join(entries)}, and this GPU is of sm_{arch} "
        f"(TORCH_CUDA_ARCH_LIST={arch // 10}.{arch % 10} python -m fastllm.build builds it for this one)"
    )


@functools.cache
def _runs_on(entry: str, arch: int) -> bool:
    """Whether what is compiled for ``entry`` of TORCH_CUDA_ARCH_LIST, as "9.0+PTX", runs on ``arch``."""
    number, _, ptx = entry.partition("+")
    built = int(number.rstrip("af").replace(".", ""))
    if number.endswith("a"):  # the features of one architecture
        return arch == built
    same_family = arch // 10 == built // 10 and arch >= built
    return same_family or (bool(ptx) and not number.endswith("f") and arch >= built)


def has_matrix_units() -> bool:
    """Whether it was built with attention and products on AMX and this machine has it."""
    return _info.get("matrix_units", False)


def bf16_products() -> str:
    """What sums products of bfloat16 in fp32 here, for ``add_product_``: "amx", "avx512_bf16" or "none"."""
    return _info.get("bf16_products", "none")


def cpu_level() -> str:
    """The highest of :data:`fastllm.cpu.LEVELS` that the extension uses here; "baseline" without one."""
    return _info.get("cpu_level", "baseline")


def operator(name: str, fake: Callable) -> Callable:
    """The extension's operator ``fastllm::<name>``, to call where there is one; ``fake`` allocates its outputs."""
    _fakes[name] = fake
    if _module is not None:
        _bind(name)

    def call(*args):
        found = _operators if torch.compiler.is_compiling() else DIRECT
        return found[name](*args)

    return call


def build_at_first_use() -> None:
    """Compile the extension into the cache if it was never built, and load it; says so on stderr.

    Does nothing where there is one, where compiling was tried before with the same sources, torch and settings and
    failed, or where FASTLLM_BUILD=0. Afterwards :func:`missing` has the outcome.
    """
    global _may_build, _missing
    if not _may_build:
        return
    _may_build = False
    if os.environ.get("FASTLLM_BUILD", "1") == "0":
        return
    folder = cache_folder()
    target = folder / compiler.extension_name()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder / "lock"):
            if not target.exists():  # else another process built it meanwhile
                if (folder / _FAILED).exists():
                    raise compiler.CannotBuild(os.fsdecode((folder / _FAILED).read_bytes()))
                # Looked for every time: a compiler can be installed, or be on another machine of the same home folder.
                compiler.find_compiler()
                print("fastllm: compiling the extension, this once (a minute or two) ...", file=sys.stderr, flush=True)
                _build_into(folder, target)
    except OSError as error:  # of the folder: read-only, full, no folder
        _missing = f"the extension {NAME} was not built: {error} (FASTLLM_CACHE names another folder for it)"
    except (ValueError, compiler.CannotBuild) as error:
        _missing = f"the extension {NAME} was not built: {error} (python -m fastllm.build tries again)"
    else:
        _load(target)


def _build_into(folder: Path, target: Path) -> None:
    folder = folder.resolve()
    prefix = f"build-{platform.node()}-"
    for left in folder.glob(f"{glob.escape(prefix)}*"):
        if not _is_running(left.name.removeprefix(prefix)):
            shutil.rmtree(left, ignore_errors=True)
    work = folder / f"{prefix}{os.getpid()}"
    work.mkdir()
    try:
        line = compiler.build(work / target.name, work)
        os.replace(work / target.name, target)
    except compiler.CannotBuild as error:
        log = folder / "build.log"
        with contextlib.suppress(FileNotFoundError):
            os.replace(work / log.name, log)
        told = str(error).replace(str(work / log.name), str(log))
        (folder / _FAILED).write_bytes(os.fsencode(told))
        raise compiler.CannotBuild(told) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(line, file=sys.stderr, flush=True)


def _is_running(pid: str) -> bool:
    """Whether another process of that number is there: one that was killed cannot remove what it compiled."""
    if pid == str(os.getpid()):
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:  # another user's
        pass
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time: those of a distributed run all come here at once."""
    with open(path, "w") as file:
        take_lock(file, wait=True, inherited=True)
        yield


def cache_folder() -> Path:
    """Where an extension from these sources, for this torch, Python, environment and kind of machine, belongs."""
    home = os.environ.get("FASTLLM_CACHE")
    root = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastllm")
    parts = [
        compiler.fingerprint(),
        torch.__version__,
        sys.version,
        # A home folder may be on machines of two architectures, or of an older C library, where it would not load.
        platform.machine(),
        *platform.libc_ver(),
        *(os.environ.get(name, "") for name in _ENVIRONMENT),
    ]
    return root / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _bind(name: str) -> None:
    torch.library.register_fake(f"fastllm::{name}", _fakes[name])
    found = getattr(torch.ops.fastllm, name).default
    _operators[name], DIRECT[name] = found, found._op


def _load(path: Path | None = None) -> None:
    """Import the extension, from ``path`` or as installed; sets what the functions above tell."""
    global _module, _missing, _info
    rebuild = "python -m fastllm.build rebuilds it"
    try:
        if path is None:
            found = importlib.import_module(NAME)
        else:
            spec = importlib.util.spec_from_file_location(NAME, path)
            if spec is None or spec.loader is None:
                raise ImportError(f"{path} is not named as an extension")
            found = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
            sys.modules[NAME] = vars(sys.modules["fastllm"])["_C"] = found
    except ModuleNotFoundError:
        _missing = f"the extension {NAME} was not built (python -m fastllm.build builds it, or says why it cannot)"
    except (ImportError, RuntimeError) as error:
        _missing = f"the extension {NAME} does not load ({rebuild}): {error}"
    else:
        if _is_stale(found):
            _missing = f"the extension {NAME} was built from other sources than those here ({rebuild})"
            return
        _module, _missing, _info = found, None, found.build_info()
        for name in _fakes:
            _bind(name)


def _is_stale(found: ModuleType) -> bool:
    """Whether a checkout's C++ and CUDA code has changed since: its operators may have other arguments."""
    try:
        return found.build_info().get("sources") != compiler.fingerprint()
    except compiler.CannotBuild:
        return False  # no sources to compare with


def _find() -> None:
    global _may_build
    cpu.wished()  # raises here what the extension would raise later
    _load()
    if _module is None and NAME not in sys.modules and importlib.util.find_spec(NAME) is None:
        with contextlib.suppress(compiler.CannotBuild, RuntimeError):  # no sources; no home directory
            target = cache_folder() / compiler.extension_name()
            _may_build = True
            if target.exists():
                _load(target)
    _may_build = _may_build and _module is None


_find()
