"""Layer norm and RMS norm after an optional residual add with dropout: the backward. forward.py has the formulas.

    g = dy * (weight + offset)
    dh = rstd * (g - mean(g) - xhat * mean(g * xhat)) + (the gradient that h itself received)
    dresidual = dh,  dinput = keep * dh / (1 - p),  dweight = sum_rows(dy * xhat),  dbias = sum_rows(dy)

Rows of up to BWD_ROW columns, half as many with dropout, are read once by a persistent grid that prefetches the next
tiles. A program keeps its share of dweight and dbias in fp32 registers and leaves one row of partial sums, and a small
second kernel sums those rows. Long rows go through registers segment by segment (long_row.py). The blocks of a cluster
share rows of up to eight times the width. A wider row, and every one past BWD_ROW where there are no clusters, does not
leave room for that: the sums, x and dy take 12 bytes a column of a multiprocessor's 256 KB of registers. For these one
kernel takes the two means of each row, and another walks blocks of columns with them, so x and dy are read twice. There
are no atomics, so results repeat bit for bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..device import device_info
from ..launch import cdiv, cluster_blocks, launch_options, next_power_of_2, processor_count, tuned
from ..math import block_count
from .arguments import NormBackwardPass, NormGradOutputs, backward_pass, drop_branch, row_starts, tile_warps
from .forward import blocked_launch, rows_and_columns
from .long_row import is_long, norm_bwd_row

# The backward holds x, dy, weight and two fp32 sums of a row. Its tiles fill a multiprocessor's registers (16 warps x
# 128), so one program runs on each, and the partial rows stay below 5% of the bytes of 8192 rows. Dropout's random
# numbers, or a second gradient of another dtype, halve the tile. The addresses of rows that do not begin at multiples
# of 16 elements halve it too; both together quarter it. A program takes tiles of WIDE_TILE (rows, columns) from wide
# rows. From compiled register counts (no spills on sm_80, sm_90, sm_100), not yet from timings.
BWD_ROW = 8192
BWD_TILE = 8192
WIDE_TILE = (4, 1024)


# Bytes of shared memory that a program needs besides the tiles that it prefetches: 8,448 at most, of 32 rows at a time.
REDUCTIONS = 16 << 10


def pipeline_stages(device: torch.device, tile_bytes: int) -> int:
    """With n stages n - 1 tiles of everything that a step loads lie in shared memory; 3 stages at most.

    sm_90 has room for 3 whatever is loaded. sm_80 and sm_86 have less shared memory (163 and 99 KB a block), where
    tiles of fp32 and of a residual's gradient would not fit.
    """
    free = device_info(device).shared_per_block - REDUCTIONS
    return max(1, min(3, 1 + free // tile_bytes))


@triton.jit
def _row_means_kernel(
    inputs, places, means, n_cols, offset, CENTER: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dy_ptr = inputs.dy + row_starts(row, places.dy)
    x_ptr = inputs.x + row_starts(row, places.x)
    rstd = tl.load(inputs.rstd + row)
    mean = tl.load(inputs.mean + row) if CENTER else 0.0
    sum_g = tl.zeros((BLOCK_N,), tl.float32)
    sum_gx = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        g = tl.load(dy_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if inputs.weight is not None:
            g *= tl.load(inputs.weight + cols, mask=mask, other=0.0).to(tl.float32) + offset
        x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        sum_g += g
        # The lanes past the row hold 0, and mean * rstd may be infinite.
        sum_gx += g * tl.where(mask, (x - mean) * rstd, 0.0)
    if CENTER:
        tl.store(means.g + row, tl.sum(sum_g, axis=0) / n_cols)
    tl.store(means.gx + row, tl.sum(sum_gx, axis=0) / n_cols)


@triton.jit(do_not_specialize=["n_rows"])
def _norm_bwd_kernel(
    inputs, means, outputs, places, n_rows, n_cols, offset, dropout,
    CENTER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``means`` are those of :func:`_row_means_kernel`, or None where a tile holds whole rows and takes them itself."""
    NEED_DX: tl.constexpr = outputs.dinput is not None or outputs.dresidual is not None
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < n_cols
    if inputs.weight is not None:
        weight = tl.load(inputs.weight + cols, mask=in_cols, other=0.0).to(tl.float32) + offset
    if inputs.seed is not None and outputs.dinput is not None:
        key, first_row = tl.load(inputs.seed), tl.load(inputs.seed + 1)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for tile in tl.range(program, block_count(n_rows, BLOCK_M), programs, num_stages=STAGES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        in_rows = rows < n_rows
        mask = in_rows[:, None] & in_cols[None, :]
        dy_at = row_starts(rows, places.dy)[:, None] + cols[None, :]
        dy = tl.load(inputs.dy + dy_at, mask=mask, other=0.0).to(tl.float32)
        if NEED_DX or outputs.dweight is not None:
            x_at = row_starts(rows, places.x)[:, None] + cols[None, :]
            x = tl.load(inputs.x + x_at, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(inputs.rstd + rows, mask=in_rows, other=0.0)
            if CENTER:
                x -= tl.load(inputs.mean + rows, mask=in_rows, other=0.0)[:, None]
            xhat = tl.where(mask, x * rstd[:, None], 0.0)
        if NEED_DX:
            g = dy * weight[None, :] if inputs.weight is not None else dy
            if means is None:
                mean_gx = tl.sum(g * xhat, axis=1) / n_cols
            else:
                mean_gx = tl.load(means.gx + rows, mask=in_rows, other=0.0)
            dx = g - xhat * mean_gx[:, None]
            if CENTER:
                if means is None:
                    mean_g = tl.sum(g, axis=1) / n_cols
                else:
                    mean_g = tl.load(means.g + rows, mask=in_rows, other=0.0)
                dx -= mean_g[:, None]
            dx *= rstd[:, None]
            if inputs.dh is not None:
                dh_at = row_starts(rows, places.dh)[:, None] + cols[None, :]
                dx += tl.load(inputs.dh + dh_at, mask=mask, other=0.0).to(tl.float32)
            at = rows[:, None] * n_cols + cols[None, :]
            if outputs.dresidual is not None:
                tl.store(outputs.dresidual + at, dx.to(outputs.dresidual.dtype.element_ty), mask=mask)
            if outputs.dinput is not None:
                if inputs.seed is not None:
                    dx = drop_branch(dx, key, rows + first_row, tl.program_id(1) * BLOCK_N, dropout, BLOCK_N)
                tl.store(outputs.dinput + at, dx.to(outputs.dinput.dtype.element_ty), mask=mask)
        if outputs.dweight is not None:
            dweight += tl.sum(dy * xhat, axis=0)
        if outputs.dbias is not None:
            dbias += tl.sum(dy, axis=0)
    partial = program.to(tl.int64) * n_cols + cols
    if outputs.dweight is not None:
        tl.store(outputs.dweight + partial, dweight, mask=in_cols)
    if outputs.dbias is not None:
        tl.store(outputs.dbias + partial, dbias, mask=in_cols)


@triton.jit
def _column_sum_kernel(partial, sums, n_partials, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < n_cols
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_partials, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < n_partials)[:, None] & in_cols[None, :]
        at = rows[:, None] * n_cols + cols[None, :]
        if partial.dweight is not None:
            dweight += tl.load(partial.dweight + at, mask=mask, other=0.0)
        if partial.dbias is not None:
            dbias += tl.load(partial.dbias + at, mask=mask, other=0.0)
    if partial.dweight is not None:
        tl.store(sums.dweight + cols, tl.sum(dweight, axis=0).to(sums.dweight.dtype.element_ty), mask=in_cols)
    if partial.dbias is not None:
        tl.store(sums.dbias + cols, tl.sum(dbias, axis=0).to(sums.dbias.dtype.element_ty), mask=in_cols)


class _RowMeans(NamedTuple):
    """Of each row the mean of g, and of g * xhat."""

    g: torch.Tensor
    gx: torch.Tensor


class _ColumnSums(NamedTuple):
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None


class _Grid(NamedTuple):
    """How the backward's kernels cover a call. ``blocks``: of a cluster that shares a row, 0 where none does."""

    whole: bool
    long: bool
    blocks: int
    block_m: int
    block_n: int
    programs: int


def _grid_of(call, n_rows: int, halvings: int) -> _Grid:
    """``halvings``: how often what else is in registers halves the tile."""
    n_cols, device = call.x.shape[-1], call.x.device
    wanted, processors = call.wanted(), processor_count(device)
    tile = BWD_TILE >> halvings
    row = BWD_ROW if call.dropout_p == 0.0 else BWD_ROW // 2
    whole = n_cols <= row
    long = whole and (is_long(n_cols) or n_cols > tile // 2)
    if whole:
        one_row = (1, next_power_of_2(n_cols))
        block_m, block_n = one_row if long else rows_and_columns(n_cols, tile)
        return _Grid(whole, long, 0, block_m, block_n, min(cdiv(n_rows, block_m), processors))
    # The blocks of a cluster exchange the row's sums. Without dx there are none.
    if (wanted.input or wanted.residual) and (blocks := cluster_blocks(device, n_cols, row)):
        programs = min(n_rows, max(1, processors // blocks))
        return _Grid(whole, long, blocks, 1, next_power_of_2(n_cols), programs)
    block_m, block_n = WIDE_TILE
    # Two programs a multiprocessor, over the column blocks and the rows.
    programs = max(1, 2 * processors // cdiv(n_cols, block_n))
    return _Grid(whole, long, 0, block_m, block_n, min(cdiv(n_rows, block_m), programs))


def _row_means(work: NormBackwardPass) -> _RowMeans:
    x, n_rows = work.inputs.x, work.n_rows
    means = _RowMeans(
        x.new_empty(n_rows if work.center else 0, dtype=torch.float32), x.new_empty(n_rows, dtype=torch.float32)
    )
    block_n, options = blocked_launch("norm_row_means", x)
    _row_means_kernel[(n_rows,)](
        work.inputs, work.places, means, work.n_cols, work.offset, CENTER=work.center, BLOCK_N=block_n, **options
    )  # fmt: skip
    return means


def norm_bwd(call):
    """The gradients (dinput, dresidual, dweight, dbias); one that ``call.wanted()`` does not name is an empty tensor.

    ``call``: the operands of the operator norm_bwd (fastllm/ops/norm/call.py, NormBackward). dinput comes in
    ``call.input_dtype``, dresidual in x's dtype, dweight in weight's, dbias in ``call.bias_dtype``; all sums are fp32.
    """
    gradients, wanted = call.new_gradients(), call.wanted()
    n_cols = call.x.shape[-1]
    n_rows = call.x.numel() // n_cols
    if n_rows == 0:
        return *gradients[:2], gradients[2].zero_(), gradients[3].zero_()
    unaligned, dropout = n_cols % 16 != 0, call.dropout_p > 0.0
    grid = _grid_of(call, n_rows, (dropout or (wanted.input and wanted.residual)) + unaligned)
    sums = call.x.new_empty(wanted.weight + wanted.bias, grid.programs, n_cols, dtype=torch.float32)
    partial = NormGradOutputs(
        gradients[0] if wanted.input else None,
        gradients[1] if wanted.residual else None,
        sums[0] if wanted.weight else None,
        sums[-1] if wanted.bias else None,
    )
    work = backward_pass(call, partial)
    loaded = sum(t.element_size() for t in (call.dy, call.dh, call.x) if t is not None)
    n_stages = pipeline_stages(call.x.device, grid.block_m * grid.block_n * loaded // (grid.blocks or 1))
    if grid.blocks or grid.long:
        norm_bwd_row(work, grid.blocks or 1, grid.programs, n_stages)
    else:
        means = None if grid.whole or not (wanted.input or wanted.residual) else _row_means(work)
        elements = grid.block_m * grid.block_n
        n_warps = tile_warps(elements << unaligned, 8) if grid.whole and unaligned else tile_warps(elements)
        settings = dict(STAGES=n_stages, num_warps=n_warps)
        key = (grid.block_m, grid.block_n, unaligned, loaded, dropout)
        settings = tuned("norm_bwd", call.x.device, key, settings)
        n_warps = settings["num_warps"]
        # One program a multiprocessor, two of wide rows. For more occupancy than that ptxas would spill.
        registers = min(255, 2048 // n_warps) if grid.whole or dropout else 128
        _norm_bwd_kernel[(grid.programs, cdiv(n_cols, grid.block_n))](
            work.inputs, means, partial, work.places, n_rows, n_cols, work.offset, work.dropout,
            CENTER=work.center, BLOCK_M=grid.block_m, BLOCK_N=grid.block_n, STAGES=settings["STAGES"],
            **launch_options(call.x.device, num_warps=n_warps, maxnreg=registers),
        )  # fmt: skip
    if wanted.weight or wanted.bias:
        block_m, block_n = (32, 64) if grid.whole else (8, 256)
        settings = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4)
        settings = tuned("norm_column_sum", call.x.device, (grid.whole,), settings)
        _column_sum_kernel[(cdiv(n_cols, settings["BLOCK_N"]),)](
            _ColumnSums(*partial[2:]), _ColumnSums(*gradients[2:]), grid.programs, n_cols,
            BLOCK_M=settings["BLOCK_M"], BLOCK_N=settings["BLOCK_N"],
            **launch_options(call.x.device, num_warps=settings["num_warps"]),
        )  # fmt: skip
    return gradients
