"""The norms for a long row: one program holds it in registers, segment by segment, and reads it once.

The formulas are those in forward.py and backward.py. As one tile, a row of thousands of columns would have a mask in
registers for each of a thread's columns, beside the row itself; where rows do not begin at multiples of 16 elements, an
address too. In segments only the last one has a mask, and none needs its addresses before its turn: a third fewer
registers, as compiled.
"""

import triton
import triton.language as tl

from ..launch import cdiv, launch_options, next_power_of_2, tuned
from .arguments import NormBackwardPass, NormForwardPass, drop_branch, row_starts

# A row of more columns is long: LONG fill a tile alone, and more than UNALIGNED_LONG would spill in one tile where rows
# do not begin at multiples of 16 elements.
LONG, UNALIGNED_LONG = 4096, 1024
# Columns of a segment, for each block of a cluster. Where rows do not begin at multiples of 16 elements it has one
# column a thread instead.
SEGMENT = 4096
# Columns that a block of the forward loads before it stores the first of them, since no load overtakes a store: as many
# as do not spill on sm_80, sm_90 and sm_100. With dropout it stores after each segment.
LOADED_FIRST, CLUSTER_LOADED_FIRST = 8192, 16384


def is_long(n_cols: int) -> bool:
    return n_cols > (UNALIGNED_LONG if n_cols % 16 else LONG)


def segment_columns(n_cols: int, n_warps: int) -> int:
    return 32 * n_warps if n_cols % 16 else SEGMENT


