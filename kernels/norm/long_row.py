"""The norms for a long row: one program holds it in registers, part by part, and reads it once.

The same formulas as in _norm.py and _norm_backward.py. As one tile a row of thousands of columns would have a mask, and
where rows begin at odd places an address too, in registers for each of a thread's columns, beside the row itself. In
parts only the last has a mask, and no part needs its addresses before its turn: a third fewer registers, compiled.
"""

import triton
import triton.language as tl

from ..launch import OPTIONS, next_power_of_2, tuned
from ..math import is_kept, starts

# Past how many columns a row is long: those that fill a tile alone, and those that would spill in one because they are
# no multiple of 16, so that rows begin at odd places. A part is PART columns of each block, at odd places one a thread.
LONG, ODD_LONG = 4096, 1024
PART = 4096
# Columns that a block of the forward loads before it stores the first of them, as no load overtakes a store: as many as
# do not spill on sm_80, sm_90 and sm_100. With dropout a part.
AHEAD, CLUSTER_AHEAD = 8192, 16384


def is_long(n_cols: int) -> bool:
    return n_cols > (ODD_LONG if n_cols % 16 else LONG)


def part_of(n_cols: int, n_warps: int) -> int:
    return 32 * n_warps if n_cols % 16 else PART


@triton.jit
def _norm_fwd_row_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    x_inner, stride_xo, stride_xi, r_inner, stride_ro, stride_ri, n_cols, eps, offset, p,
    CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    in_part = tl.arange(0, PART)[None, :]
    full = tl.full((1, PART), True, tl.int1)
    rest = in_part < n_cols - (PARTS - 1) * PART
    x_ptr += starts(row, x_inner, stride_xo, stride_xi)
    if HAS_RESIDUAL:
        residual_ptr += starts(row, r_inner, stride_ro, stride_ri)
        h_ptr += row * n_cols
    xs = ()
    total = tl.zeros((1, PART), tl.float32)
    for part in tl.static_range(PARTS):
        at = part * PART + in_part
        mask = rest if part == PARTS - 1 else full
        x = tl.load(x_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if HAS_RESIDUAL:
            if DROPOUT:
                kept = is_kept(tl.load(seed_ptr), row + tl.arange(0, 1), part * PART + tl.arange(0, PART), p)
                x = tl.where(kept, x * (1.0 / (1.0 - p)), 0.0)
            x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
            x = x.to(h_ptr.dtype.element_ty).to(tl.float32)
        xs = xs + (x,)  # noqa: RUF005
        total += x
        if HAS_RESIDUAL and (part % AHEAD == AHEAD - 1 or part == PARTS - 1):
            for done in tl.static_range(part - part % AHEAD, part + 1):
                at = done * PART + in_part
                mask = rest if done == PARTS - 1 else full
                tl.store(h_ptr + at, xs[done].to(h_ptr.dtype.element_ty), mask=mask)
    mean = 0.0
    if CENTER:
        mean = tl.sum(total, axis=1) / n_cols
        tl.store(mean_ptr + row + tl.arange(0, 1), mean)
    square = tl.zeros((1, PART), tl.float32)
    for part in tl.static_range(PARTS):
        x = xs[part] - mean
        # The tail lanes hold 0, not mean: without the mask they would add mean^2 each to the variance.
        x = tl.where(rest, x, 0.0) if part == PARTS - 1 else x
        square += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(square, axis=1) / n_cols + eps)
    tl.store(rstd_ptr + row + tl.arange(0, 1), rstd)
    y_ptr += row * n_cols
    for part in tl.static_range(PARTS):
        at = part * PART + in_part
        mask = rest if part == PARTS - 1 else full
        y = (xs[part] - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32) + offset
        if HAS_BIAS:
            y += tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_bwd_row_kernel(
    dy_ptr, dh_ptr, x_ptr, weight_ptr, seed_ptr, mean_ptr, rstd_ptr,
    dinput_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    dy_inner, stride_dyo, stride_dyi, dh_inner, stride_dho, stride_dhi, x_inner, stride_xo, stride_xi,
    n_rows, n_cols, offset, p,
    CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DH: tl.constexpr, DROPOUT: tl.constexpr,
    NEED_DINPUT: tl.constexpr, NEED_DRESIDUAL: tl.constexpr, NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    in_part = tl.arange(0, PART)[None, :]
    full = tl.full((1, PART), True, tl.int1)
    rest = in_part < n_cols - (PARTS - 1) * PART
    weights, dweights, dbiases = (), (), ()
    for part in tl.static_range(PARTS):
        if HAS_WEIGHT:
            mask = rest if part == PARTS - 1 else full
            weight = tl.load(weight_ptr + part * PART + in_part, mask=mask, other=0.0).to(tl.float32) + offset
            weights = weights + (weight,)  # noqa: RUF005
        dweights = dweights + (tl.zeros((1, PART), tl.float32),)  # noqa: RUF005
        dbiases = dbiases + (tl.zeros((1, PART), tl.float32),)  # noqa: RUF005
    if DROPOUT and NEED_DINPUT:
        seed = tl.load(seed_ptr)
    for index in tl.range(tl.program_id(0), n_rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        dy_row = dy_ptr + starts(row, dy_inner, stride_dyo, stride_dyi)
        x_row = x_ptr + starts(row, x_inner, stride_xo, stride_xi)
        if NEED_DINPUT or NEED_DRESIDUAL or NEED_DWEIGHT:
            rstd = tl.load(rstd_ptr + row)
            mean = tl.load(mean_ptr + row) if CENTER else 0.0
        dys, xhats = (), ()
        sum_g = tl.zeros((1, PART), tl.float32)
        sum_gx = tl.zeros((1, PART), tl.float32)
        for part in tl.static_range(PARTS):
            at = part * PART + in_part
            mask = rest if part == PARTS - 1 else full
            dy = tl.load(dy_row + at, mask=mask, other=0.0).to(tl.float32)
            dys = dys + (dy,)  # noqa: RUF005
            if NEED_DINPUT or NEED_DRESIDUAL or NEED_DWEIGHT:
                xhat = (tl.load(x_row + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
                xhat = tl.where(rest, xhat, 0.0) if part == PARTS - 1 else xhat
                xhats = xhats + (xhat,)  # noqa: RUF005
                g = dy * weights[part] if HAS_WEIGHT else dy
                sum_g += g
                sum_gx += g * xhat
        if NEED_DINPUT or NEED_DRESIDUAL:
            mean_gx = tl.sum(sum_gx, axis=1) / n_cols
            mean_g = tl.sum(sum_g, axis=1) / n_cols if CENTER else 0.0
        new_dweights, new_dbiases = (), ()
        for part in tl.static_range(PARTS):
            at = part * PART + in_part
            mask = rest if part == PARTS - 1 else full
            dy = dys[part]
            if NEED_DINPUT or NEED_DRESIDUAL:
                g = dy * weights[part] if HAS_WEIGHT else dy
                dx = (g - xhats[part] * mean_gx - mean_g) * rstd
                if HAS_DH:
                    dh_at = starts(row, dh_inner, stride_dho, stride_dhi) + at
                    dx += tl.load(dh_ptr + dh_at, mask=mask, other=0.0).to(tl.float32)
                if NEED_DRESIDUAL:
                    tl.store(dresidual_ptr + row * n_cols + at, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
                if NEED_DINPUT:
                    if DROPOUT:
                        kept = is_kept(seed, row + tl.arange(0, 1), part * PART + tl.arange(0, PART), p)
                        dx = tl.where(kept, dx * (1.0 / (1.0 - p)), 0.0)
                    tl.store(dinput_ptr + row * n_cols + at, dx.to(dinput_ptr.dtype.element_ty), mask=mask)
            new_dweights = new_dweights + (dweights[part] + dy * xhats[part] if NEED_DWEIGHT else dweights[part],)  # noqa: RUF005
            new_dbiases = new_dbiases + (dbiases[part] + dy if NEED_DBIAS else dbiases[part],)  # noqa: RUF005
        dweights, dbiases = new_dweights, new_dbiases
    for part in tl.static_range(PARTS):
        at = program * n_cols + part * PART + in_part
        mask = rest if part == PARTS - 1 else full
        if NEED_DWEIGHT:
            tl.store(dweight_ptr + at, dweights[part], mask=mask)
        if NEED_DBIAS:
            tl.store(dbias_ptr + at, dbiases[part], mask=mask)


def norm_fwd_row(n_rows: int, blocks: int, args, layouts, n_cols: int, eps: float, offset: float, p: float, flags):
    """As the launches in :func:`._norm.norm_fwd`: a row to a program of ``blocks``, which is a cluster's if not 1."""
    x, residual = args[:2]
    # Of 16 warps PART columns are 128 bits a thread in 16 bits too. At odd places a thread takes one at a time, and
    # Philox would spill.
    most = 32 if p > 0.0 or n_cols % 16 else 16
    n_warps = max(8, min(most, next_power_of_2(n_cols) // (1024 * blocks)))
    settings = dict(PART=part_of(n_cols, n_warps) * blocks, num_warps=n_warps)
    key = (blocks, next_power_of_2(n_cols), n_cols % 16 == 0, x.element_size(), residual is not None)
    settings = tuned("norm_fwd_row", x.device, key, settings)
    ahead = 0 if p > 0.0 else blocks * (AHEAD if blocks == 1 else CLUSTER_AHEAD)
    _norm_fwd_row_kernel[(n_rows,)](
        *args, *layouts, n_cols, eps, offset, p, **flags, DROPOUT=p > 0.0,
        PARTS=triton.cdiv(n_cols, settings["PART"]), AHEAD=max(1, ahead // settings["PART"]), **settings,
        num_ctas=blocks, maxnreg=min(128, 2048 // settings["num_warps"]), **OPTIONS,
    )  # fmt: skip


def norm_bwd_row(
    programs: int, blocks: int, n_stages: int, args, layouts, n_rows: int, n_cols: int, offset: float, p: float, flags
):
    """As the launches in :func:`._norm_backward.norm_bwd`: ``programs``, each of which takes row after row."""
    n_warps = max(8, next_power_of_2(n_cols) // (512 * blocks))
    part = part_of(n_cols, n_warps) * blocks
    dinput, dresidual = args[7:9]
    if dinput.dtype != dresidual.dtype and n_cols % 16 == 0:
        part //= 2  # 128 bits a thread of the wider: the same columns of both
    _norm_bwd_row_kernel[(programs,)](
        *args, *layouts, n_rows, n_cols, offset, p, **flags, DROPOUT=p > 0.0,
        PARTS=triton.cdiv(n_cols, part), PART=part, STAGES=n_stages, num_warps=n_warps, num_ctas=blocks,
        maxnreg=min(255, 2048 // n_warps), **OPTIONS,
    )  # fmt: skip
