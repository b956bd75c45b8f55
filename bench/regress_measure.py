"""What the calls of a file launch: the worker of :mod:`.regress`, in a process of its own.

    python -m fastllm.bench.regress_measure compile FILE --arch 80 90     kernels as they are compiled, for each GPU
    python -m fastllm.bench.regress_measure bytes FILE                    bytes, counted in Triton's interpreter

prints one JSON object: ``rows``, and ``failures`` (call -> why it could not be measured).
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton import language as tl
from triton.language.extra import libdevice
from triton.runtime import driver, interpreter
from triton.runtime.autotuner import Autotuner

from ..kernels.device import GPUS, DeviceInfo
from .capture import CUDA, pretend, pretended_driver, pretended_properties
from .limits import Footprint, over_limits
from .module_files import module_of
from .rival import first_line
from .sass import read_resources
from .traffic import count_traffic

# Programs of a launch that the interpreter runs; what they move is scaled to the grid. A guess.
PROGRAMS = 16


def load(file: Path) -> ModuleType:
    """The file as a module; its folder can be imported from, as for a script."""
    sys.path.insert(0, str(file.resolve().parent))
    return module_of(file, file.stem)


def calls_of(module: ModuleType) -> dict[str, Callable]:
    """The module's own functions that take one argument, ``device``."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        and list(inspect.signature(value).parameters) == ["device"]
    }  # fmt: skip


class _Configurations:
    """Stands in for the autotuner: runs every configuration, or the first, where no GPU can time them."""

    def __init__(self, every: bool):
        self.every = every
        self.label = ""

    def run(self, tuner: Autotuner, *args, **kwargs):
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        chosen = tuner.prune_configs(kwargs) if len(tuner.configs) > 1 else tuner.configs
        result = None
        for config in chosen if self.every else chosen[:1]:
            if len(chosen) > 1:
                self.label = f"[{', '.join(f'{name}={value}' for name, value in config.all_kwargs().items())}]"
            if config.pre_hook is not None:
                config.pre_hook({**tuner.nargs, **kwargs, **config.all_kwargs()})
            result = tuner.fn.run(*args, **kwargs, **config.all_kwargs())
        self.label, tuner.nargs = "", None
        return result


@contextlib.contextmanager
def _no_device(gpu: DeviceInfo, configurations: _Configurations) -> Iterator[None]:
    """What foreign launchers ask of a device beside what a launch needs."""

    def run(tuner, *args, **kwargs):
        return configurations.run(tuner, *args, **kwargs)

    properties = pretended_properties(gpu)
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (Autotuner, "run", run),
            (torch.cuda, "device", lambda device: contextlib.nullcontext()),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "synchronize", lambda device=None: None),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.cuda, "get_device_capability", lambda device=None: (properties.major, properties.minor)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


def _reason(error: Exception) -> str:
    if "on meta tensors" in str(error):
        return "it reads a value back to the host, which waits for the GPU and has no answer without one"
    return first_line(error).removesuffix(": ")


class _Recorder:
    """Collects the kernels of one call after another for one GPU; a kernel compiled twice the same is one row."""

    def __init__(self, gpu: DeviceInfo, configurations: _Configurations):
        self.gpu, self.configurations = gpu, configurations
        self.call = ""
        # Call and kernel -> hash -> row.
        self.found: dict[tuple[str, str], dict[str, dict]] = {}

    def __call__(self, kernel: str, grid: tuple[int, ...], launched) -> None:
        name = kernel + self.configurations.label
        variants = self.found.setdefault((self.call, name), {})
        if launched.hash in variants:
            variants[launched.hash]["launches"] += 1
            return
        grid, used, arch = (*grid, 1, 1)[:3], read_resources(launched), self.gpu.arch
        variants[launched.hash] = dict(
            call=self.call, kernel=name if not variants else f"{name} #{len(variants) + 1}", arch=arch, launches=1,
            grid=list(grid), warps=used.num_warps, registers=used.registers, spills=used.spills, shared=used.shared,
            occupancy=round(used.occupancy(arch), 4), fp64=used.doubles, tensor_core=used.tensor_core,
            widest_load=max(used.load_widths, default=0), widest_store=max(used.store_widths, default=0),
            over=over_limits(Footprint(grid, used.num_warps * 32, used.registers, used.shared), self.gpu),
        )  # fmt: skip

    def rows(self) -> list[dict]:
        return [row for variants in self.found.values() for row in variants.values()]


