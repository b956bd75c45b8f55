"""Layer norm and RMS norm (the same without centring), after an optional residual add with dropout: the forward.

    h = residual + keep * input / (1 - p), rounded to the residual's dtype;   h = input where there is no residual
    xhat = (h - mean) * rstd,  rstd = 1 / sqrt(mean((h - mean)^2) + eps),  y = xhat * (weight + offset) + bias

RMS norm has mean = 0 throughout. A sum's rounding errors grow with the mean, and beside a small spread they would be
all of h - mean; so the mean is taken twice, mean += mean(h - mean), where h - mean is exact or nearly so. The mean of
equal numbers is that number then, and their xhat is 0. It costs a pass over registers and none over memory.

A row of up to FWD_ROW columns stays in registers, so every tensor is read or written once. Short rows share a tile; a
long one goes through registers segment by segment (long_row.py). A row of 16-bit numbers stays there in 16 bits up to
twice that width (packed.py). The blocks of a cluster share a wider row, up to 8 * FWD_ROW. Without
clusters a wider row is walked twice in blocks; the second walk finds in the cache what the first has left there.
"""

import torch
import triton
import triton.language as tl

from ..launch import cdiv, cluster_blocks, launch_options, next_power_of_2, tuned
from .arguments import NormForwardPass, NormOutputs, drop_branch, forward_pass, row_starts, tile_warps
from .long_row import is_long, norm_fwd_row
from .packed import norm_fwd_packed, packable

# The widest row that no program spills on sm_80, sm_90 and sm_100, and tiles that keep 8 warps busy with 16 elements a
# thread: from compiled register counts, not yet from timings.
FWD_ROW = 32768
FWD_TILE = 4096
BLOCKED_COLS = 4096


