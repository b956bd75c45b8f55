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

    @property
    def lanes(self) -> int:
        """Threads of a warp: 64 on AMD's data-centre GPUs (gfx9), 32 on its others and on NVIDIA's."""
        return 64 if self.gfx.startswith("gfx9") else 32

    @property
    def product_obstacle(self) -> str | None:
        """Why kernels with matrix products are not the choice here; None where they are."""
        if self.vendor == "nvidia" and self.arch < 80:
            return f"Triton multiplies without tensor cores on {self.architecture}"
        if self.vendor == "amd" and self.lanes == 32:
            # Attention's backward in bfloat16 at head dim 128, compiled for gfx1100: 425 and 1,908 registers spill.
            return f"a thread has 256 registers on {self.architecture}, and attention's tiles do not fit in them"
        return None

    @property
    def has_bfloat16(self) -> bool:
        """Whether the hardware computes in bfloat16."""
        return self.vendor != "nvidia" or self.arch >= 80

    @property
    def has_tf32(self) -> bool:
        """Whether Triton multiplies float32 as tf32 where less than the highest precision is asked for."""
        return self.gfx == "gfx942" if self.vendor == "amd" else self.arch >= 80


# Triton's interpreter takes what sm_90 takes, but for what a launcher asks of ``vendor``. With 4 processors persistent
# loops take several turns there too.
INTERPRETER = DeviceInfo("Triton's interpreter", "interpreter", 90, "", 4, 227 << 10)

# Where there is no GPU, kernels are compiled for these, by architecture. Launch tables are chosen for them.
GPUS = {
    gpu.arch: gpu
    for gpu in (
        DeviceInfo("A100", "nvidia", 80, "", 108, 163 << 10),
        DeviceInfo("H100/H200", "nvidia", 90, "", 132, 227 << 10),
        DeviceInfo("B200", "nvidia", 100, "", 148, 227 << 10),
    )
}
# Kernels are compiled for these too. They take the same launch tables.
OTHER_GPUS = {
    gpu.architecture: gpu
    for gpu in (
        DeviceInfo("T4", "nvidia", 75, "", 40, 64 << 10),
        DeviceInfo("RTX 3090", "nvidia", 86, "", 82, 99 << 10),
        DeviceInfo("RTX 4090", "nvidia", 89, "", 128, 99 << 10),
        DeviceInfo("RTX 5090", "nvidia", 120, "", 170, 99 << 10),
        DeviceInfo("MI300X", "amd", 0, "gfx942", 304, 64 << 10),
        DeviceInfo("MI355X", "amd", 0, "gfx950", 256, 160 << 10),
        DeviceInfo("RX 7900 XTX", "amd", 0, "gfx1100", 48, 64 << 10),
        DeviceInfo("RX 9070 XT", "amd", 0, "gfx1201", 32, 64 << 10),
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
