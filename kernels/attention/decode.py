"""Attention of few queries over many keys, as in decoding against a cache: split over the keys.

One program per chunk of keys and key head takes all query heads of the group as rows of one tile, so a chunk is read
once, and leaves (maximum, sum, unnormalised output) of its rows. A second kernel adds the chunks up in their order. A
chunk has a fixed length and whether to split depends on the sequence alone, not on the batch or the GPU: a row has the
same bits in any batch. The gradient is attention_bwd's.
"""

import torch
import triton
import triton.language as tl

from ..launch import OPTIONS, next_power_of_2
from .online_softmax import forward_tiles, row_results
from .problem import column_range, load_tile, locate, plane_of, store_tile

# Rows of a tile: queries times heads of a group (as a power of 2).
MOST_ROWS = 64


@triton.jit
def _attention_split_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_max_ptr, part_sum_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, cu_q_ptr, cu_k_ptr,
    bias_ptr, stride_bb, stride_bh, stride_bm, stride_bn, slopes_ptr, stride_ab, stride_ah,
    scale, softcap, unit, left, right, seed_ptr, threshold,
    n_programs, n_tiles, n_seqs, heads, group, length_q, length_k, dim, dim_v,
    PACKED: tl.constexpr, NATURAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    GROUP: tl.constexpr, SPLIT_ROWS: tl.constexpr, SPLIT_FROM: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head_kv = (program // n_programs).to(tl.int64)
    place = program % n_programs
    b, tile, start_k, n_cols, start_q, n_rows = locate(
        place, cu_k_ptr, cu_q_ptr, n_tiles, length_k, length_q, n_seqs, BLOCK=CHUNK, PACKED=PACKED
    )
    first_col = tile * CHUNK
    if (first_col < n_cols) & (n_cols >= SPLIT_FROM) & (n_rows <= SPLIT_ROWS):
        member = tl.arange(0, BLOCK_M) % GROUP
        row = tl.arange(0, BLOCK_M) // GROUP
        in_rows = (member < group) & (row < n_rows)
        # What is no row of the group lies past the last one.
        rows = tl.where(in_rows, row, n_rows)
        head = head_kv * group + tl.where(in_rows, member, 0).to(tl.int64)
        at = (place.to(tl.int64) * (heads // group) + head_kv) * BLOCK_M + tl.arange(0, BLOCK_M)
        offset = n_cols - n_rows if BOTTOM_RIGHT else 0
        begin, full_begin, full_end, end = column_range(
            tile * 0, n_rows - 1, n_cols, offset, left, right, BLOCK_N=BLOCK_N, LEFT=LEFT, RIGHT=RIGHT
        )
        last_col = tl.minimum(first_col + CHUNK, n_cols)
        begin = tl.maximum(begin, first_col)
        end = tl.minimum(end, last_col)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        if begin < end:
            full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
            full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
            d = tl.arange(0, BLOCK_D).to(tl.int64)
            dv = tl.arange(0, BLOCK_DV).to(tl.int64)
            q_rows = plane_of(q_ptr, b, head[:, None], start_q, stride_qb, stride_qh, stride_qm, ALIGN=ALIGN)
            k_ptr = plane_of(k_ptr, b, head_kv, start_k, stride_kb, stride_kh, stride_kn, ALIGN=ALIGN)
            v_ptr = plane_of(v_ptr, b, head_kv, start_k, stride_vb, stride_vh, stride_vn, ALIGN=ALIGN)
            q = load_tile(q_rows, row, in_rows, stride_qm, d, stride_qd, dim, ALIGN=ALIGN)
            bias_rows = bias_ptr
            if BIAS > 0:
                bias_rows = bias_ptr + b * stride_bb + head[:, None] * stride_bh
            slope = 0.0
            if ALIBI:
                slope = tl.load(slopes_ptr + b * stride_ab + head * stride_ah).to(tl.float32)[:, None]
            seed = tl.load(seed_ptr) if DROPOUT else 0
            plane = (b * heads + head)[:, None]
            acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
            for phase in tl.static_range(3):
                if phase == 0:
                    low, high = begin, full_begin
                elif phase == 1:
                    low, high = full_begin, full_end
                else:
                    low, high = full_end, end
                if phase > 0 or LEFT:
                    acc, row_max, row_sum = forward_tiles(
                        acc, row_max, row_sum, q, None, None, b, head_kv, k_ptr, v_ptr, low, high, rows, n_rows, n_cols,
                        stride_kn, stride_kd, stride_vn, stride_vd, d, dv, dim, dim_v,
                        bias_rows, stride_bm, stride_bn, slope, scale, softcap, unit, offset, left, right,
                        seed, plane, threshold,
                        NATURAL=NATURAL, SOFTCAP=SOFTCAP, ALIBI=ALIBI, BIAS=BIAS, LEFT=LEFT, RIGHT=RIGHT,
                        DROPOUT=DROPOUT, PRECISION=PRECISION, EXACT=EXACT, MASKED=phase != 1,
                        ALIGN=ALIGN, BLOCK_N=BLOCK_N,
                    )  # fmt: skip
            store_tile(part_ptr, acc, at, in_rows, dim_v, dv, 1, dim_v, ALIGN=ALIGN)
        tl.store(part_max_ptr + at, row_max, mask=in_rows)
        tl.store(part_sum_ptr + at, row_sum, mask=in_rows)


@triton.jit
def _attention_merge_kernel(
    part_ptr, part_max_ptr, part_sum_ptr, out_ptr, lse_ptr, max_ptr, log2_ptr, sinks_ptr,
    stride_ob, stride_oh, stride_om, stride_od, stride_sb, stride_sh, cu_q_ptr, cu_k_ptr,
    unit, keep_scale, n_tiles, heads, group, length_q, length_k, dim_v, rows_of_sequence,
    PACKED: tl.constexpr, NATURAL: tl.constexpr, SINKS: tl.constexpr, DROPOUT: tl.constexpr,
    GROUP: tl.constexpr, SPLIT_ROWS: tl.constexpr, SPLIT_FROM: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program % rows_of_sequence
    head = (program // rows_of_sequence % heads).to(tl.int64)
    b = (program // rows_of_sequence // heads).to(tl.int64)
    n_rows = length_q
    n_cols = length_k
    at_row = row.to(tl.int64)
    place = b * n_tiles
    if PACKED:
        start_q = tl.load(cu_q_ptr + b).to(tl.int64)
        start_k = tl.load(cu_k_ptr + b).to(tl.int64)
        n_rows = (tl.load(cu_q_ptr + b + 1).to(tl.int64) - start_q).to(tl.int32)
        n_cols = (tl.load(cu_k_ptr + b + 1).to(tl.int64) - start_k).to(tl.int32)
        at_row += start_q
        place = start_k // CHUNK + b
    if (row < n_rows) & (n_cols >= SPLIT_FROM) & (n_rows <= SPLIT_ROWS):
        chunks = tl.cdiv(n_cols, CHUNK)
        # Between a row's parts in neighbouring chunks.
        step = heads // group * BLOCK_M
        first = place * step + head // group * BLOCK_M + row * GROUP + head % group
        s = tl.arange(0, BLOCK_S)
        highest = tl.full((BLOCK_S,), float("-inf"), tl.float32)
        for chunk in range(0, chunks, BLOCK_S):
            at = first + (chunk + s).to(tl.int64) * step
            highest = tl.maximum(highest, tl.load(part_max_ptr + at, mask=chunk + s < chunks, other=float("-inf")))
        # As vectors of one element, which row_results takes.
        row_max = tl.max(highest, axis=0) + tl.zeros((1,), tl.float32)
        row_sum = tl.zeros((1,), tl.float32)
        if SINKS:
            # The sink is a column without a value.
            sink = tl.load(sinks_ptr + head).to(tl.float32)
            row_max = tl.maximum(row_max, sink)
            row_sum = tl.where(row_max == float("-inf"), 0.0, tl.exp2((sink - row_max) * unit))
        shift = tl.where(row_max == float("-inf"), 0.0, row_max)
        dv = tl.arange(0, BLOCK_DV).to(tl.int64)
        acc = tl.zeros((BLOCK_DV,), tl.float32)
        for chunk in range(0, chunks, BLOCK_S):
            at = first + (chunk + s).to(tl.int64) * step
            part_max = tl.load(part_max_ptr + at, mask=chunk + s < chunks, other=float("-inf"))
            part_sum = tl.load(part_sum_ptr + at, mask=chunk + s < chunks, other=0.0)
            # Chunks in which the row sees nothing have stored no output.
            part = load_tile(part_ptr, at, part_sum != 0.0, dim_v, dv, 1, dim_v, ALIGN=1)
            weight = tl.exp2((part_max - shift) * unit)
            row_sum += tl.sum(weight * part_sum, axis=0)
            acc += tl.sum(weight[:, None] * part, axis=0)
        lse, row_max, row_sum, row_log2 = row_results(row_max, row_sum, unit, NATURAL=NATURAL)
        acc = acc / row_sum
        if DROPOUT:
            acc *= keep_scale
        at_stats = b * stride_sb + head * stride_sh + at_row + tl.arange(0, 1)
        tl.store(lse_ptr + at_stats, lse)
        tl.store(max_ptr + at_stats, row_max)
        tl.store(log2_ptr + at_stats, row_log2)
        tl.store(
            out_ptr + b * stride_ob + head * stride_oh + at_row * stride_om + dv * stride_od,
            acc.to(out_ptr.dtype.element_ty), mask=dv < dim_v,
        )  # fmt: skip


def split_tile(dim: int, dtype: torch.dtype) -> dict:
    """Keys of a chunk, from how many keys on a sequence is split, and tiles; by the padded head dim. Not yet timed."""
    if dtype == torch.float32:
        width, warps, stages = (16, 8, 1) if dim > 128 else (32, 8, 2)
    else:
        width, warps, stages = 32 if dim > 128 else 64, 4, 2
    return dict(CHUNK=256, SPLIT_FROM=512, BLOCK_N=width, num_warps=warps, num_stages=stages)


def splits(problem) -> dict | None:
    """SPLIT_ROWS and SPLIT_FROM: sequences of at most so many queries and at least so many keys are split.

    None where no sequence of the call can be.
    """
    tile = split_tile(problem.widest, problem.q.dtype)
    rows = MOST_ROWS // next_power_of_2(problem.group)
    # Packed sequences of one cu_seqlens have as many queries as keys.
    few = problem.cu[0] is not problem.cu[1] if problem.packed else problem.rows <= rows
    if rows == 0 or not few or problem.cols < tile["SPLIT_FROM"]:
        return None
    return dict(SPLIT_ROWS=rows, SPLIT_FROM=tile["SPLIT_FROM"])


def attention_decode(problem, limits: dict, sinks, out, lse, stats):
    """Fills ``out``, ``lse`` and ``stats`` for the sequences within ``limits``, from :func:`splits`."""
    tile = split_tile(problem.widest, problem.q.dtype)
    group = next_power_of_2(problem.group)
    rows = min(problem.rows, limits["SPLIT_ROWS"])
    shared = dict(
        GROUP=group, CHUNK=tile["CHUNK"], BLOCK_M=max(16, next_power_of_2(rows * group)), PACKED=problem.packed,
        NATURAL=problem.flags["NATURAL"], DROPOUT=problem.flags["DROPOUT"], **limits,
    )  # fmt: skip
    n_tiles, programs = problem.tiles(tile["CHUNK"], problem.cols)
    q, k, v = problem.q, problem.k, problem.v
    places = programs * problem.heads_kv * shared["BLOCK_M"]
    part = q.new_empty(places * problem.dim_v, dtype=torch.float32)
    part_max, part_sum = q.new_empty((2, places), dtype=torch.float32)
    _attention_split_kernel[(programs * problem.heads_kv,)](
        q, k, v, part, part_max, part_sum, *(s for x in (q, k, v) for s in problem.strides(x)), *problem.cu,
        *problem.bias_args(), *problem.slope_args(), *problem.feature_args(),
        programs, n_tiles, problem.batch, problem.heads, problem.group, problem.rows, problem.cols,
        problem.dim, problem.dim_v, ALIGN=problem.align(), BLOCK_N=tile["BLOCK_N"],
        **problem.blocks, **{**problem.flags, **shared},
        num_warps=tile["num_warps"], num_stages=tile["num_stages"], **OPTIONS,
    )  # fmt: skip
    _attention_merge_kernel[(rows * problem.heads * problem.batch,)](
        part, part_max, part_sum, out, lse, stats[0], stats[1], q if sinks is None else sinks,
        *problem.strides(out), *problem.stat_strides(), *problem.cu,
        problem.unit, problem.keep_scale, n_tiles, problem.heads, problem.group, problem.rows, problem.cols,
        problem.dim_v, rows, SINKS=sinks is not None, BLOCK_S=16, BLOCK_DV=problem.blocks["BLOCK_DV"],
        num_warps=4, num_stages=2, **shared, **OPTIONS,
    )  # fmt: skip
