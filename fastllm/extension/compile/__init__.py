"""Compiles the extension ``fastllm._C``; ``python -m fastllm.build`` does so in place.

``setup.py`` loads this folder alone, often where torch cannot be imported (an isolated build), so nothing in it imports
more than the standard library; torch's headers are looked for among the installed packages. The environment:

=======================  ============================================================================================
``FASTLLM_CUDA``         ``auto`` (the default): CUDA code where there is nvcc and torch's build has CUDA, or
                         ``TORCH_CUDA_ARCH_LIST`` is set; ``0``: none; ``1``: fail without it
``FORCE_CUDA``           ``1`` is FASTLLM_CUDA=1
``TORCH_CUDA_ARCH_LIST`` as PyTorch reads it, "8.0;9.0+PTX"; the default is every GPU from sm_75 on. No GPU is asked for
``CUDA_HOME``            the toolkit; otherwise nvcc from PATH, then /usr/local/cuda
``MAX_JOBS``             compilers that run at once; the default is the number of cores that this process may use
``DEBUG``                ``1``: no optimisation, debug symbols, assertions
``CXX``, ``CXXFLAGS``, ``LDFLAGS``, ``NVCC_FLAGS``   as usual
=======================  ============================================================================================
"""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from .execute import execute
from .sources import PACKAGE, CannotBuild, fingerprint, sources
from .steps import build_steps, extension_name
from .toolchain import Cuda, Torch, architectures, cuda_wish, find_compiler, find_cuda, find_torch

__all__ = [
    "CannotBuild", "Cuda", "Torch", "architectures", "build", "cuda_wish", "extension_name", "find_compiler",
    "find_cuda", "find_torch", "fingerprint", "main", "sources",
]  # fmt: skip


def build(target: Path, work: Path) -> str:
    """Compile the extension to the file ``target``, with objects kept under ``work``.

    Returns:
        One line: what was built and what was not, and why.

    Raises:
        CannotBuild: nothing could be built; or FASTLLM_CUDA=1 and the CUDA code could not.
        ValueError: an environment variable has a value that means nothing.
    """
    wish = cuda_wish()
    cuda, without = None, ""
    try:
        compiler, torch = find_compiler(), find_torch()
    except CannotBuild as error:
        if wish == "1":
            raise CannotBuild(f"FASTLLM_CUDA=1, but {error}") from None
        raise
    try:
        cuda = find_cuda(torch)
    except CannotBuild as error:
        if wish == "1":
            raise CannotBuild(f"FASTLLM_CUDA=1, but {error}") from None
        without = str(error)
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        execute(build_steps(compiler, torch, cuda, work, target), work)
    except CannotBuild as error:
        if cuda is None or wish == "1":
            raise
        cuda, without = None, f"compiling it failed: {error}"
        execute(build_steps(compiler, torch, cuda, work, target), work)
    # An extension by another of Python's names, from an older build: Python would prefer the one for itself alone.
    for suffix in EXTENSION_SUFFIXES:
        other = target.with_name("_C" + suffix)
        if target.name.startswith("_C.") and other != target:
            other.unlink(missing_ok=True)
    device = f"CUDA {cuda.version} code for {', '.join(cuda.architectures)}" if cuda else f"no CUDA code: {without}"
    return f"fastllm: built {target.name} (C++ with {compiler[0]}, torch {torch.version} headers; {device})"


def main(package: Path = PACKAGE) -> int:
    """Build in place, in the folder ``package``; the exit status."""
    work = package.parent / "build" / "extension" if (package.parent / "csrc").is_dir() else package / "build"
    try:
        print(build(package / extension_name(), work), flush=True)
    except (CannotBuild, ValueError, OSError) as error:
        print(f"fastllm: the extension was not built: {error}", file=sys.stderr, flush=True)
        return 1
    return 0
