"""Compiles the extension ``fastllm._C``; ``python -m fastllm.build`` does so in place.

``setup.py`` runs this file too, often where torch cannot be imported (an isolated build), so it imports nothing outside
the standard library and looks for torch's headers among the installed packages. The environment:

=======================  ============================================================================================
``FASTLLM_CUDA``         ``auto`` (the default): CUDA code where there is nvcc and torch's build has CUDA, or
                         ``TORCH_CUDA_ARCH_LIST`` is set; ``0``: none; ``1``: fail without it
``FORCE_CUDA``           ``1`` is FASTLLM_CUDA=1
``TORCH_CUDA_ARCH_LIST`` as PyTorch reads it, "8.0;9.0+PTX"; the default is 9.0+PTX. No GPU is asked for
``CUDA_HOME``            the toolkit; otherwise nvcc from PATH, then /usr/local/cuda
``MAX_JOBS``             compilers that run at once; the default is the number of cores that this process may use
``DEBUG``                ``1``: no optimisation, debug symbols, assertions
``CXX``, ``CXXFLAGS``, ``LDFLAGS``, ``NVCC_FLAGS``   as usual
=======================  ============================================================================================
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
NAMED_ARCHITECTURES = {"Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0;12.0+PTX"}
# The oldest stable ABI that the operators may use: that of torch 2.10.
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# The oldest Python whose stable API the module uses, and the end of such a module's name.
PYTHON_API, STABLE = "0x030a0000", ".abi3.so"
X86_VARIANTS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
# For what runs on matrix units; compilers before GCC 11 and Clang 12 do not know them.
AMX = ["-mamx-tile", "-mamx-bf16", "-mavx512bf16", *X86_VARIANTS["avx512"]]


class CannotBuild(Exception):
    """Why the extension, or its CUDA part, cannot be built here; one line."""


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


@dataclass
class BuildStep:
    """One compilation: inputs -> output."""

    command: list[str]
    output: Path
    inputs: list[Path] = field(default_factory=list)


def sources() -> Path:
    """csrc/: beside the package in a checkout, inside it once installed."""
    for folder in (HERE.parent / "csrc", HERE / "csrc"):
        if (folder / "ops.cpp").is_file():
            return folder
    raise CannotBuild("the sources (csrc/) are missing")


def fingerprint() -> str:
    """16 hexadecimal digits that change with any file of :func:`sources`."""
    folder = sources()
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


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
        result = subprocess.run(args, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CannotBuild(f"{shlex.join(command)} cannot compile C++17: {_first_error(result.stderr)}")
    return command


def cuda_wish() -> str:
    """``auto``, ``0`` or ``1``, from FASTLLM_CUDA and FORCE_CUDA; ValueError if FASTLLM_CUDA is something else."""
    wish = os.environ.get("FASTLLM_CUDA", "auto").strip().lower() or "auto"
    if wish not in ("auto", "0", "1"):
        raise ValueError(f"FASTLLM_CUDA: expected auto, 0 or 1, got {wish!r}")
    return "1" if wish == "auto" and os.environ.get("FORCE_CUDA", "0") == "1" else wish


def architectures() -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST as ("8.0", "9.0+PTX").

    Raises:
        ValueError: an entry is neither a compute capability nor a family's name.
    """
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or "9.0+PTX"
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
        # Of 72 s of processor time that the extension took, 25 were nvcc's.
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
    result = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+)\.(\d+)", result.stdout)
    if result.returncode != 0 or not found:
        raise CannotBuild(f"{nvcc} does not run: {_first_error(result.stderr)}")
    if int(found[1]) < 12:
        raise CannotBuild(f"nvcc {found[1]}.{found[2]} is too old, 12.0 or later is needed")
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    root = Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent
    return Cuda(nvcc, f"{found[1]}.{found[2]}", architectures(), root)


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")


def _debug() -> bool:
    return os.environ.get("DEBUG", "0").lower() not in ("", "0", "false", "off", "no")