@triton.jit
def _norm_fwd_row_kernel(
    inputs, outputs, places, n_cols, numbers,
    CENTER: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """GROUP: how many segments are loaded before the first of them is stored."""
    row = tl.program_id(0).to(tl.int64)
    in_segment = tl.arange(0, SEGMENT)[None, :]
    full = tl.full((1, SEGMENT), True, tl.int1)
    rest = in_segment < n_cols - (SEGMENTS - 1) * SEGMENT
    x_ptr = inputs.x + row_starts(row, places.x)
    if inputs.residual is not None:
        residual_ptr = inputs.residual + row_starts(row, places.residual)
        h_ptr = outputs.h + row * n_cols
        if inputs.seed is not None:
            key, first_row = tl.load(inputs.seed), tl.load(inputs.seed + 1)
    xs = ()
    total = tl.zeros((1, SEGMENT), tl.float32)
    for segment in tl.static_range(SEGMENTS):
        at = segment * SEGMENT + in_segment
        mask = rest if segment == SEGMENTS - 1 else full
        x = tl.load(x_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if inputs.residual is not None:
            if inputs.seed is not None:
                rows = row + tl.arange(0, 1) + first_row
                x = drop_branch(x, key, rows, segment * SEGMENT, numbers.dropout, SEGMENT)
            x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
            x = x.to(outputs.h.dtype.element_ty).to(tl.float32)
        xs = xs + (x,)  # noqa: RUF005
        total += x
        if inputs.residual is not None and (segment % GROUP == GROUP - 1 or segment == SEGMENTS - 1):
            for done in tl.static_range(segment - segment % GROUP, segment + 1):
                at = done * SEGMENT + in_segment
                mask = rest if done == SEGMENTS - 1 else full
                tl.store(h_ptr + at, xs[done].to(outputs.h.dtype.element_ty), mask=mask)
    mean = 0.0
    if CENTER:
        first = tl.sum(total, axis=1) / n_cols
        offs = ()
        total = tl.zeros((1, SEGMENT), tl.float32)
        for segment in tl.static_range(SEGMENTS):
            x = xs[segment] - first
            x = tl.where(rest, x, 0.0) if segment == SEGMENTS - 1 else x
            offs = offs + (x,)  # noqa: RUF005
            total += x
        xs = offs
        mean = first + tl.sum(total, axis=1) / n_cols
        tl.store(outputs.mean + row + tl.arange(0, 1), mean)
        # xs are x - first from here on.
        mean -= first
    square = tl.zeros((1, SEGMENT), tl.float32)
    for segment in tl.static_range(SEGMENTS):
        x = xs[segment] - mean
        # The lanes past the row hold 0, not the mean: without the mask each would add mean^2 to the variance.
        x = tl.where(rest, x, 0.0) if segment == SEGMENTS - 1 else x
        square += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(square, axis=1) / n_cols + numbers.eps)
    tl.store(outputs.rstd + row + tl.arange(0, 1), rstd)
    y_ptr = outputs.y + row * n_cols
    for segment in tl.static_range(SEGMENTS):
        at = segment * SEGMENT + in_segment
        mask = rest if segment == SEGMENTS - 1 else full
        y = (xs[segment] - mean) * rstd
        if inputs.weight is not None:
            y *= tl.load(inputs.weight + at, mask=mask, other=0.0).to(tl.float32) + numbers.offset
        if inputs.bias is not None:
            y += tl.load(inputs.bias + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, y.to(outputs.y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _norm_bwd_row_kernel(
    inputs, outputs, places, n_rows, n_cols, offset, dropout,
    CENTER: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    NEED_DX: tl.constexpr = outputs.dinput is not None or outputs.dresidual is not None
    NEED_XHAT: tl.constexpr = NEED_DX or outputs.dweight is not None
    program = tl.program_id(0).to(tl.int64)
    in_segment = tl.arange(0, SEGMENT)[None, :]
    full = tl.full((1, SEGMENT), True, tl.int1)
    rest = in_segment < n_cols - (SEGMENTS - 1) * SEGMENT
    weights, dweights, dbiases = (), (), ()
    for segment in tl.static_range(SEGMENTS):
        if inputs.weight is not None:
            mask = rest if segment == SEGMENTS - 1 else full
            at = segment * SEGMENT + in_segment
            weight = tl.load(inputs.weight + at, mask=mask, other=0.0).to(tl.float32) + offset
            weights = weights + (weight,)  # noqa: RUF005
        dweights = dweights + (tl.zeros((1, SEGMENT), tl.float32),)  # noqa: RUF005
        dbiases = dbiases + (tl.zeros((1, SEGMENT), tl.float32),)  # noqa: RUF005
    if inputs.seed is not None and outputs.dinput is not None:
        key, first_row = tl.load(inputs.seed), tl.load(inputs.seed + 1)
    for index in tl.range(tl.program_id(0), n_rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        dy_row = inputs.dy + row_starts(row, places.dy)
        x_row = inputs.x + row_starts(row, places.x)
        if NEED_XHAT:
            rstd = tl.load(inputs.rstd + row)
            mean = tl.load(inputs.mean + row) if CENTER else 0.0
        dys, xhats = (), ()
        sum_g = tl.zeros((1, SEGMENT), tl.float32)
        sum_gx = tl.zeros((1, SEGMENT), tl.float32)
        for segment in tl.static_range(SEGMENTS):
            at = segment * SEGMENT + in_segment
            mask = rest if segment == SEGMENTS - 1 else full
            dy = tl.load(dy_row + at, mask=mask, other=0.0).to(tl.float32)
            dys = dys + (dy,)  # noqa: RUF005
            if NEED_XHAT:
                xhat = (tl.load(x_row + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
                xhat = tl.where(rest, xhat, 0.0) if segment == SEGMENTS - 1 else xhat
                xhats = xhats + (xhat,)  # noqa: RUF005
                g = dy * weights[segment] if inputs.weight is not None else dy
                sum_g += g
                sum_gx += g * xhat
        if NEED_DX:
            mean_gx = tl.sum(sum_gx, axis=1) / n_cols
            mean_g = tl.sum(sum_g, axis=1) / n_cols if CENTER else 0.0
        new_dweights, new_dbiases = (), ()
        for segment in tl.static_range(SEGMENTS):
            at = segment * SEGMENT + in_segment
            mask = rest if segment == SEGMENTS - 1 else full
            dy = dys[segment]
            if NEED_DX:
                g = dy * weights[segment] if inputs.weight is not None else dy
                dx = (g - xhats[segment] * mean_gx - mean_g) * rstd
                if inputs.dh is not None:
                    dh_at = row_starts(row, places.dh) + at
                    dx += tl.load(inputs.dh + dh_at, mask=mask, other=0.0).to(tl.float32)
                out_at = row * n_cols + at
                if outputs.dresidual is not None:
                    tl.store(outputs.dresidual + out_at, dx.to(outputs.dresidual.dtype.element_ty), mask=mask)
                if outputs.dinput is not None:
                    if inputs.seed is not None:
                        rows = row + tl.arange(0, 1) + first_row
                        dx = drop_branch(dx, key, rows, segment * SEGMENT, dropout, SEGMENT)
                    tl.store(outputs.dinput + out_at, dx.to(outputs.dinput.dtype.element_ty), mask=mask)
            dweight = dweights[segment] + dy * xhats[segment] if outputs.dweight is not None else dweights[segment]
            new_dweights = new_dweights + (dweight,)  # noqa: RUF005
            dbias = dbiases[segment] + dy if outputs.dbias is not None else dbiases[segment]
            new_dbiases = new_dbiases + (dbias,)  # noqa: RUF005
        dweights, dbiases = new_dweights, new_dbiases
    for segment in tl.static_range(SEGMENTS):
        at = program * n_cols + segment * SEGMENT + in_segment
        mask = rest if segment == SEGMENTS - 1 else full
        if outputs.dweight is not None:
            tl.store(outputs.dweight + at, dweights[segment], mask=mask)
        if outputs.dbias is not None:
            tl.store(outputs.dbias + at, dbiases[segment], mask=mask)


def norm_fwd_row(work: NormForwardPass, blocks: int) -> None:
    """As the launches in forward.py: a row to a program of ``blocks``, which is a cluster's if not 1."""
    x, n_cols, dropout = work.inputs.x, work.n_cols, work.inputs.seed is not None
    # With 16 warps SEGMENT columns are 128 bits a thread in 16 bits too. Where rows do not begin at multiples of 16
    # elements a thread takes one column at a time, and with dropout fewer warps would spill: 32 at most there.
    most = 32 if dropout or n_cols % 16 else 16
    n_warps = max(8, min(most, next_power_of_2(n_cols) // (1024 * blocks)))
    settings = dict(SEGMENT=segment_columns(n_cols, n_warps) * blocks, num_warps=n_warps)
    key = (blocks, next_power_of_2(n_cols), n_cols % 16 == 0, x.element_size(), work.inputs.residual is not None)
    settings = tuned("norm_fwd_row", x.device, key, settings)
    first = 0 if dropout else blocks * (LOADED_FIRST if blocks == 1 else CLUSTER_LOADED_FIRST)
    _norm_fwd_row_kernel[(work.n_rows,)](
        work.inputs, work.outputs, work.places, n_cols, work.numbers, CENTER=work.center,
        SEGMENTS=cdiv(n_cols, settings["SEGMENT"]), GROUP=max(1, first // settings["SEGMENT"]),
        SEGMENT=settings["SEGMENT"], **launch_options(x.device, num_warps=settings["num_warps"], num_ctas=blocks,
                                                      maxnreg=min(128, 2048 // settings["num_warps"])),
    )  # fmt: skip


def norm_bwd_row(work: NormBackwardPass, blocks: int, programs: int, n_stages: int) -> None:
    """As the launches in backward.py: ``programs`` of ``blocks`` each, which take row after row."""
    n_cols = work.n_cols
    n_warps = max(8, next_power_of_2(n_cols) // (512 * blocks))
    segment = segment_columns(n_cols, n_warps) * blocks
    if work.inputs.dy.dtype != work.inputs.x.dtype and n_cols % 16 == 0:
        segment //= 2  # 128 bits a thread of the wider: the same columns of both
    key = (blocks, next_power_of_2(n_cols), n_cols % 16 == 0, work.inputs.x.element_size())
    settings = tuned(
        "norm_bwd_row", work.inputs.x.device, key, dict(SEGMENT=segment, STAGES=n_stages, num_warps=n_warps)
    )
    segment, n_warps = settings["SEGMENT"], settings["num_warps"]
    _norm_bwd_row_kernel[(programs,)](
        work.inputs, work.outputs, work.places, work.n_rows, n_cols, work.offset, work.dropout, CENTER=work.center,
        SEGMENTS=cdiv(n_cols, segment), SEGMENT=segment, STAGES=settings["STAGES"],
        **launch_options(work.inputs.x.device, num_warps=n_warps, num_ctas=blocks, maxnreg=min(255, 2048 // n_warps)),
    )  # fmt: skip