def rows_and_columns(n_cols: int, tile: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) of a tile of whole rows: several short ones to a program, or one long one.

    Whatever the number of rows: tile and warps order a row's sums. Fewer rows than BLOCK_M leave lanes idle.
    """
    block_n = next_power_of_2(n_cols)
    return max(1, min(tile // block_n, 32)), block_n


def blocked_launch(kernel: str, x: torch.Tensor, *key) -> tuple[int, dict]:
    """(BLOCK_N, options) of a kernel that walks rows in blocks; what it decides by beside the dtype is ``key``."""
    settings = dict(BLOCK_N=BLOCKED_COLS, num_warps=tile_warps(BLOCKED_COLS))
    settings = tuned(kernel, x.device, (x.element_size(), *key), settings)
    return settings["BLOCK_N"], launch_options(x.device, num_warps=settings["num_warps"], maxnreg=128)


@triton.jit
def _with_residual(x, inputs, outputs, residual_at, h_at, rows, start, mask, dropout, COLS: tl.constexpr):
    """h in fp32, stored where there is a residual; else ``x``."""
    if inputs.residual is not None:
        if inputs.seed is not None:
            x = drop_branch(x, tl.load(inputs.seed), rows + tl.load(inputs.seed + 1), start, dropout, COLS)
        x += tl.load(inputs.residual + residual_at, mask=mask, other=0.0).to(tl.float32)
        h = x.to(outputs.h.dtype.element_ty)
        tl.store(outputs.h + h_at, h, mask=mask)
        x = h.to(tl.float32)
    return x


@triton.jit(do_not_specialize=["n_rows"])
def _norm_fwd_kernel(
    inputs, outputs, places, n_rows, n_cols, numbers,
    CENTER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < n_rows, cols < n_cols
    mask = in_rows[:, None] & in_cols[None, :]
    x_at = row_starts(rows, places.x)[:, None] + cols[None, :]
    residual_at = row_starts(rows, places.residual)[:, None] + cols[None, :]
    y_at = rows[:, None] * n_cols + cols[None, :]
    x = tl.load(inputs.x + x_at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    x = _with_residual(x, inputs, outputs, residual_at, y_at, rows, 0, mask, numbers.dropout, BLOCK_N)
    if CENTER:
        mean = tl.sum(x, axis=1) / n_cols
        mean += tl.sum(tl.where(mask, x - mean[:, None], 0.0), axis=1) / n_cols
        tl.store(outputs.mean + rows, mean, mask=in_rows)
        # The lanes past the row hold 0, not the mean: without the mask each would add mean^2 to the variance.
        x = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / n_cols + numbers.eps)
    tl.store(outputs.rstd + rows, rstd, mask=in_rows)
    y = x * rstd[:, None]
    if inputs.weight is not None:
        y *= (tl.load(inputs.weight + cols, mask=in_cols, other=0.0).to(tl.float32) + numbers.offset)[None, :]
    if inputs.bias is not None:
        y += tl.load(inputs.bias + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(outputs.y + y_at, y.to(outputs.y.dtype.element_ty), mask=mask)


@triton.jit
def _norm_fwd_blocked_kernel(
    inputs, outputs, places, n_cols, numbers, CENTER: tl.constexpr, KEEP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """KEEP: how the first walk's loads of x are to stay in the cache."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    row = tl.program_id(0).to(tl.int64)
    x_ptr = inputs.x + row_starts(row, places.x)
    y_ptr = outputs.y + row * n_cols
    residual_start = row_starts(row, places.residual)
    # Over the columns seen so far, merged block by block (Chan et al. 1983, eq. 2.1): the mean, what its rounding has
    # lost, and the sum of (x - mean)^2.
    mean = 0.0
    lost = 0.0
    square = 0.0
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (cols < n_cols)[None, :]
        at = cols[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0, eviction_policy=KEEP).to(tl.float32)
        x = _with_residual(
            x, inputs, outputs, residual_start + at, row * n_cols + at, rows, start, mask, numbers.dropout, BLOCK_N
        )
        if CENTER:
            count = tl.minimum(n_cols - start, BLOCK_N)
            block_mean = tl.sum(x) / count
            block_mean += tl.sum(tl.where(mask, x - block_mean, 0.0)) / count
            x = tl.where(mask, x - block_mean, 0.0)
            delta = block_mean - mean - lost
            share = count / (start + count)
            square += tl.sum(x * x) + delta * (delta * (start * share))
            before = mean
            mean += delta * share
            lost += delta * share - (mean - before)
        else:
            square += tl.sum(x * x)
    rstd = 1.0 / tl.sqrt(square / n_cols + numbers.eps)
    if CENTER:
        mean += lost
        tl.store(outputs.mean + row, mean)
    tl.store(outputs.rstd + row, rstd)
    if inputs.residual is not None:
        # The row just stored is read back, by whichever threads.
        tl.debug_barrier()
        x_ptr = outputs.h + row * n_cols
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        x = tl.load(x_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = (x - mean) * rstd
        if inputs.weight is not None:
            y *= tl.load(inputs.weight + cols, mask=mask, other=0.0).to(tl.float32) + numbers.offset
        if inputs.bias is not None:
            y += tl.load(inputs.bias + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + cols, y.to(outputs.y.dtype.element_ty), mask=mask)


def _norm_fwd_tile(work: NormForwardPass) -> None:
    """Several short rows to a program."""
    # Where rows do not begin at multiples of 16 elements a thread has an address for each of its columns. It gets half
    # the tile then, for ptxas would rather spill the addresses than lose occupancy.
    x, unaligned = work.inputs.x, work.n_cols % 16 != 0
    bound = dict(maxnreg=128) if unaligned else {}
    block_m, block_n = rows_and_columns(work.n_cols, FWD_TILE >> unaligned)
    settings = dict(BLOCK_M=block_m, num_warps=tile_warps(block_m * block_n << unaligned, 8))
    key = (block_m, block_n, x.element_size(), work.inputs.residual is not None)
    settings = tuned("norm_fwd", x.device, key, settings)
    _norm_fwd_kernel[(cdiv(work.n_rows, settings["BLOCK_M"]),)](
        work.inputs, work.outputs, work.places, work.n_rows, work.n_cols, work.numbers,
        CENTER=work.center, BLOCK_M=settings["BLOCK_M"], BLOCK_N=block_n,
        **launch_options(x.device, num_warps=settings["num_warps"], **bound),
    )  # fmt: skip


def norm_fwd(call):
    """The normed rows of ``call``, the operands of the operator norm_fwd (fastllm/ops/norm/call.py, NormForward).

    Returns:
        y as ``call.x``; h as ``call.residual`` (empty without one); mean and rstd (rows,) fp32, mean empty unless
        ``call.center``.
    """
    x, n_cols = call.x, call.x.shape[-1]
    n_rows = x.numel() // n_cols
    outputs = NormOutputs(
        x.new_empty(x.shape),
        x.new_empty(0) if call.residual is None else call.residual.new_empty(x.shape),
        x.new_empty(n_rows if call.center else 0, dtype=torch.float32),
        x.new_empty(n_rows, dtype=torch.float32),
    )
    if n_rows == 0:
        return outputs
    work = forward_pass(call, outputs)
    dropout = work.inputs.seed is not None
    # Random numbers for more columns than this take half a minute to compile where rows do not begin at multiples of
    # 16 elements.
    slow = dropout and n_cols % 16 != 0 and n_cols > FWD_ROW // 2
    fits = n_cols <= FWD_ROW and not slow
    if fits and is_long(n_cols):
        norm_fwd_row(work, 1)
    elif fits:
        _norm_fwd_tile(work)
    elif n_cols <= 2 * FWD_ROW and not dropout and packable(work):
        norm_fwd_packed(work)
    elif not slow and (blocks := cluster_blocks(x.device, n_cols, FWD_ROW)):
        norm_fwd_row(work, blocks)
    else:
        block_n, options = blocked_launch("norm_fwd_blocked", x, call.residual is not None)
        _norm_fwd_blocked_kernel[(n_rows,)](
            work.inputs, outputs, work.places, n_cols, work.numbers, CENTER=call.center,
            KEEP="evict_last" if call.residual is None else "evict_first", BLOCK_N=block_n, **options,
        )  # fmt: skip
    return outputs