def _jobs() -> int:
    wish = os.environ.get("MAX_JOBS", "")
    if wish and (not wish.isdigit() or int(wish) < 1):
        raise ValueError(f"MAX_JOBS: expected a positive number, got {wish!r}")
    if wish:
        return int(wish)
    # As fastllm.other_work.cores, which this file cannot import: a container may allow fewer cores than there are.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _common_flags(torch: Torch, work: Path) -> list[str]:
    flags = ["-std=c++17", f"-I{work}"]
    includes = [torch.include, torch.include / "torch/csrc/api/include", sysconfig.get_path("include")]
    return [*flags, *[part for folder in includes for part in ("-isystem", str(folder))]]


def _knows_amx(compiler: list[str]) -> bool:
    command = [*compiler, *AMX, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _cxx_flags(compiler: list[str], cuda: Cuda | None) -> list[str]:
    optimise = ["-O0", "-g", "-D_GLIBCXX_ASSERTIONS"] if _debug() else ["-O3", "-DNDEBUG"]
    # No contraction of a * b + c: each instruction set would round differently. Nobody reads floating-point exceptions.
    flags = [*optimise, "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math", "-Wall", "-Wextra"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-DFASTLLM_X86_VARIANTS")
        if sys.platform == "linux" and _knows_amx(compiler):
            flags.append("-DFASTLLM_AMX")
    if cuda:
        flags.append("-DFASTLLM_WITH_CUDA")
    return [*flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def _nvcc_flags(cuda: Cuda) -> list[str]:
    flags = ["-O3"] if not _debug() else ["-O0", "-g", "-G"]
    flags += ["-DUSE_CUDA", "-fmad=false", "-Xptxas=-v", "--expt-relaxed-constexpr"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
    for entry in cuda.architectures:
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return [*flags, *shlex.split(os.environ.get("NVCC_FLAGS", ""))]


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _steps(compiler: list[str], torch: Torch, cuda: Cuda | None, work: Path, target: Path) -> list[BuildStep]:
    csrc = sources()
    common, cxx = _common_flags(torch, work), _cxx_flags(compiler, cuda)
    quoted = ", ".join(f'"{a}"' for a in (cuda.architectures if cuda else ()))
    flags = shlex.join(cxx).replace("\\", "\\\\").replace('"', '\\"')
    _write_if_changed(
        work / "fastllm_build.h",
        f'#define FASTLLM_BUILD_FLAGS "{flags}"\n#define FASTLLM_BUILD_TORCH "{torch.version}"\n'
        f'#define FASTLLM_BUILD_SOURCES "{fingerprint()}"\n'
        f'#define FASTLLM_BUILD_CUDA "{cuda.version if cuda else ""}"\n'
        f"#define FASTLLM_BUILD_ARCHITECTURES {{{quoted}}}\n",
    )
    headers = sorted([*csrc.rglob("*.h"), *csrc.rglob("*.cuh")])

    def compile_cxx(source: Path, name: str, extra: list[str], *more: Path) -> BuildStep:
        out = work / f"{name}.o"
        command = [*compiler, *common, *cxx, TARGET, *extra, "-c", str(source), "-o", str(out)]
        return BuildStep(command, out, [source, *headers, *more])

    steps = []
    for source in sorted([*csrc.glob("*.cpp"), *(csrc / "cpu").glob("*.cpp")]):
        if source.name == "module.cpp":
            # It alone knows of Python, and of the fingerprint, which changes with every source.
            api = [f"-DPy_LIMITED_API={PYTHON_API}"] if extension_name().endswith(STABLE) else []
            steps.append(compile_cxx(source, source.stem, api, work / "fastllm_build.h"))
            continue
        extra = AMX if source.stem.endswith("_amx") and "-DFASTLLM_AMX" in cxx else []
        steps.append(compile_cxx(source, source.stem, extra))
    variants = X86_VARIANTS if "-DFASTLLM_X86_VARIANTS" in cxx else {"default": []}
    for source in sorted((csrc / "cpu" / "vector").glob("*.cpp")):
        for name, extra in variants.items():
            steps.append(compile_cxx(source, f"{source.stem}_{name}", [f"-DFASTLLM_ISA=isa_{name}", *extra]))
    if cuda:
        host = ["-ccbin", compiler[0]] if len(compiler) == 1 else []
        for source in sorted((csrc / "cuda").glob("*.cu")):
            out = work / f"{source.stem}.cu.o"
            args = [cuda.nvcc, *common, TARGET, *_nvcc_flags(cuda), *host, "-c", str(source), "-o", str(out)]
            steps.append(BuildStep(args, out, [source, *headers]))
    link = [*compiler, "-shared", *[str(step.output) for step in steps], "-o", str(target), f"-L{torch.lib}"]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup", "-ltorch", "-ltorch_cpu"]
    else:
        # libtorch needs libtorch_cuda only in CUDA builds: named here, it brings the CUDA stream's getter where it is.
        link += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    if cuda:
        folders = [cuda.root / "lib64", cuda.root / "lib", *sorted(cuda.root.glob("targets/*/lib"))]
        link += [f"-L{folder}" for folder in folders if folder.is_dir()]
        link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    link += shlex.split(os.environ.get("LDFLAGS", ""))
    return [*steps, BuildStep(link, target, [step.output for step in steps])]


def _find_ninja() -> str | None:
    found = shutil.which("ninja")
    if found is None:
        spec = PathFinder.find_spec("ninja")
        if spec is not None and spec.origin:
            candidate = Path(spec.origin).parent / "data/bin/ninja"
            found = str(candidate) if candidate.is_file() else None
    return found


def _execute(steps: list[BuildStep], work: Path) -> None:
    """Run the steps, the last one (the link) after the others; skip what is newer than its inputs."""
    ninja = _find_ninja()
    if ninja:

        def path(p: Path) -> str:
            return str(p).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

        lines = ["rule run", "  command = $cmd"]
        for step in steps:
            lines.append(f"build {path(step.output)}: run {' '.join(path(p) for p in step.inputs)}")
            lines.append("  cmd = " + shlex.join(step.command).replace("$", "$$"))
        _write_if_changed(work / "build.ninja", "\n".join([*lines, ""]))
        result = subprocess.run(
            [ninja, "-C", str(work), "-j", str(_jobs())], capture_output=True, text=True, check=False
        )
        (work / "build.log").write_text(result.stdout + result.stderr)
        if result.returncode != 0:
            raise CannotBuild(f"{_first_error(result.stdout)} (all of it in {work / 'build.log'})")
        return

    def run(step: BuildStep) -> subprocess.CompletedProcess | None:
        newest = max(p.stat().st_mtime for p in step.inputs)
        if step.output.is_file() and step.output.stat().st_mtime > newest:
            return None
        return subprocess.run(step.command, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(_jobs()) as pool:
        results = list(pool.map(run, steps[:-1]))
    if all(result is None or result.returncode == 0 for result in results):
        results.append(run(steps[-1]))
    results = [result for result in results if result is not None]
    (work / "build.log").write_text("".join(result.stdout + result.stderr for result in results))
    for result in results:
        if result.returncode != 0:
            raise CannotBuild(f"{_first_error(result.stderr)} (all of it in {work / 'build.log'})")


def extension_name() -> str:
    """``_C.abi3.so``, which every Python from 3.10 on loads; another for a Python without the stable API."""
    return "_C" + (STABLE if STABLE in EXTENSION_SUFFIXES else EXTENSION_SUFFIXES[0])


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
        _execute(_steps(compiler, torch, cuda, work, target), work)
    except CannotBuild as error:
        if cuda is None or wish == "1":
            raise
        cuda, without = None, f"compiling it failed: {error}"
        _execute(_steps(compiler, torch, cuda, work, target), work)
    # An extension by another of Python's names, from an older build: Python would prefer the one for itself alone.
    for suffix in EXTENSION_SUFFIXES:
        other = target.with_name("_C" + suffix)
        if target.name.startswith("_C.") and other != target:
            other.unlink(missing_ok=True)
    device = f"CUDA {cuda.version} code for {', '.join(cuda.architectures)}" if cuda else f"no CUDA code: {without}"
    return f"fastllm: built {target.name} (C++ with {compiler[0]}, torch {torch.version} headers; {device})"


def main() -> int:
    """Build in place, beside this file."""
    work = HERE.parent / "build" / "extension" if (HERE.parent / "csrc").is_dir() else HERE / "build"
    try:
        print(build(HERE / extension_name(), work), flush=True)
    except (CannotBuild, ValueError) as error:
        print(f"fastllm: the extension was not built: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
