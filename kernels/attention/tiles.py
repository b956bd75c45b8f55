"""Launch tables of the attention kernels: (BLOCK_M, BLOCK_N, warps, stages) by architecture, head dim and
register pressure.

Chosen from what ptxas makes of them (Triton 3.9, November 2026): large tiles without a spill, with warpgroup products
on sm_90; ``python -m fastllm.bench.attention_tables`` prints the registers of every entry. None has been timed yet.

The pressure says what a score needs registers for besides the products: 0 for the bare product, causal or not; 1 for a
left window, a soft cap or ALiBi; 2 for several of them, a bias or dropout; 3 where rows cannot be read 16 bytes at a
time, which takes a pointer for every element. 3 is as 2 where no fourth tile is given.

A tile is as large for a few rows as for many, and lanes may idle: tile and warps order the sums of a row, which has the
same bits in any batch and packing. AMD's data-centre GPUs take sm_80's tiles.
"""

import torch

from ..launch import TRITON

# Padded head dims up to 64, 128 and 256 -> tiles by pressure. Keys: sm_80 (and sm_86, sm_89, sm_120), sm_90, sm_100.
FORWARD = {
    80: {
        64: ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)),
        128: ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
        256: ((64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
    },
    90: {
        64: ((128, 128, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
        256: ((128, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    },
    100: {
        64: ((128, 128, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2)),
        256: ((128, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    },
}
DKDV = {
    80: {
        64: ((32, 64, 8, 2), (32, 64, 8, 1), (16, 32, 8, 1)),
        128: ((32, 64, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
        256: ((32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
    },
    90: {
        64: ((64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2)),
        128: ((32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
        256: ((32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
    },
    100: {
        64: ((64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 1)),
        128: ((64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
        256: ((32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
    },
}
DQ = {
    80: {
        64: ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
        128: ((64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1)),
        256: ((64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
    },
    90: {
        64: ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
        128: ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2)),
        256: ((128, 32, 8, 2), (64, 16, 8, 2), (32, 16, 8, 1)),
    },
    100: {
        64: ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
        128: ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
        256: ((128, 32, 8, 2), (64, 32, 8, 1), (32, 16, 8, 1)),
    },
}
# Tried and not taken for the forward at head dim 128: (128, 64, 8, 2) with maxnreg=128 and 98,336 bytes of shared
# memory, so that a processor of sm_90 or sm_100 holds two blocks. Triton 3.9 spills in each call: on sm_90 48 bytes a
# thread under a causal mask (24 loads and stores), 16 without one and at least 96 in packed calls, on sm_100 136, 56
# and at least 232. Triton 3.6 on sm_90 spills nothing under a causal mask (124 registers), and 8 bytes without one.
# Nor at 64: (128, 64, 4, 3) has 190 registers without a mask and 206 under a causal one (205 with 3.6), 65 KB and no
# spills, so that a processor holds two blocks of 4 warps where the table's tile gives one of 8. Only a GPU can tell.
# Triton 3.6 spills 80 bytes a thread with 128 rows, 3.9 none; those between have not been tried.
if TRITON < (3, 9):
    DQ[90][256] = ((64, 32, 8, 2), *DQ[90][256][1:])
# A product of dbias walks the head dim: one tile serves all of them.
DBIAS = {80: (64, 32, 8, 2), 90: (64, 64, 8, 2), 100: (64, 64, 8, 2)}
# fp32: products of the scalar units, whose code is the same on all of them.
FORWARD_32 = {
    64: ((64, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 1)),
    128: ((32, 32, 8, 1), (32, 16, 8, 1), (16, 32, 8, 1)),
    256: ((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
}
DKDV_32 = {
    64: ((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    128: ((16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
DQ_32 = {
    64: ((64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
    128: ((32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
DBIAS_32 = (64, 32, 8, 1)


def _named(tile) -> dict:
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile, strict=True))


def register_bound(dtype: torch.dtype, pressure: int = 0) -> dict:
    """A launch's bound on registers: the hardware's 255 where ptxas may otherwise spill to fit a second block into 128.

    It does so in fp32, and under features of which no table holds every combination.
    """
    return dict(maxnreg=255) if dtype == torch.float32 or pressure >= 2 else {}


def _of(table, table_32, dtype: torch.dtype, arch: int, pressure: int, choose) -> dict:
    # sm_120 has the shared memory and the matrix instructions of sm_80's kind.
    kind = 80 if arch < 90 or arch >= 120 else 90 if arch < 100 else 100
    return {**_named(choose(table_32 if dtype == torch.float32 else table[kind])), **register_bound(dtype, pressure)}


def _tile(table, table_32, dim: int, dtype: torch.dtype, arch: int, pressure: int) -> dict:
    bucket = 64 if dim <= 64 else 128 if dim <= 128 else 256

    def choose(tiles):
        return tiles[bucket][min(pressure, len(tiles[bucket]) - 1)]

    return _of(table, table_32, dtype, arch, pressure, choose)


def forward_tile(dim: int, dtype: torch.dtype, arch: int, pressure: int) -> dict:
    """Tile of the forward: query rows of a program, keys of a step."""
    return _tile(FORWARD, FORWARD_32, dim, dtype, arch, pressure)


def dkdv_tile(dim: int, dtype: torch.dtype, arch: int, pressure: int) -> dict:
    """Tile for dk and dv: query rows of a step, keys of a program."""
    return _tile(DKDV, DKDV_32, dim, dtype, arch, pressure)


def dq_tile(dim: int, dtype: torch.dtype, arch: int, pressure: int) -> dict:
    """Tile for dq: query rows of a program, keys of a step."""
    return _tile(DQ, DQ_32, dim, dtype, arch, pressure)


def dbias_tile(dtype: torch.dtype, arch: int) -> dict:
    """Tile for dbias: of the bias."""
    return _of(DBIAS, DBIAS_32, dtype, arch, 0, lambda tile: tile)
