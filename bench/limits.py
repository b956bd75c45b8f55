"""What a GPU takes of one launch."""

from __future__ import annotations

from typing import NamedTuple

from ..kernels.device import GPUS, OTHER_GPUS, DeviceInfo

# Every GPU that kernels are compiled for without one, by architecture.
EVERY_GPU = {gpu.architecture: gpu for gpu in (*GPUS.values(), *OTHER_GPUS.values())}
# Threads of a block, 32-bit registers of an NVIDIA block, blocks along the three sides of a grid.
THREADS, REGISTERS, GRID = 1024, 65536, (2**31 - 1, 65535, 65535)
# Registers are given to a warp of NVIDIA's, which has 32 lanes, in units of this many.
REGISTER_UNIT = 256


class Footprint(NamedTuple):
    """What a launch takes: its grid, threads of a block, registers of a thread, and bytes of shared memory a block."""

    grid: tuple[int, ...]
    threads: int
    registers: int
    shared: int = 0


def warp_registers(registers: int) -> int:
    """The registers that a warp gets whose threads have ``registers`` each."""
    return -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT


def over_limits(launch: Footprint, gpu: DeviceInfo) -> list[str]:
    """Why ``gpu`` would refuse the launch; empty where it takes it. Pass ``registers=0`` to leave registers aside."""
    found = []
    for side, (size, most) in enumerate(zip(launch.grid, GRID, strict=False)):
        if size > most:
            found.append(f"grid[{side}] is {size:,}, at most {most:,}")
    if launch.threads > THREADS:
        found.append(f"{launch.threads} threads a block, at most {THREADS}")
    if launch.threads // 32 * warp_registers(launch.registers) > REGISTERS:
        found.append(f"{launch.registers} registers x {launch.threads} threads a block, at most {REGISTERS:,}")
    if launch.shared > gpu.shared_per_block:
        found.append(f"{launch.shared:,} bytes of shared memory, at most {gpu.shared_per_block:,}")
    return found
