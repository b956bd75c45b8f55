"""How the extension is compiled: a command for each source and vector level, and the link."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from .sources import fingerprint, sources
from .toolchain import Cuda, Torch

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


@dataclass
class BuildStep:
    """One compilation: inputs -> output."""

    command: list[str]
    output: Path
    inputs: list[Path] = field(default_factory=list)


def extension_name() -> str:
    """``_C.abi3.so``, which every Python from 3.10 on loads; another for a Python without the stable API."""
    return "_C" + (STABLE if STABLE in EXTENSION_SUFFIXES else EXTENSION_SUFFIXES[0])


def _debug() -> bool:
    return os.environ.get("DEBUG", "0").lower() not in ("", "0", "false", "off", "no")


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


def write_if_changed(path: Path, text: str) -> None:
    """Write ``text``, unless it is there: a newer file would be compiled again."""
    content = os.fsencode(text)  # paths in it may have any bytes
    if not path.is_file() or path.read_bytes() != content:
        path.write_bytes(content)


def build_steps(compiler: list[str], torch: Torch, cuda: Cuda | None, work: Path, target: Path) -> list[BuildStep]:
    """The compilations of all sources, and last the link that makes ``target``; objects go to ``work``."""
    csrc = sources()
    common, cxx = _common_flags(torch, work), _cxx_flags(compiler, cuda)
    quoted = ", ".join(f'"{a}"' for a in (cuda.architectures if cuda else ()))
    flags = shlex.join(cxx).replace("\\", "\\\\").replace('"', '\\"')
    write_if_changed(
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
