"""What more than one launcher needs."""

import functools
from typing import NamedTuple

import torch
import triton

from .device import DeviceInfo, device_info
from .tuned import TUNED


def launch_options(device: torch.device, **options) -> dict:
    """A launch's options on ``device``, of those that an NVIDIA GPU takes: ``num_warps``, ``maxnreg`` and others.

    a * b + c is rounded once, whatever Triton's version or the environment has as its default. A GPU of AMD has no
    ``maxnreg``, and where its warps have 64 lanes it takes half as many for as many threads. Equal choices are one
    dict, which is not to be changed.
    """
    return _options(device_info(device), **options)


@functools.cache
def _options(info: DeviceInfo, *, num_warps: int, maxnreg: int | None = None, **more) -> dict:
    options = {"enable_fp_fusion": True, **more}
    if info.vendor != "amd":
        if maxnreg is not None:
            options["maxnreg"] = maxnreg
        return options | {"num_warps": num_warps}
    return options | {"num_warps": max(1, num_warps * 32 // info.lanes)}


def processor_count(device: torch.device) -> int:
    """The device's streaming multiprocessors; see :func:`.device.device_info`."""
    return device_info(device).processors


def tuned(kernel: str, device: torch.device, key: tuple, settings: dict[str, int]) -> dict[str, int]:
    """``settings``, or what was measured to be faster where ``kernel`` decides by ``key`` on such a GPU."""
    info = device_info(device)
    # The interpreter has no times, so no entry is its own; 0 stands for it where a table is filled by a test.
    arch = 0 if info.vendor == "interpreter" else info.gfx or info.arch
    return TUNED.get((kernel, arch, *key), settings)


def keyed(*functions) -> None:
    """Has Triton hash device functions that read a constant of a module, or call one that does, at their definition.

    Triton 3.6 takes such a constant into the key of a kernel that calls them where they were hashed before it, and else
    not. So what a process compiled earlier would decide whether it finds a kernel that was compiled beforehand.
    """
    if triton.knobs.runtime.interpret:  # the interpreter's functions have no keys
        return
    for function in functions:
        _ = function.cache_key


TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


def cluster_blocks(device: torch.device, n_cols: int, most: int) -> int:
    """How many blocks of a cluster share a row, where one block holds ``most`` columns; 0 where no cluster can.

    GPUs of sm_90 and later have clusters, and each of them grants at least 8 blocks. The interpreter takes what sm_90
    takes.
    """
    info = device_info(device)
    # Triton 3.8 is the first that compiles a reduction across a cluster's blocks.
    if info.vendor != "interpreter" and not (TRITON >= (3, 8) and info.arch >= 90):
        return 0
    blocks = next_power_of_2(cdiv(n_cols, max(most, 1)))
    return blocks if blocks <= 8 else 0


# Triton has both, for constants of kernels too. A call of those takes 2 us of a launch's host time, of these 0.1 us.
def next_power_of_2(n: int) -> int:
    """The least power of 2 that is at least ``n``, and 1 for an ``n`` below that."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)


class RowLayout(NamedTuple):
    """Where rows begin: row i at ``(i // inner) * outer_stride + (i % inner) * inner_stride``. A kernel's argument."""

    inner: int
    outer_stride: int
    inner_stride: int


class RowView:
    """``x`` as rows of ``n_cols`` adjacent elements at up to two strides; copied only where no such view exists.

    The heads of a packed query-key-value projection, for example, are read where they lie.

    Attributes:
        data: ``x``, or its contiguous copy.
        count: how many rows there are.
        layout: where they begin.
    """

    def __init__(self, x: torch.Tensor, n_cols: int):
        if x.is_contiguous():
            self.data, self.count, self.layout = x, x.numel() // n_cols, RowLayout(1, n_cols, 0)
            return
        lead, strides = list(x.shape[:-1]), list(x.stride()[:-1])
        dims: list[tuple[int, int]] = []
        for size, stride in zip(reversed(lead), reversed(strides), strict=True):
            if dims and stride == dims[-1][0] * dims[-1][1]:
                dims[-1] = (dims[-1][0] * size, dims[-1][1])
            elif size != 1:
                dims.append((size, stride))
        if len(dims) > 2 or (x.stride(-1) != 1 and n_cols != 1):
            x, dims = x.contiguous(), []
        count = x.numel() // n_cols
        if not dims:
            dims = [(max(count, 1), n_cols)]
        self.data = x
        self.count = count
        # The compiler takes an inner of 1 for a constant: one stride then costs no 64-bit division a row.
        self.layout = RowLayout(dims[0][0], dims[1][1], dims[0][1]) if len(dims) == 2 else RowLayout(1, dims[0][1], 0)
