"""The gradient of attention's additive bias: ds summed over the dimensions along which the bias is broadcast.

A program owns one tile of the bias and walks, in a fixed order, every batch, head, row and column that shares it; so
nothing of the size S x S exists but the gradient itself, and no atomics are needed. A bias of few tiles, such as
(1, 1, 1, Sk), gives its walk to several programs, each with a piece of the batches, heads or rows. The pieces' sums
are added afterwards.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import cdiv
from .scores import first_number, kept, load_tile, matrix_of, probabilities, scores, sheet_of, span_of
from .tiles import dbias_tile
from .values import Matrix


class BiasGrid(NamedTuple):
    """The bias is (planes / heads, heads, rows, cols), in tiles; a walk over what shares a tile is cut into pieces.

    A piece takes ``batch_step`` batches, ``head_step`` heads and ``row_step`` rows of the dimensions it walks.
    """

    planes: int
    heads: int
    rows: int
    cols: int
    row_tiles: int
    col_tiles: int
    batch_pieces: int
    batch_step: int
    head_pieces: int
    head_step: int
    row_step: int


class Broadcast(NamedTuple):
    """Constants: along which dimensions the bias is broadcast, so that a program walks them."""

    batch: bool
    head: bool
    row: bool
    col: bool


@triton.jit
def _product(
    a, rows, in_rows, b, cols, in_cols, flags: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """a b^T of a tile of rows and one of columns, STEP of the head dim at a time: registers do not grow with it."""
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, BLOCK_D, STEP):
        d = (start + tl.arange(0, STEP)).to(tl.int64)
        a_tile = load_tile(Matrix(a.ptr, a.row, a.col, d, a.dim, a.batch, a.head), rows, in_rows)
        b_tile = load_tile(Matrix(b.ptr, b.row, b.col, d, b.dim, b.batch, b.head), cols, in_cols)
        product = tl.dot(a_tile, tl.trans(b_tile), product, input_precision=flags.precision)
    return product


@triton.jit
def _attention_dbias_kernel(
    q, k, v, dout, dbias_ptr, stats, score, dropout, sizes, grid,
    over: tl.constexpr, flags: tl.constexpr, tile: tl.constexpr, STEP: tl.constexpr, STEP_V: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = tile.block_m
    BLOCK_N: tl.constexpr = tile.block_n
    program = tl.program_id(0)
    col_tile = program % grid.col_tiles
    row_tile = (program // grid.col_tiles) % grid.row_tiles
    plane = (program // (grid.col_tiles * grid.row_tiles) % grid.planes).to(tl.int64)
    piece = program // (grid.col_tiles * grid.row_tiles) // grid.planes
    batch_piece = piece % grid.batch_pieces
    head_piece = piece // grid.batch_pieces % grid.head_pieces
    row_piece = piece // grid.batch_pieces // grid.head_pieces
    bias_b, bias_head = plane // grid.heads, plane % grid.heads
    seed = tl.load(dropout.seed) if dropout is not None else 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first_b, last_b = bias_b, bias_b + 1
    if over.batch:
        first_b = bias_b + batch_piece * grid.batch_step
        last_b = tl.minimum(first_b + grid.batch_step, sizes.sequences)
    first_head, last_head = bias_head, bias_head + 1
    if over.head:
        first_head = bias_head + head_piece * grid.head_step
        last_head = tl.minimum(first_head + grid.head_step, sizes.heads)
    for b in range(first_b, last_b):
        start_q, n_rows, start_k, n_cols = span_of(b, sizes)
        first_row = row_tile * BLOCK_M
        last_row = tl.minimum(n_rows, first_row + BLOCK_M)
        if over.row:
            first_row = row_piece * grid.row_step
            last_row = tl.minimum(n_rows, first_row + grid.row_step)
        first_col = col_tile * BLOCK_N
        last_col = n_cols if over.col else tl.minimum(n_cols, first_col + BLOCK_N)
        for head in range(first_head, last_head):
            head_kv = head // sizes.group
            number = first_number(dropout, b, sizes.heads)
            sheet = sheet_of(b, head, n_rows, n_cols, score, seed, number, BOTTOM_RIGHT=flags.bottom_right)
            queries = matrix_of(q, b, head, start_q, sizes.dim, BLOCK=STEP, ALIGN=flags.align)
            keys = matrix_of(k, b, head_kv, start_k, sizes.dim, BLOCK=STEP, ALIGN=flags.align)
            values = matrix_of(v, b, head_kv, start_k, sizes.dim_v, BLOCK=STEP_V, ALIGN=flags.align)
            upstream = matrix_of(dout, b, head, start_q, sizes.dim_v, BLOCK=STEP_V, ALIGN=flags.align)
            for row in range(first_row, last_row, BLOCK_M):
                rows = row + tl.arange(0, BLOCK_M)
                in_rows = rows < n_rows
                at_stats = b * stats.batch + head * stats.head + start_q + rows
                row_max = tl.load(stats.row_max + at_stats, mask=in_rows, other=0.0)
                row_log2 = tl.load(stats.row_log2 + at_stats, mask=in_rows, other=float("inf"))
                delta = tl.load(stats.delta + at_stats, mask=in_rows, other=0.0)
                for col in range(first_col, last_col, BLOCK_N):
                    cols = col + tl.arange(0, BLOCK_N)
                    in_cols = cols < n_cols
                    dot = _product(
                        queries, rows, in_rows, keys, cols, in_cols, flags,
                        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=tile.block_d, STEP=STEP,
                    )  # fmt: skip
                    t, _ = scores(dot, rows[:, None], cols[None, :], sheet, score, flags, MASKED=True)
                    p = probabilities(t, row_max[:, None], row_log2[:, None], score.unit, EXACT=flags.exact)
                    dp = _product(
                        upstream, rows, in_rows, values, cols, in_cols, flags,
                        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=tile.block_dv, STEP=STEP_V,
                    )  # fmt: skip
                    if dropout is not None:
                        keep = kept(seed, sheet.number, rows, col, dropout.threshold, BLOCK_N)
                        dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
                    acc += p * (dp - delta[:, None])
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = (col_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    dbias_ptr += (piece.to(tl.int64) * grid.planes + plane) * grid.rows * grid.cols
    if over.row and over.col:
        tl.store(dbias_ptr, tl.sum(tl.sum(acc, axis=1), axis=0).to(dbias_ptr.dtype.element_ty))
    elif over.row:
        tl.store(dbias_ptr + cols, tl.sum(acc, axis=0).to(dbias_ptr.dtype.element_ty), mask=cols < grid.cols)
    elif over.col:
        tl.store(dbias_ptr + rows, tl.sum(acc, axis=1).to(dbias_ptr.dtype.element_ty), mask=rows < grid.rows)
    else:
        tl.store(
            dbias_ptr + rows[:, None] * grid.cols + cols[None, :], acc.to(dbias_ptr.dtype.element_ty),
            mask=(rows < grid.rows)[:, None] & (cols < grid.cols)[None, :],
        )  # fmt: skip


# A bias of fewer tiles gives its walks to about this many programs: several turns of the largest GPU. A guess.
PROGRAMS = 512
# Bytes of a row that one step of the product over the head dim takes.
STEP_BYTES = 128


def _pieces(count: int, wanted: int) -> tuple[int, int]:
    """(pieces, length of each): ``count`` in at most ``wanted`` pieces."""
    step = cdiv(max(count, 1), max(min(wanted, count), 1))
    return cdiv(max(count, 1), step), step


def attention_dbias(problem, dout, statistics):
    """The gradient (as bias, contiguous) for the call ``problem`` describes."""
    bias = problem.bias
    if bias.numel() == 0:
        return bias.new_empty(bias.shape)
    tile, options = problem.launch_of("attention_dbias", dbias_tile(problem.q.dtype, problem.arch))
    b, heads, rows, cols = bias.shape
    over = Broadcast(b == 1, heads == 1, rows == 1, cols == 1)
    row_tiles, col_tiles = cdiv(rows, tile.block_m), cdiv(cols, tile.block_n)
    programs = b * heads * row_tiles * col_tiles
    # A bias of its own for each element of the batch is cut as one alone would be: the pieces order its sums.
    wanted = PROGRAMS // (programs // b)
    batches, batch_step = _pieces(problem.batch, wanted if over.batch else 1)
    members, head_step = _pieces(problem.heads, wanted // batches if over.head else 1)
    parts, row_step = _pieces(cdiv(problem.rows, tile.block_m), wanted // (batches * members) if over.row else 1)
    grid = BiasGrid(
        planes=b * heads,
        heads=heads,
        rows=rows,
        cols=cols,
        row_tiles=row_tiles,
        col_tiles=col_tiles,
        batch_pieces=batches,
        batch_step=batch_step,
        head_pieces=members,
        head_step=head_step,
        row_step=row_step * tile.block_m,
    )
    pieces = batches * members * parts
    dbias = bias.new_empty((pieces, *bias.shape), dtype=bias.dtype if pieces == 1 else torch.float32)
    step = STEP_BYTES // problem.q.element_size()
    _attention_dbias_kernel[(programs * pieces,)](
        *map(problem.plane, (problem.q, problem.k, problem.v, dout)), dbias, statistics, problem.score,
        problem.dropout, problem.sizes, grid, over=over, flags=problem.flags(dout), tile=tile,
        STEP=min(step, tile.block_d), STEP_V=min(step, tile.block_dv), **options,
    )  # fmt: skip
    return dbias[0] if pieces == 1 else dbias.sum(0).to(bias.dtype)
