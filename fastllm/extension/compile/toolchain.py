"""What there is to compile with: the headers and libraries of torch, the C++ compiler, CUDA's nvcc."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from .sources import CannotBuild, sources

# Every NVIDIA GPU from sm_75 on: 8.0 also runs on all others of major version 8, and a driver compiles PTX for newer
# GPUs. nvcc takes 41 s of one core of an AMD EPYC for these, and 25 s for 9.0+PTX alone.
ARCHITECTURES = "7.5;8.0;9.0+PTX"
NAMED_ARCHITECTURES = {"Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0;12.0+PTX"}


@dataclass(frozen=True)
class Torch:
    """The headers and libraries of an installed torch."""

    include: Path
    lib: Path
    version: str
    cuda: str | None  # the CUDA that it was built for


@dataclass(frozen=True)
class Cuda:
    """An nvcc that runs, its version, and what to compile for: "9.0", "9.0+PTX", ..."""

    nvcc: str
    version: str
    architectures: tuple[str, ...]
    root: Path  # of the toolkit: nvcc on PATH may be a script or a link


def find_torch() -> Torch:
    """The torch that the extension will run beside; CannotBuild if none is installed."""
    # An isolated build hides the environment's packages from sys.path; sysconfig and site still know where they are.
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    spec = PathFinder.find_spec("torch", [folder for folder in folders if folder])
    root = Path(spec.origin).parent if spec is not None and spec.origin else None
    if root is None or not (root / "include/torch/csrc/stable/library.h").is_file():
        raise CannotBuild("torch>=2.11 is not installed yet (install it first, then run: python -m fastllm.build)")
    text = (root / "version.py").read_text()
    found = re.search(r"__version__ = ['\"]([^'\"]+)", text)
    cuda = re.search(r"^cuda\b[^=\n]*= ['\"]([^'\"]+)", text, re.MULTILINE)
    return Torch(root / "include", root / "lib", found[1] if found else "unknown", cuda[1] if cuda else None)


def find_compiler() -> list[str]:
    """The C++ compiler as a command; CannotBuild if there is none that can compile and link a trivial library."""
    if sys.platform == "win32":
        raise CannotBuild("the extension builds on Linux and macOS only")
    wish = shlex.split(os.environ.get("CXX", ""))
    names = [wish] if wish else [["c++"], ["g++"], ["clang++"]]
    command = next((n for n in names if shutil.which(n[0])), None)
    if command is None:
        raise CannotBuild(f"there is no C++ compiler ({wish[0] if wish else 'c++, g++ or clang++'})")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file():
        raise CannotBuild(f"Python's headers are not installed ({headers})")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <optional>\nint probe() { return std::optional<int>(1).value(); }\n")
        library = Path(folder, "probe.so")
        args = [*command, "-std=c++17", "-fPIC", "-shared", str(source), "-o", str(library)]
        try:
            result = run(args)
        except OSError as error:  # a compiler for other machines
            raise CannotBuild(f"{shlex.join(command)} does not run: {error.strerror}") from None
    if result.returncode != 0:
        raise CannotBuild(f"{shlex.join(command)} cannot compile C++17: {first_error(result.stderr)}")
    return command


def cuda_wish() -> str:
    """``auto``, ``0`` or ``1``, from FASTLLM_CUDA and FORCE_CUDA; ValueError if FASTLLM_CUDA is something else."""
    wish = os.environ.get("FASTLLM_CUDA", "auto").strip().lower() or "auto"
    if wish not in ("auto", "0", "1"):
        raise ValueError(f"FASTLLM_CUDA: expected auto, 0 or 1, got {wish!r}")
    return "1" if wish == "auto" and os.environ.get("FORCE_CUDA", "0") == "1" else wish


def architectures() -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST as ("8.0", "9.0+PTX"); :data:`ARCHITECTURES` where it is not set.

    Raises:
        ValueError: an entry is neither a compute capability nor a family's name.
    """
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or ARCHITECTURES
    for name, value in NAMED_ARCHITECTURES.items():
        text = re.sub(rf"\b{name}\b(\+PTX)?", value, text, flags=re.IGNORECASE)
    found = tuple(dict.fromkeys(text.replace(";", " ").replace(",", " ").split()))
    for entry in found:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected entries such as 9.0 or 9.0+PTX, got {entry!r}")
    return found


def find_cuda(torch: Torch) -> Cuda:
    """The CUDA compiler.

    Raises:
        CannotBuild: nobody asks for CUDA code, or there is no nvcc that runs, or it is too old.
    """
    if cuda_wish() == "0":
        raise CannotBuild("FASTLLM_CUDA=0")
    if cuda_wish() == "auto" and torch.cuda is None and not os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        # nvcc would nearly double the 47 s that the C++ takes on the same core.
        raise CannotBuild(f"torch {torch.version} has none (FASTLLM_CUDA=1 compiles it all the same)")
    if not any((sources() / "cuda").glob("*.cu")):
        raise CannotBuild("there are no CUDA sources")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [str(Path(home, "bin/nvcc")) for home in homes if home]
    if not places:
        places = [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if nvcc is None:
        raise CannotBuild("there is no nvcc" + (f" in {places[0]}" if any(homes) else " on PATH or in /usr/local/cuda"))
    result = run([nvcc, "--version"])
    found = re.search(r"release (\d+)\.(\d+)", result.stdout)
    if result.returncode != 0 or not found:
        raise CannotBuild(f"{nvcc} does not run: {first_error(result.stderr)}")
    version = f"{found[1]}.{found[2]}"
    if int(found[1]) < 12:
        raise CannotBuild(f"nvcc {version} is too old, 12.0 or later is needed")
    if cuda_wish() == "auto" and torch.cuda is not None and int(found[1]) > int(torch.cuda.partition(".")[0]):
        raise CannotBuild(
            f"nvcc {version} is newer than torch's CUDA {torch.cuda}, and its code needs a driver that torch does not "
            "(CUDA_HOME names another nvcc; FASTLLM_CUDA=1 takes this one)"
        )
    plan = run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    root = Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent
    return Cuda(nvcc, version, architectures(), root)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """What a compiler says, in English, in which :func:`first_error` looks; paths in it may have any bytes."""
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=os.environ | {"LC_ALL": "C"}, check=False
    )


def first_error(text: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