def compiled(file: Path, arches: list[int]) -> dict:
    """One row for each kernel of each call, as it is compiled for each architecture."""
    rows, failures, calls = [], {}, {}
    for arch in arches:
        configurations = _Configurations(every=True)
        recorder = _Recorder(GPUS[arch], configurations)
        with _no_device(GPUS[arch], configurations), pretend(GPUS[arch], recorder):
            calls = calls_of(load(file))
            for name, call in calls.items():
                recorder.call = name
                torch.manual_seed(0)
                try:
                    call(CUDA)
                except Exception as error:  # whatever a stranger's code raises
                    failures[f"{name}, sm_{arch}"] = _reason(error)
                    continue
                if not any(launched == name for launched, _ in recorder.found):
                    failures[f"{name}, sm_{arch}"] = "launched no Triton kernel"
        rows += recorder.rows()
    return {"rows": rows, "failures": failures, "calls": list(calls)}


# libdevice's functions of one or two numbers, which the interpreter lacks, by NumPy.
_LIBDEVICE = {
    "rsqrt": lambda x: 1 / np.sqrt(x), "fabs": np.abs, "pow": np.power, "fast_powf": np.power, "div_rn": np.divide,
    "erf": np.vectorize(math.erf, otypes=[np.float32]), "acos": np.arccos, "asin": np.arcsin, "atan": np.arctan,
    "atan2": np.arctan2, "fast_expf": np.exp, "fast_logf": np.log, "fast_sinf": np.sin, "fast_cosf": np.cos,
    "fast_dividef": np.divide, "fast_tanhf": np.tanh,
    **{
        name: getattr(np, name)
        for name in (
            "sqrt", "exp",
            "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "sinh", "cosh", "tanh",
            "floor", "ceil", "trunc", "rint", "cbrt", "fmax", "fmin", "hypot", "copysign",
        )
    },
}  # fmt: skip


def _as_interpreted(function: Callable) -> Callable:
    def interpreted(*values):
        first: Any = next(value for value in values if isinstance(value, tl.tensor))
        numbers = [value.handle.data if isinstance(value, tl.tensor) else value for value in values]
        data = function(*numbers).astype(first.handle.data.dtype)
        return tl.tensor(interpreter.TensorHandle(data, first.handle.dtype), first.type)

    return interpreted


def _float_as_compiled(convert: Callable) -> Callable:
    """The interpreter's conversion of arguments, with a Python float as the compiler takes it: a number of fp32."""

    def converted(arg):
        if isinstance(arg, float):
            return tl.tensor(interpreter.TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
        return convert(arg)

    return converted


def counted(file: Path) -> dict:
    """One row for each kernel of each call: the bytes that it loads and stores, on CPU tensors in the interpreter."""
    rows, failures = [], {}
    gpu, cpu = GPUS[90], torch.device("cpu")
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, driver, "_active", driver._active)
        driver.set_active(pretended_driver(gpu, cpu))
        stack.enter_context(_no_device(gpu, _Configurations(every=False)))
        for name, function in _LIBDEVICE.items():
            if hasattr(libdevice, name):
                stack.enter_context(mock.patch.object(libdevice, name, _as_interpreted(function)))
        convert = _float_as_compiled(interpreter._implicit_cvt)
        stack.enter_context(mock.patch.object(interpreter, "_implicit_cvt", convert))
        for name, call in calls_of(load(file)).items():
            torch.manual_seed(0)
            try:
                with count_traffic(PROGRAMS) as traffic:
                    call(cpu)
            except Exception as error:  # whatever a stranger's code raises
                failures[name] = _reason(error)
                continue
            for kernel in dict.fromkeys(access.kernel for access in traffic.accesses):
                mine = [access for access in traffic.accesses if access.kernel == kernel]
                loaded, stored = sum(a.loaded for a in mine), sum(a.stored for a in mine)
                rows.append(dict(call=name, kernel=kernel, loaded=loaded, stored=stored))
    return {"rows": rows, "failures": failures}


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m fastllm.bench.regress_measure")
    parser.add_argument("what", choices=("compile", "bytes"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--arch", type=int, nargs="+", choices=list(GPUS), default=list(GPUS))
    options = parser.parse_args(argv)
    output, sys.stdout = sys.stdout, sys.stderr  # what the file prints is not the result
    try:
        found = compiled(options.file, options.arch) if options.what == "compile" else counted(options.file)
    finally:
        sys.stdout = output
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
