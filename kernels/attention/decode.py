"""Attention of few queries over many keys, as in decoding against a cache: split over the keys.

One program per chunk of keys and key head takes all query heads of the group as rows of one tile, so that a decoding
step reads a chunk once, and leaves (maximum, sum, unnormalised output) of its rows. A second kernel adds the chunks up
in their order. A chunk has a fixed length, a tile's rows follow from the group, and whether to split depends on the
sequence alone, not on the batch or the GPU: a row has the same bits in any batch, and beside any number of queries that
are split too. More queries than a tile holds take further programs, which find the chunk in the cache. The gradient is
attention_bwd's.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import cdiv, launch_options, next_power_of_2
from .online_softmax import forward_tiles, row_results
from .scores import column_range, first_number, load_tile, locate, matrix_of, sheet_of, span_of, store_tile
from .tiles import register_bound
from .values import Matrix, TileShape

# Most rows of a sequence that is split: queries times heads of a group, as a power of 2. A guess. The sequence's own
# queries decide, whatever its batch. Longer ones are the forward's, whose tiles of up to 128 rows take other matrix
# instructions, and so another order of sums within a product.
MOST_ROWS = 64
# Rows of a tile, or the heads of a group if those are more: the fewest that a product takes, since a step of one query
# waits for memory.
TILE_ROWS = 16


class KeySplit(NamedTuple):
    """Constants. Sequences of at most ``rows`` queries and at least ``least_cols`` keys are split.

    ``chunk`` is the number of keys of a program.
    """

    rows: int
    least_cols: int
    chunk: int


class ChunkResults(NamedTuple):
    """What the programs of all chunks leave, in fp32: unnormalised outputs, and each row's maximum and sum.

    Each chunk of each sequence has tiles of rows for every key head.
    """

    out: torch.Tensor
    row_max: torch.Tensor
    row_sum: torch.Tensor


@triton.jit
def _attention_split_kernel(
    q, k, v, partial, score, dropout, sizes, programs,
    flags: tl.constexpr, tile: tl.constexpr, split: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = tile.block_m
    BLOCK_DV: tl.constexpr = tile.block_dv
    CHUNK: tl.constexpr = split.chunk
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    program = tl.program_id(0)
    first_row = tl.program_id(1) * QUERIES
    head_kv = (program // programs.per_head).to(tl.int64)
    place = program % programs.per_head
    b, chunk, start_k, n_cols, start_q, n_rows = locate(
        place, sizes.cu_k, sizes.cu_q, programs.tiles, sizes.cols, sizes.rows, sizes.sequences, BLOCK=CHUNK
    )
    first_col = chunk * CHUNK
    splits = (n_cols >= split.least_cols) & (n_rows <= split.rows)
    if splits & (first_col < n_cols) & (first_row < n_rows):
        member = tl.arange(0, BLOCK_M) % GROUP
        row = first_row + tl.arange(0, BLOCK_M) // GROUP
        in_rows = (member < sizes.group) & (row < n_rows)
        # A row of the tile that is no query's gets the index n_rows, which every mask hides.
        rows = tl.where(in_rows, row, n_rows)
        head = (head_kv * sizes.group + tl.where(in_rows, member, 0).to(tl.int64))[:, None]
        plane = place.to(tl.int64) * (sizes.heads // sizes.group) + head_kv
        at = (plane * tl.num_programs(1) + tl.program_id(1)) * BLOCK_M + tl.arange(0, BLOCK_M)
        seed = tl.load(dropout.seed) if dropout is not None else 0
        number = first_number(dropout, b, sizes.heads)
        sheet = sheet_of(b, head, n_rows, n_cols, score, seed, number, BOTTOM_RIGHT=flags.bottom_right)
        begin, full_begin, full_end, end = column_range(
            first_row,
            tl.minimum(first_row + QUERIES, n_rows) - 1,
            n_cols,
            sheet.offset,
            score.left,
            score.right,
            BLOCK_N=tile.block_n,
        )
        last_col = tl.minimum(first_col + CHUNK, n_cols)
        begin = tl.maximum(begin, first_col)
        end = tl.minimum(end, last_col)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        if begin < end:
            full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
            full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
            queries = matrix_of(q, b, head, start_q, sizes.dim, BLOCK=tile.block_d, ALIGN=flags.align)
            keys = matrix_of(k, b, head_kv, start_k, sizes.dim, BLOCK=tile.block_d, ALIGN=flags.align)
            values = matrix_of(v, b, head_kv, start_k, sizes.dim_v, BLOCK=BLOCK_DV, ALIGN=flags.align)
            q_tile = load_tile(queries, row, in_rows)
            acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
            for phase in tl.static_range(3):
                if phase == 0:
                    low, high = begin, full_begin
                elif phase == 1:
                    low, high = full_begin, full_end
                else:
                    low, high = full_end, end
                if phase > 0 or score.left is not None:
                    acc, row_max, row_sum = forward_tiles(
                        acc, row_max, row_sum, q_tile, rows, keys, values, None, None, (low, high), sheet, score,
                        dropout, flags, MASKED=phase != 1, BLOCK_N=tile.block_n,
                    )  # fmt: skip
            store_tile(_outputs(partial, sizes.dim_v, BLOCK_DV, flags.align), acc, at, in_rows)
        tl.store(partial.row_max + at, row_max, mask=in_rows)
        tl.store(partial.row_sum + at, row_sum, mask=in_rows)


@triton.jit
def _outputs(partial, dim_v, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """The partial outputs as rows of ``dim_v`` columns."""
    dim = dim_v // ALIGN * ALIGN
    zero = tl.program_id(0) * 0
    return Matrix(partial.out, dim, 1, tl.arange(0, BLOCK).to(tl.int64), dim, zero, zero)


@triton.jit
def _attention_merge_kernel(
    partial, out, stats, sinks, dropout, unit, sizes, n_tiles, rows_of_sequence,
    NATURAL: tl.constexpr, split: tl.constexpr, tile: tl.constexpr, GROUP: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = tile.block_m
    BLOCK_DV: tl.constexpr = tile.block_dv
    program = tl.program_id(0)
    row = program % rows_of_sequence
    head = (program // rows_of_sequence % sizes.heads).to(tl.int64)
    b = (program // rows_of_sequence // sizes.heads).to(tl.int64)
    start_q, n_rows, start_k, n_cols = span_of(b, sizes)
    at_row = row.to(tl.int64) + start_q
    place = b * n_tiles
    if sizes.cu_q is not None:
        place = start_k // split.chunk + b
    if (row < n_rows) & (n_cols >= split.least_cols) & (n_rows <= split.rows):
        chunks = tl.cdiv(n_cols, split.chunk)
        # A key head's rows in one chunk, and from a row's results in one chunk to those in the next.
        places = tl.cdiv(rows_of_sequence * GROUP, BLOCK_M) * BLOCK_M
        step = sizes.heads // sizes.group * places
        first = place * step + head // sizes.group * places + row * GROUP + head % sizes.group
        s = tl.arange(0, BLOCK_S)
        highest = tl.full((BLOCK_S,), float("-inf"), tl.float32)
        for chunk in range(0, chunks, BLOCK_S):
            at = first + (chunk + s).to(tl.int64) * step
            highest = tl.maximum(highest, tl.load(partial.row_max + at, mask=chunk + s < chunks, other=float("-inf")))
        # As vectors of one element, which row_results takes.
        row_max = tl.max(highest, axis=0) + tl.zeros((1,), tl.float32)
        row_sum = tl.zeros((1,), tl.float32)
        if sinks is not None:
            # The sink is a column without a value.
            sink = tl.load(sinks + head).to(tl.float32)
            row_max = tl.maximum(row_max, sink)
            row_sum = tl.where(row_max == float("-inf"), 0.0, tl.exp2((sink - row_max) * unit))
        shift = tl.where(row_max == float("-inf"), 0.0, row_max)
        dv = tl.arange(0, BLOCK_DV).to(tl.int64)
        acc = tl.zeros((BLOCK_DV,), tl.float32)
        for chunk in range(0, chunks, BLOCK_S):
            at = first + (chunk + s).to(tl.int64) * step
            part_max = tl.load(partial.row_max + at, mask=chunk + s < chunks, other=float("-inf"))
            part_sum = tl.load(partial.row_sum + at, mask=chunk + s < chunks, other=0.0)
            # Chunks in which the row sees nothing have stored no output.
            part = load_tile(_outputs(partial, sizes.dim_v, BLOCK_DV, 1), at, part_sum != 0.0)
            weight = tl.exp2((part_max - shift) * unit)
            row_sum += tl.sum(weight * part_sum, axis=0)
            acc += tl.sum(weight[:, None] * part, axis=0)
        lse, row_max, row_sum, row_log2 = row_results(row_max, row_sum, unit, NATURAL=NATURAL)
        acc = acc / row_sum
        if dropout is not None:
            acc *= dropout.keep_scale
        at_stats = b * stats.batch + head * stats.head + at_row + tl.arange(0, 1)
        tl.store(stats.lse + at_stats, lse)
        tl.store(stats.row_max + at_stats, row_max)
        tl.store(stats.row_log2 + at_stats, row_log2)
        tl.store(
            out.ptr + b * out.batch + head * out.head + at_row * out.row + dv * out.col,
            acc.to(out.ptr.dtype.element_ty), mask=dv < sizes.dim_v,
        )  # fmt: skip


def split_tile(dim: int, dtype: torch.dtype) -> dict:
    """Keys of a chunk, from how many keys on a sequence is split, and tiles; by the padded head dim. Not yet timed."""
    if dtype == torch.float32:
        # 32 keys of a head dim up to 64 would spill on sm_80 with every feature at once.
        width, warps, stages = 16, 8, 1 if dim > 128 else 2
    else:
        width, warps, stages = 32 if dim > 128 else 64, 4, 2
    return dict(CHUNK=256, SPLIT_FROM=512, BLOCK_N=width, num_warps=warps, num_stages=stages)


def _tile_of(problem) -> dict:
    return problem.tuned("attention_split", split_tile(problem.widest, problem.q.dtype))


def splits(problem) -> KeySplit | None:
    """Which sequences of the call are split; None where none can be."""
    tile = _tile_of(problem)
    rows = MOST_ROWS // next_power_of_2(problem.group)
    # Packed sequences of one cu_seqlens have as many queries as keys.
    sizes = problem.sizes
    few = sizes.cu_q is not sizes.cu_k if problem.packed else problem.rows <= rows
    if rows == 0 or not few or problem.cols < tile["SPLIT_FROM"]:
        return None
    return KeySplit(rows, tile["SPLIT_FROM"], tile["CHUNK"])


def attention_decode(problem, split: KeySplit, out, statistics):
    """Fills ``out`` and ``statistics`` for the sequences that ``split``, from :func:`splits`, names."""
    tile = _tile_of(problem)
    group = next_power_of_2(problem.group)
    rows = min(problem.rows, split.rows)
    shape = TileShape(max(TILE_ROWS, group), tile["BLOCK_N"], problem.block_d, problem.block_dv)
    row_tiles = cdiv(rows * group, shape.block_m)
    programs = problem.programs(split.chunk, problem.cols)
    places = programs.per_head * problem.heads_kv * row_tiles * shape.block_m
    outputs = problem.q.new_empty(places * problem.dim_v, dtype=torch.float32)
    partial = ChunkResults(outputs, *problem.q.new_empty((2, places), dtype=torch.float32))
    _attention_split_kernel[(programs.per_head * problem.heads_kv, row_tiles)](
        *map(problem.plane, (problem.q, problem.k, problem.v)), partial, problem.score, problem.dropout, problem.sizes,
        programs, flags=problem.flags(), tile=shape, split=split, GROUP=group,
        **launch_options(
            problem.q.device, num_warps=tile["num_warps"], num_stages=tile["num_stages"],
            **register_bound(problem.q.dtype, problem.pressure),
        ),
    )  # fmt: skip
    merge = problem.tuned("attention_merge", dict(BLOCK_S=16, num_warps=4, num_stages=2))
    _attention_merge_kernel[(rows * problem.heads * problem.batch,)](
        partial, problem.plane(out), statistics, problem.sinks, problem.dropout, problem.score.unit, problem.sizes,
        programs.tiles, rows, NATURAL=problem.natural, split=split, tile=shape, GROUP=group, BLOCK_S=merge["BLOCK_S"],
        **launch_options(problem.q.device, num_warps=merge["num_warps"], num_stages=merge["num_stages"]),
    )  # fmt: skip
