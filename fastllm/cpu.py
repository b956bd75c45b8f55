"""What this CPU can do: its instruction sets, as far as the environment allows them, and products of 16-bit numbers.

A CPU without products of bfloat16 is slow at them: two cores of an AMD EPYC held to AVX2 multiplied square matrices of
256 at 0.9 GFLOP/s in bfloat16 and at 58 in float32. What chooses a precision asks here first.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.compiler.config

from .config import InputError

P = ParamSpec("P")
R = TypeVar("R")

LEVELS = ("baseline", "avx2", "avx512", "amx")
# What lowers the instruction sets of this library, of PyTorch's kernels, of oneDNN and of MKL.
CAPS = ("FASTLLM_CPU", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
# The flags of /proc/cpuinfo that a level needs beside those of the level below.
_NEEDS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "amx": {"amx_tile", "amx_bf16", "avx512_bf16"},
}
# oneDNN's names in ascending order, each with the level that it allows.
# https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
_ONEDNN = {
    "SSE41": "baseline", "AVX": "baseline", "AVX2": "avx2", "AVX2_VNNI": "avx2", "AVX2_VNNI_2": "avx2",
    "AVX512_CORE": "avx512", "AVX512_CORE_VNNI": "avx512", "AVX512_CORE_BF16": "avx512", "AVX512_CORE_FP16": "avx512",
    "AVX10_1_512": "avx512", "AVX512_CORE_AMX": "amx", "AVX10_1_512_AMX": "amx", "AVX512_CORE_AMX_FP16": "amx",
    "AVX10_1_512_AMX_FP16": "amx",
}  # fmt: skip
# The least of oneDNN's names with which PyTorch's products of a dtype are its hardware's, and the flags of a level.
_PRODUCTS = {
    torch.bfloat16: ("AVX512_CORE_BF16", {"avx512": "avx512_bf16", "amx": "amx_bf16"}),
    torch.float16: ("AVX512_CORE_FP16", {"avx512": "avx512_fp16", "amx": "amx_fp16"}),
}
# A 16-bit product that takes longer than this many of float32 is not the hardware's. Measured with 128 x 128 on two
# cores of an AMD EPYC: 0.9 where it is, 43 where it is not.
_SLOWER = 3.0
_SIZE = 128


class Cpu(NamedTuple):
    """What a CPU can do, held to its caps.

    ``level``: the highest of :data:`LEVELS` that this library, PyTorch and oneDNN may all use. ``caps``: what the
    environment sets of :data:`CAPS`. ``products``: dtype -> whether its products are in hardware; None: not known.
    """

    level: str
    caps: dict[str, str]
    products: dict[torch.dtype, bool | None]


def wished(environment: Mapping[str, str] = os.environ) -> str:
    """The level to which FASTLLM_CPU holds this library: one of :data:`LEVELS`; the highest where it is not set.

    Raises:
        InputError: it has another value.
    """
    wish = environment.get("FASTLLM_CPU") or LEVELS[-1]
    if wish not in LEVELS:
        raise InputError(f"FASTLLM_CPU: expected {', '.join(LEVELS[:-1])} or {LEVELS[-1]}, got {wish!r}")
    return wish


def _lowest(*levels: str) -> str:
    return min(levels, key=LEVELS.index)


def find(flags: frozenset[str] | None, torchs: str, environment: Mapping[str, str]) -> Cpu:
    """What a CPU can do.

    Args:
        flags: as /proc/cpuinfo of Linux names them on x86; None where they are not known.
        torchs: ``torch.backends.cpu.get_cpu_capability()``.
        environment: the variables of the process.
    """
    caps = {name: environment[name] for name in CAPS if environment.get(name)}
    # PyTorch's highest name is AVX512; it says nothing about matrix units.
    torch_allows = {"AVX2": "avx2", "AVX512": "amx"}.get(torchs.upper(), "baseline")
    asked = (environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or "").upper()
    onednn = asked if asked in _ONEDNN else None  # oneDNN takes no notice of another name
    allowed = _lowest(wished(environment), torch_allows, _ONEDNN.get(asked, "amx"))
    if flags is None:
        # PyTorch has looked: it uses no more than the machine has.
        level = _lowest(allowed, "avx512")
        capped = caps and LEVELS.index(allowed) < LEVELS.index("avx512")
        return Cpu(level, caps, dict.fromkeys(_PRODUCTS, False if capped else None))
    level = LEVELS[0]
    for name in LEVELS[1:]:
        if not _NEEDS[name] <= flags:
            break
        level = name
    level = _lowest(level, allowed)
    names = list(_ONEDNN)
    products = {}
    for dtype, (least, flag_of) in _PRODUCTS.items():
        reached = onednn is None or names.index(onednn) >= names.index(least)
        has = any(flag in flags for at, flag in flag_of.items() if LEVELS.index(at) <= LEVELS.index(level))
        products[dtype] = reached and has
    return Cpu(level, caps, products)


def _written(name: str) -> str | None:
    """What Linux's /proc/cpuinfo says of an x86 CPU under ``name``; None on other systems and CPUs."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _flags() -> frozenset[str] | None:
    """The flags of an x86 CPU by Linux's names; None on other systems and CPUs."""
    flags = _written("flags")
    return None if flags is None else frozenset(flags.split())


