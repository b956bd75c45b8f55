"""What a device is: the one place that tells a GPU of NVIDIA from one of AMD and asks for its sizes.

ROCm's PyTorch calls its tensors "cuda" and answers a compute capability, (9, 4) on an MI300: it is no architecture of
NVIDIA's. This module needs no Triton.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class DeviceInfo(NamedTuple):
    """What launchers and launch tables ask of a device.

    ``arch`` is 10 * major + minor of NVIDIA's compute capability, 90 for sm_90, and 0 on a GPU of AMD. ``gfx`` is AMD's
    name, "gfx942", and "" elsewhere. ``processors`` are the streaming multiprocessors or compute units.
    ``shared_per_block`` is the most shared memory that a block can have, in bytes.
    """

    name: str
    vendor: str  # "nvidia", "amd" or "interpreter"
    arch: int
    gfx: str
    processors: int
    shared_per_block: int

    @property
    def architecture(self) -> str:
        """ "sm_90" or "gfx942"."""
        return self.gfx or f"sm_{self.arch}"


# Triton's interpreter takes what sm_90 takes, but for what a launcher asks of ``vendor``. With 4 processors persistent
# loops take several turns there too.
INTERPRETER = DeviceInfo("Triton's interpreter", "interpreter", 90, "", 4, 227 << 10)

# GPUs that kernels are compiled for where there is none, by architecture.
GPUS = {
    gpu.arch: gpu
    for gpu in (
        DeviceInfo("A100", "nvidia", 80, "", 108, 163 << 10),
        DeviceInfo("H100/H200", "nvidia", 90, "", 132, 227 << 10),
        DeviceInfo("B200", "nvidia", 100, "", 148, 227 << 10),
    )
}


def device_info(device: torch.device) -> DeviceInfo:
    """The GPU ``device``; :data:`INTERPRETER` for any device that is not one, since kernels run nowhere else."""
    if device.type != "cuda":
        return INTERPRETER
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu(index: int) -> DeviceInfo:
    return from_properties(torch.cuda.get_device_properties(index))


def from_properties(properties) -> DeviceInfo:
    """What ``torch.cuda.get_device_properties`` says of a GPU.

    A CUDA build of PyTorch has ``gcnArchName`` too, and gives the GPU's name there.
    """
    gfx = str(getattr(properties, "gcnArchName", "")).partition(":")[0]
    if gfx.startswith("gfx"):
        # 64 KiB is the local data share of every GPU that Triton compiles for, or less than it.
        shared = getattr(properties, "shared_memory_per_block", 64 << 10)
        return DeviceInfo(properties.name, "amd", 0, gfx, properties.multi_processor_count, shared)
    arch = 10 * properties.major + properties.minor
    processors, shared = properties.multi_processor_count, properties.shared_memory_per_block_optin
    return DeviceInfo(properties.name, "nvidia", arch, "", processors, shared)
