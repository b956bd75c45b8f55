"""Attention backward, after FlashAttention-2 (Dao 2023, algorithm 2), without atomics.

    p = softmax(t),  dp = dropout(dout v^T),  ds = p * (dp - delta),  delta = sum(dout * out) - dlse
    dt = ds * (1 - tanh^2) if soft-capped;  dq = scale dt k,  dk = scale dt^T q,  dv = dropout(p)^T dout
    dbias = ds summed over the bias's broadcast dimensions,  dsink = -sum over rows of exp(sink - lse) * delta

Scores are recomputed: by one program per tile of keys for dk and dv, which walks the query heads of its group, so
that grouped gradients need no second pass; and by one per tile of queries for dq. A bias's gradient is a third pass.
Every sum has a fixed order, so results repeat bit for bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import cdiv, keyed, launch_options
from ..math import LOG2E
from .bias_gradient import attention_dbias
from .problem import Problem
from .scores import (  # fmt: skip
    column_range,
    first_number,
    kept,
    load_tile,
    locate,
    matrix_of,
    probabilities,
    row_range,
    scores,
    sheet_of,
    step_tile,
    store_tile,
)
from .tiles import dkdv_tile, dq_tile, register_bound
from .values import Plane


@triton.jit
def _delta_kernel(
    out, dout, dlse, stats, n_tiles, heads, n_rows, dim_v,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows = (program % n_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = (program // n_tiles).to(tl.int64)
    b, head = plane // heads, plane % heads
    in_rows = rows < n_rows
    outputs = matrix_of(out, b, head, 0, dim_v, BLOCK=BLOCK_DV, ALIGN=ALIGN)
    upstream = matrix_of(dout, b, head, 0, dim_v, BLOCK=BLOCK_DV, ALIGN=ALIGN)
    out_tile = load_tile(outputs, rows, in_rows).to(tl.float32)
    dout_tile = load_tile(upstream, rows, in_rows).to(tl.float32)
    delta = tl.sum(out_tile * dout_tile, axis=1)
    if dlse is not None:
        delta -= tl.load(
            dlse.ptr + b * dlse.batch + head * dlse.head + rows * dlse.row, mask=in_rows, other=0.0
        ).to(tl.float32)  # fmt: skip
    at = b * stats.batch + head * stats.head + rows
    row_log2 = tl.load(stats.row_log2 + at, mask=in_rows, other=0.0)
    # Rows that saw nothing have no gradient, whatever came in for them.
    tl.store(stats.delta + at, tl.where(row_log2 == float("inf"), 0.0, delta), mask=in_rows)


class KeyTile(NamedTuple):
    """In a kernel: the columns of a program, from ``first`` on, with their keys and values."""

    cols: tl.tensor
    first: tl.tensor
    n_cols: tl.tensor
    k: tl.tensor
    v: tl.tensor


class QueryHeads(NamedTuple):
    """In a kernel: the query heads of a group, from ``first`` on, in one sequence of ``n_rows`` from ``start`` on."""

    batch: tl.tensor
    first: tl.tensor
    start: tl.tensor
    n_rows: tl.tensor
    seed: tl.tensor
    number: tl.tensor


@triton.jit
def _dkdv_tiles(
    dk, dv, keys, queries, run, planes, descs, stats, score, dropout, sizes,
    flags: tl.constexpr, tile: tl.constexpr, MASKED: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
):  # fmt: skip
    # Everything is transposed, (keys, queries): both products then take their left operand from registers.
    # One loop runs over the heads of the group and their rows: in two nested loops the sums would take more registers.
    begin, end = run
    q_plane, dout_plane = planes
    q_desc, dout_desc = descs
    b = queries.batch
    tiles = tl.cdiv(end - begin, tile.block_m)
    for turn in range(0, sizes.group * tiles):
        member = turn // tiles
        head = queries.first + member
        start = begin + (turn - member * tiles) * tile.block_m
        rows = start + tl.arange(0, tile.block_m)
        in_rows = rows < queries.n_rows
        sheet = sheet_of(
            b, head, queries.n_rows, keys.n_cols, score, queries.seed, queries.number, BOTTOM_RIGHT=flags.bottom_right
        )
        q_rows = matrix_of(q_plane, b, head, queries.start, sizes.dim, BLOCK=tile.block_d, ALIGN=flags.align)
        dout_rows = matrix_of(dout_plane, b, head, queries.start, sizes.dim_v, BLOCK=tile.block_dv, ALIGN=flags.align)
        at_stats = b * stats.batch + head * stats.head + queries.start + rows
        q = step_tile(q_desc, q_rows, start, rows, queries.n_rows)
        dot = tl.dot(keys.k, tl.trans(q), input_precision=flags.precision)
        t, slack = scores(dot, rows[None, :], keys.cols[:, None], sheet, score, flags, MASKED=MASKED)
        row_max = tl.load(stats.row_max + at_stats, mask=in_rows, other=0.0)
        row_log2 = tl.load(stats.row_log2 + at_stats, mask=in_rows, other=float("inf"))
        p = probabilities(t, row_max[None, :], row_log2[None, :], score.unit, EXACT=flags.exact)
        dout = step_tile(dout_desc, dout_rows, start, rows, queries.n_rows)
        if dropout is not None:
            keep = tl.trans(kept(queries.seed, sheet.number, rows, keys.first, dropout.threshold, tile.block_n))
        if NEED_DV:
            dropped = tl.where(keep, p * dropout.keep_scale, 0.0) if dropout is not None else p
            dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=flags.precision)
        if NEED_DK:
            delta = tl.load(stats.delta + at_stats, mask=in_rows, other=0.0)
            dp = tl.dot(keys.v, tl.trans(dout), input_precision=flags.precision)
            if dropout is not None:
                dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
            dt = p * (dp - delta[None, :]) * slack
            dk = tl.dot(dt.to(q.dtype), q, dk, input_precision=flags.precision)
    return dk, dv


@triton.jit
def _attention_bwd_dkdv_kernel(
    q, k, v, dout, q_desc, dout_desc, dk, dv, stats, score, dropout, sizes, programs,
    flags: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = tile.block_n
    BLOCK_D: tl.constexpr = tile.block_d
    BLOCK_DV: tl.constexpr = tile.block_dv
    program = tl.program_id(0)
    head_kv = (program // programs.per_head).to(tl.int64)
    b, at, start_k, n_cols, start_q, n_rows = locate(
        program % programs.per_head, sizes.cu_k, sizes.cu_q, programs.tiles, sizes.cols, sizes.rows, sizes.sequences,
        BLOCK=BLOCK_N,
    )  # fmt: skip
    if at * BLOCK_N < n_cols:
        first = at * BLOCK_N
        cols = first + tl.arange(0, BLOCK_N)
        in_cols = cols < n_cols
        k_tile = load_tile(matrix_of(k, b, head_kv, start_k, sizes.dim, BLOCK_D, flags.align), cols, in_cols)
        v_tile = load_tile(matrix_of(v, b, head_kv, start_k, sizes.dim_v, BLOCK_DV, flags.align), cols, in_cols)
        keys = KeyTile(cols, first, n_cols, k_tile, v_tile)
        seed = tl.load(dropout.seed) if dropout is not None else 0
        queries = QueryHeads(
            b, head_kv * sizes.group, start_q, n_rows, seed, first_number(dropout, b, sizes.heads)
        )  # fmt: skip
        offset = n_cols - n_rows if flags.bottom_right else 0
        begin, full_begin, full_end, end = row_range(
            first, first + BLOCK_N - 1, n_rows, n_cols, offset, score, BLOCK_M=tile.block_m
        )
        dk_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv_sum = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
        for phase in tl.static_range(3):
            if phase == 0:
                low, high = begin, full_begin
            elif phase == 1:
                low, high = full_begin, full_end
            else:
                low, high = full_end, end
            # Without a left bound the third run is empty.
            if phase < 2 or score.left is not None:
                dk_sum, dv_sum = _dkdv_tiles(
                    dk_sum, dv_sum, keys, queries, (low, high), (q, dout), (q_desc, dout_desc), stats, score, dropout,
                    sizes, flags, tile, MASKED=phase != 1, NEED_DK=dk is not None, NEED_DV=dv is not None,
                )  # fmt: skip
        if dk is not None:
            dk_rows = matrix_of(dk, b, head_kv, start_k, sizes.dim, BLOCK_D, flags.align)
            store_tile(dk_rows, dk_sum * score.scale, cols, in_cols)
        if dv is not None:
            dv_rows = matrix_of(dv, b, head_kv, start_k, sizes.dim_v, BLOCK_DV, flags.align)
            store_tile(dv_rows, dv_sum, cols, in_cols)


keyed(_dkdv_tiles)


class RowTile(NamedTuple):
    """In a kernel: the rows of a program with all that does not change from key to key."""

    rows: tl.tensor
    q: tl.tensor
    dout: tl.tensor
    row_max: tl.tensor
    row_log2: tl.tensor
    delta: tl.tensor


@triton.jit
def _dq_tiles(
    dq, own, keys, values, k_desc, v_desc, run, sheet, score, dropout,
    flags: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin, end = run
    for start in range(begin, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = step_tile(k_desc, keys, start, cols, sheet.n_cols)
        v = step_tile(v_desc, values, start, cols, sheet.n_cols)
        dot = tl.dot(own.q, tl.trans(k), input_precision=flags.precision)
        t, slack = scores(dot, own.rows[:, None], cols[None, :], sheet, score, flags, MASKED=MASKED)
        p = probabilities(t, own.row_max[:, None], own.row_log2[:, None], score.unit, EXACT=flags.exact)
        dp = tl.dot(own.dout, tl.trans(v), input_precision=flags.precision)
        if dropout is not None:
            keep = kept(sheet.seed, sheet.number, own.rows, start, dropout.threshold, BLOCK_N)
            dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
        dt = p * (dp - own.delta[:, None]) * slack
        dq = tl.dot(dt.to(k.dtype), k, dq, input_precision=flags.precision)
    return dq


keyed(_dq_tiles)


@triton.jit
def _attention_bwd_dq_kernel(
    q, k, v, dout, k_desc, v_desc, dq, stats, score, dropout, sizes, programs,
    flags: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = tile.block_m
    BLOCK_D: tl.constexpr = tile.block_d
    BLOCK_DV: tl.constexpr = tile.block_dv
    program = tl.program_id(0)
    head = (program // programs.per_head).to(tl.int64)
    b, at, start_q, n_rows, start_k, n_cols = locate(
        program % programs.per_head, sizes.cu_q, sizes.cu_k, programs.tiles, sizes.rows, sizes.cols, sizes.sequences,
        BLOCK=BLOCK_M,
    )  # fmt: skip
    if score.right is not None:
        at = tl.cdiv(n_rows, BLOCK_M) - 1 - at
    if at >= 0 and at * BLOCK_M < n_rows:
        first = at * BLOCK_M
        last = tl.minimum(first + BLOCK_M, n_rows) - 1
        rows = first + tl.arange(0, BLOCK_M)
        in_rows = rows < n_rows
        head_kv = head // sizes.group
        q_tile = load_tile(matrix_of(q, b, head, start_q, sizes.dim, BLOCK_D, flags.align), rows, in_rows)
        dout_tile = load_tile(matrix_of(dout, b, head, start_q, sizes.dim_v, BLOCK_DV, flags.align), rows, in_rows)
        at_stats = b * stats.batch + head * stats.head + start_q + rows
        row_max = tl.load(stats.row_max + at_stats, mask=in_rows, other=0.0)
        row_log2 = tl.load(stats.row_log2 + at_stats, mask=in_rows, other=float("inf"))
        delta = tl.load(stats.delta + at_stats, mask=in_rows, other=0.0)
        own = RowTile(rows, q_tile, dout_tile, row_max, row_log2, delta)
        seed = tl.load(dropout.seed) if dropout is not None else 0
        number = first_number(dropout, b, sizes.heads)
        sheet = sheet_of(b, head, n_rows, n_cols, score, seed, number, BOTTOM_RIGHT=flags.bottom_right)
        keys = matrix_of(k, b, head_kv, start_k, sizes.dim, BLOCK_D, flags.align)
        values = matrix_of(v, b, head_kv, start_k, sizes.dim_v, BLOCK_DV, flags.align)
        begin, full_begin, full_end, end = column_range(
            first, last, n_cols, sheet.offset, score.left, score.right, BLOCK_N=tile.block_n
        )
        dq_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for phase in tl.static_range(3):
            if phase == 0:
                low, high = begin, full_begin
            elif phase == 1:
                low, high = full_begin, full_end
            else:
                low, high = full_end, end
            # Without a left bound the first run is empty.
            if phase > 0 or score.left is not None:
                dq_sum = _dq_tiles(
                    dq_sum, own, keys, values, k_desc, v_desc, (low, high), sheet, score, dropout,
                    flags, MASKED=phase != 1, BLOCK_N=tile.block_n,
                )  # fmt: skip
        dq_rows = matrix_of(dq, b, head, start_q, sizes.dim, BLOCK_D, flags.align)
        store_tile(dq_rows, dq_sum * score.scale, rows, in_rows)


def _delta(problem: Problem, forward, upstream):
    """``forward``'s statistics with delta = sum(dout * out) - dlse."""
    delta = problem.q.new_empty(problem.stats_shape(), dtype=torch.float32)
    statistics = problem.statistics(forward.stats, delta=delta)
    if delta.numel() > 0:
        block_m = max(1, min(64, 8192 // (problem.block_dv * problem.q.element_size())))
        settings = problem.tuned("attention_delta", dict(BLOCK_M=block_m, num_warps=4))
        tiles = cdiv(problem.rows, settings["BLOCK_M"])
        planes = delta.numel() // problem.rows
        dlse = None
        if upstream.dlse is not None:
            strides = upstream.dlse.stride()
            dlse = Plane(upstream.dlse, *((0, *strides) if problem.packed else strides), col=0)
        _delta_kernel[(tiles * planes,)](
            problem.plane(forward.out), problem.plane(upstream.dout), dlse, statistics,
            tiles, problem.heads, problem.rows, problem.dim_v, ALIGN=problem.align(forward.out, upstream.dout),
            BLOCK_M=settings["BLOCK_M"], BLOCK_DV=problem.block_dv,
            **launch_options(problem.q.device, num_warps=settings["num_warps"], **register_bound(problem.q.dtype)),
        )  # fmt: skip
    return statistics


def _launch_dkdv(problem: Problem, dout, statistics, dk, dv):
    tile = dkdv_tile(problem.widest, problem.q.dtype, problem.arch, problem.pressure)
    shape, options = problem.launch_of("attention_bwd_dkdv", tile)
    programs = problem.programs(shape.block_n, problem.cols)
    _attention_bwd_dkdv_kernel[(programs.per_head * problem.heads_kv,)](
        *map(problem.plane, (problem.q, problem.k, problem.v, dout)),
        *problem.descriptors(problem.q, dout, shape.block_m), problem.plane(dk), problem.plane(dv), statistics,
        problem.score, problem.dropout, problem.sizes, programs,
        flags=problem.flags(dout, dk, dv), tile=shape, **options,
    )  # fmt: skip


def _launch_dq(problem: Problem, dout, statistics, dq):
    tile = dq_tile(problem.widest, problem.q.dtype, problem.arch, problem.pressure)
    shape, options = problem.launch_of("attention_bwd_dq", tile)
    programs = problem.programs(shape.block_m, problem.rows)
    _attention_bwd_dq_kernel[(programs.per_head * problem.heads,)](
        *map(problem.plane, (problem.q, problem.k, problem.v, dout)),
        *problem.descriptors(problem.k, problem.v, shape.block_n), problem.plane(dq), statistics,
        problem.score, problem.dropout, problem.sizes, programs,
        flags=problem.flags(dout, dq), tile=shape, **options,
    )  # fmt: skip


def attention_bwd(call, forward, upstream, wanted):
    """Fills ``wanted``'s dq, dk and dv, each shaped as its input or None; returns (dbias, dsinks), None if not wanted.

    Args:
        call: as at :class:`.problem.Problem`.
        forward: ``out`` and ``stats`` of the forward.
        upstream: the gradients ``dout`` and ``dlse``, which may be None.
        wanted: the buffers ``dq``, ``dk``, ``dv``, and ``bias`` and ``sinks``: whether their gradients are wanted.
    """
    problem = Problem(call)
    statistics = _delta(problem, forward, upstream)
    some_keys = problem.k.numel() + problem.v.numel() > 0
    if (wanted.dk is not None or wanted.dv is not None) and some_keys:
        _launch_dkdv(problem, upstream.dout, statistics, wanted.dk, wanted.dv)
    if wanted.dq is not None and problem.q.numel() > 0:
        _launch_dq(problem, upstream.dout, statistics, wanted.dq)
    dbias = attention_dbias(problem, upstream.dout, statistics) if wanted.bias else None
    dsinks = None
    if wanted.sinks:
        sinks = problem.sinks
        p_sink = torch.exp2((sinks.float().view(-1, 1) - statistics.row_max) * LOG2E.value - statistics.row_log2)
        dsinks = -(p_sink * statistics.delta).sum(-1 if problem.packed else (0, -1)).to(sinks.dtype)
    return dbias, dsinks