@functools.cache
def maker() -> str | None:
    """Who made an x86 CPU, as it names itself ("GenuineIntel", "AuthenticAMD"); None on other systems and CPUs."""
    return _written("vendor_id")


@functools.cache
def here() -> Cpu:
    """This CPU. PyTorch and oneDNN read the environment once, and so does this."""
    flags = _flags()
    found = find(flags, torch.backends.cpu.get_cpu_capability(), os.environ)
    if flags is not None and not torch.backends.mkldnn.is_available():  # it is oneDNN that multiplies 16 bits on x86
        return found._replace(products=dict.fromkeys(found.products, False))
    return found


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of three small products of ``dtype``, after one that does not count."""
    a = torch.ones(_SIZE, _SIZE, dtype=dtype)
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        torch.matmul(a, a)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


@functools.cache
def _measured(dtype: torch.dtype) -> bool:
    # In a thread of its own, which has none of the caller's modes: autocast, fake tensors, tracing.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: _seconds(dtype) <= _SLOWER * _seconds(torch.float32)).result()


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the hardware has matrix products of ``dtype``, as PyTorch calls them on a CPU.

    By the CPU's flags and the caps; where flags are not known (macOS, ARM), by a few milliseconds of small products.
    float32 and float64 always are.
    """
    if dtype not in _PRODUCTS:
        return True
    known = here().products[dtype]
    return _measured(dtype) if known is None else known


# What torch.compiler.assume_constant_result does: a compiler takes the answer instead of reading /proc/cpuinfo.
multiplies._dynamo_marked_constant = True


def matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where ``device`` has products of it, else float32: what may be narrow is to be multiplied in it."""
    return torch.bfloat16 if device.type != "cpu" or multiplies(torch.bfloat16) else torch.float32


def precision(device: torch.device) -> str:
    """:func:`matmul_dtype` by name: "bfloat16" or "float32"."""
    return str(matmul_dtype(device)).removeprefix("torch.")


def level() -> str:
    """The highest of :data:`LEVELS` that this process may use here."""
    return here().level


def kind() -> str:
    """The level and the 16-bit products, in words: what decides which precision is fast here."""
    narrow = [str(dtype).removeprefix("torch.") for dtype in _PRODUCTS if multiplies(dtype)]
    return f"{level()}, 16-bit products in hardware: {' and '.join(narrow) or 'none'}"


def summary() -> str:
    """:func:`kind` and the caps in force, in a line."""
    caps = ", ".join(f"{name}={value}" for name, value in here().caps.items())
    return f"{kind()}; {'capped by ' + caps if caps else 'no caps'}"


def compiled(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    """``torch.compile(function, **options)``, whose code on disk serves this vector level alone.

    Inductor writes the number of a vector's lanes into its C++ code and not into the key of that code (torch 2.11 to
    2.13): a layer norm compiled at AVX-512 gave NaN at AVX2 from the same folder, and the other way round the process
    crashed. PyTorch's own tag of those keys is set, for the process, since a function is compiled when it is called.
    """
    level, tag = torch.backends.cpu.get_cpu_capability(), torch.compiler.config.cache_key_tag
    if level not in tag.split():
        torch.compiler.config.cache_key_tag = f"{tag} {level}".strip()
    return torch.compile(function, **options)
