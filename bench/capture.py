"""Runs an op for a GPU that is not there and records what it launches, compiled as the runtime would compile it.

CUDA tensors are pretended: meta tensors whose Python ``device`` says cuda, so an op's public function, its gradient
and its launchers run unchanged, and one that reads a value back to the host fails. The launches go through
Triton's own ``JITFunction.run`` up to the point where it would need a device: argument types, divisibility by 16,
constants and options are those of a real call, and no second list of launch settings exists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
import triton
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from ..backends import backend
from ..kernels import device as kernels_device
from ..kernels.device import DeviceInfo
from ..registry import LAUNCHERS, Op, Sample
from . import cases

CUDA = torch.device("cuda", 0)
_META = torch.device("meta")
# Any address that is a multiple of what CUDA's allocator aligns to (512 bytes).
_BASE = 1 << 30


class _PretendedTensor(torch.Tensor):
    """A meta tensor that calls itself CUDA; ``data_ptr`` keeps the alignment of its storage offset."""

    meta: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    # torch's stubs have attributes here, which a subclass cannot answer for itself but by properties.
    device = property(lambda self: CUDA)  # pyright: ignore[reportAssignmentType]
    is_cuda = property(lambda self: True)  # pyright: ignore[reportAssignmentType]
    is_meta = property(lambda self: False)  # pyright: ignore[reportAssignmentType]
    is_cpu = property(lambda self: False)  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, meta: torch.Tensor):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=_META,
        )
        tensor.meta = meta
        return tensor

    def data_ptr(self) -> int:
        return _BASE + int(self.storage_offset()) * self.element_size()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _on_meta(func, args, kwargs or {})


def _on_meta(func, args, kwargs):
    args, kwargs = tree_map_only(_PretendedTensor, lambda t: t.meta, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda d: _META if d.type == "cuda" else d, (args, kwargs))
    # torch 2.11 takes this operator apart with its out_dtype as beta. A GPU runs it whole.
    whole = func is torch.ops.aten.addmm.dtype_out
    return tree_map_only(torch.Tensor, _PretendedTensor, kwargs["out"] if whole else func(*args, **kwargs))


class _PretendedDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        launch = _launcher(func)
        if launch is not None:
            with self:
                return launch(*args, **(kwargs or {}))
        return _on_meta(func, args, kwargs or {})


def _launcher(func) -> Callable | None:
    """What an operator of ours, or of ``torch.library.custom_op``, runs on a GPU; None for PyTorch's own."""
    if func.namespace == "fastllm":
        return LAUNCHERS[func._schema.name.removeprefix("fastllm::")]
    custom = OPDEFS.get(func._schema.name)
    return custom and (custom._backend_fns.get("cuda") or custom._backend_fns.get(None))


class _Driver:
    """What ``JITFunction.run`` asks of the active driver before it loads a kernel, and what launchers ask of it."""

    def __init__(self, gpu: DeviceInfo, device: torch.device):
        amd = gpu.vendor == "amd"
        self.target = GPUTarget("hip", gpu.gfx, gpu.lanes) if amd else GPUTarget("cuda", gpu.arch, 32)
        self.device = device
        sizes = {"multiprocessor_count": gpu.processors, "max_shared_mem": gpu.shared_per_block, "warpSize": gpu.lanes}
        self.utils = SimpleNamespace(get_device_properties=lambda index: sizes | {"max_num_regs": 65536})

    def get_active_torch_device(self):
        return self.device

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # the key of JITFunction's cache of compiled kernels

    def get_current_stream(self, device):
        return 0


def pretended_driver(gpu: DeviceInfo, device: torch.device = CUDA) -> DriverBase:
    """A driver of Triton's for a GPU that is not there; ``device`` is what it calls the active one."""
    return cast(DriverBase, _Driver(gpu, device))


def pretended_properties(gpu: DeviceInfo) -> SimpleNamespace:
    """What ``torch.cuda.get_device_properties`` would say, as far as launchers ask."""
    return SimpleNamespace(
        name=gpu.name,
        major=gpu.arch // 10,
        minor=gpu.arch % 10,
        multi_processor_count=gpu.processors,
        shared_memory_per_block_optin=gpu.shared_per_block,
    )


@dataclass(frozen=True)
class Launch:
    """One kernel launch: its grid and the kernel as Triton compiled it."""

    direction: str
    kernel: str
    grid: tuple[int, ...]
    compiled: Any


def short_name(kernel: str) -> str:
    """A kernel's name as tables show it: ``_forward_kernel`` is ``forward``."""
    return kernel.strip("_").removesuffix("_kernel")


def check_compiles() -> None:
    """Raises RuntimeError where Triton's interpreter is on, so that there is nothing to compile."""
    if knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1: it is read when they are decorated")


@contextlib.contextmanager
def pretend(gpu: DeviceInfo, on_launch: Callable[[str, tuple[int, ...], Any], None]) -> Iterator[None]:
    """Within the block, ``device="cuda"`` is a pretended ``gpu``; a launch calls ``on_launch(name, grid, compiled)``.

    Raises:
        RuntimeError: Triton's interpreter is on, so there is nothing to compile.
    """
    check_compiles()
    compile_only = JITFunction.run

    def run(kernel, *args, grid, warmup, **kwargs):
        compiled = compile_only(kernel, *args, grid=grid, warmup=True, **kwargs)
        if callable(grid):
            grid = cast(Sequence[int], grid({**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}))
        on_launch(kernel.__name__, tuple(int(n) for n in grid), compiled)
        return compiled

    properties = pretended_properties(gpu)
    active = triton.runtime.driver._active
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, triton.runtime.driver, "_active", active)
        triton.runtime.driver.set_active(pretended_driver(gpu))
        for target, name, value in (
            (JITFunction, "run", run),
            (kernels_device, "_gpu", lambda index: gpu),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.cuda, "get_device_capability", lambda device=None: (properties.major, properties.minor)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(_PretendedDevice())
        yield


def launches(op: Op, sample: Callable[[], Sample], gpu: DeviceInfo, name: str = "triton") -> list[Launch]:
    """Every launch of one forward and, where inputs require grad, one backward of ``op`` by the backend ``name``.

    ``sample`` makes the call's tensors on :data:`CUDA`; it runs where that device is pretended.
    """
    found: list[Launch] = []
    direction = "forward"

    def on_launch(kernel, grid, compiled):
        found.append(Launch(direction, kernel, grid, compiled))

    with pretend(gpu, on_launch), backend(name):
        call = sample()
        outputs = cases.forward(op.function, call)
        leaves = cases.differentiable(call)
        if leaves:
            direction = "backward"
            cases.backward(outputs, leaves, [torch.empty_like(y) for y in outputs])
    return found
