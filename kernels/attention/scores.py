"""What the attention kernels do alike: which rows a program owns, scores with every feature, dropout, visible ranges.

A score in the kernels' units is t, and a probability is exp2((t - m) * unit - log2 l). With nothing but a positive
scale, t is the raw dot product and ``unit`` = scale * log2(e), so that a score costs one multiply-add. With any other
feature (``natural``) t is the logit itself and ``unit`` = log2(e).

Row i of the queries and column j of the keys meet at j - i = offset, the diagonal: offset = Sk - Sq (bottom-right), or
0 (top-left). Column j is visible if i + offset - left <= j <= i + offset + right.

Rows and columns count from the start of their sequence. Where sequences are packed, cu_seqlens gives the starts;
program t of the row tiles belongs to the last sequence b with cu[b] // BLOCK + b <= t. That leaves each sequence
ceil(length / BLOCK) tiles or one more, without knowing any length on the host.
"""

import triton
import triton.language as tl

from ..launch import keyed
from ..math import is_kept, tanh
from .values import Matrix, Sheet

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(program, cu_ptr, cu_other_ptr, n_tiles, length, length_other, n_seqs, BLOCK: tl.constexpr):
    """(sequence, tile in it, start, length, start of the other side, its length) of a program over (sequence, tile)."""
    if cu_ptr is not None:
        low = program * 0
        high = low + n_seqs
        while high - low > 1:
            middle = (low + high) // 2
            if tl.load(cu_ptr + middle).to(tl.int64) // BLOCK + middle <= program:
                low = middle
            else:
                high = middle
        start = tl.load(cu_ptr + low).to(tl.int64)
        start_other = tl.load(cu_other_ptr + low).to(tl.int64)
        tile = (program - start // BLOCK - low).to(tl.int32)
        seq_length = (tl.load(cu_ptr + low + 1).to(tl.int64) - start).to(tl.int32)
        seq_other = (tl.load(cu_other_ptr + low + 1).to(tl.int64) - start_other).to(tl.int32)
        return low.to(tl.int64), tile, start, seq_length, start_other, seq_other
    else:
        seq = (program // n_tiles).to(tl.int64)
        zero = (program * 0).to(tl.int64)
        return seq, (program % n_tiles).to(tl.int32), zero, length, zero, length_other


@triton.jit
def span_of(b, sizes):
    """(start_q, n_rows, start_k, n_cols) of sequence ``b``."""
    if sizes.cu_q is not None:
        start_q = tl.load(sizes.cu_q + b).to(tl.int64)
        start_k = tl.load(sizes.cu_k + b).to(tl.int64)
        n_rows = (tl.load(sizes.cu_q + b + 1).to(tl.int64) - start_q).to(tl.int32)
        n_cols = (tl.load(sizes.cu_k + b + 1).to(tl.int64) - start_k).to(tl.int32)
        return start_q, n_rows, start_k, n_cols
    else:
        return 0, sizes.rows, 0, sizes.cols


@triton.jit
def matrix_of(plane, b, head, start, dim, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """The plane (b, head) from row ``start`` on. Strides are multiples of ALIGN, which Triton cannot know."""
    row = plane.row // ALIGN * ALIGN
    ptr = plane.ptr + b * (plane.batch // ALIGN * ALIGN) + head * (plane.head // ALIGN * ALIGN) + start * row
    columns = tl.arange(0, BLOCK).to(tl.int64)
    return Matrix(ptr, row, plane.col, columns, dim // ALIGN * ALIGN, b, head)


@triton.jit
def tile_at(matrix, rows, in_rows):
    """(pointers, mask) of the tile of ``rows`` and all columns."""
    at = rows.to(tl.int64)[:, None] * matrix.row + matrix.columns[None, :] * matrix.col
    return matrix.ptr + at, in_rows[:, None] & (matrix.columns < matrix.dim)[None, :]


@triton.jit
def load_tile(matrix, rows, in_rows):
    """The tile at :func:`tile_at`, 0 outside."""
    at, inside = tile_at(matrix, rows, in_rows)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def step_tile(desc, matrix, first, rows, n_rows):
    """The tile of ``rows``, from ``first`` on: a bulk copy where there is a descriptor, else :func:`load_tile`."""
    if desc is None:
        return load_tile(matrix, rows, rows < n_rows)
    else:
        tile = desc.load([matrix.batch.to(tl.int32), matrix.head.to(tl.int32), first, 0])
        return tl.reshape(tile, (rows.shape[0], matrix.columns.shape[0]))


@triton.jit
def store_tile(matrix, tile, rows, in_rows):
    """Stores ``tile`` in the matrix's dtype."""
    at, inside = tile_at(matrix, rows, in_rows)
    tl.store(at, tile.to(matrix.ptr.dtype.element_ty), mask=inside)


@triton.jit
def first_number(dropout, b, heads):
    """The number of the sheet of head 0 of sequence ``b``, counted from the seed's first."""
    number = tl.cast(b, tl.int64) * heads
    if dropout is not None:
        number += tl.load(dropout.seed + 1)
    return number


@triton.jit
def sheet_of(b, head, n_rows, n_cols, score, seed, number, BOTTOM_RIGHT: tl.constexpr):
    """The sheet of (b, head); several, along the first dimension, where ``head`` is (rows, 1).

    ``number`` is of b's first sheet.
    """
    offset = n_cols - n_rows if BOTTOM_RIGHT else 0
    slope = 0.0
    if score.slopes is not None:
        slope = tl.load(score.slopes + b * score.slopes_batch + head * score.slopes_head).to(tl.float32)
    bias = 0
    if score.bias is not None:
        bias = score.bias + b * score.bias_batch + head * score.bias_head
    return Sheet(n_rows, n_cols, offset, number + head, slope, bias, seed)


@triton.jit
def scores(dot, rows, cols, sheet, score, flags: tl.constexpr, MASKED: tl.constexpr):
    """(t, 1 - tanh^2 of the soft cap or 1): ``dot`` with every feature. ``rows`` and ``cols`` broadcast to it."""
    t = dot
    slack = 1.0
    if flags.natural:
        t = t * score.scale
    if score.softcap is not None:
        capped = tanh(t / score.softcap)
        slack = 1.0 - capped * capped
        t = score.softcap * capped
    if score.slopes is not None:
        t -= sheet.slope * tl.abs(rows + sheet.offset - cols).to(tl.float32)
    if score.bias is not None:
        inside = (rows < sheet.n_rows) & (cols < sheet.n_cols)
        at = rows.to(tl.int64) * score.bias_row + cols.to(tl.int64) * score.bias_col
        if flags.mask:
            t = tl.where(tl.load(sheet.bias + at, mask=inside, other=0) != 0, t, float("-inf"))
        else:
            t += tl.load(sheet.bias + at, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        visible = (cols < sheet.n_cols) & (rows < sheet.n_rows)
        if score.right is not None:
            visible = visible & (cols <= rows + (sheet.offset + score.right))
        if score.left is not None:
            visible = visible & (cols >= rows + (sheet.offset - score.left))
        t = tl.where(visible, t, float("-inf"))
    elif flags.natural and score.slopes is None and score.bias is None:
        # Here t is a product, which the compiler would fuse with the difference that follows, but for the select above:
        # a score would owe its last bit to whether the other rows of the tile see its column.
        t = tl.where(cols < sheet.n_cols, t, float("-inf"))
    return t, slack


@triton.jit
def probabilities(t, row_max, row_log2, unit, EXACT: tl.constexpr):
    """exp2((t - row_max) * unit - row_log2). Rows without a visible column have row_log2 = inf: 0.

    EXACT subtracts first: the error then grows with t - row_max and not with t, and logits near the least float32
    (masks written as finfo.min) do not lose row_log2. Otherwise one multiply-add.
    """
    if EXACT:
        return tl.exp2((t - row_max) * unit - row_log2)
    return tl.exp2(t * unit - (row_max * unit + row_log2))


@triton.jit
def kept(seed, number, rows, start, threshold, BLOCK_N: tl.constexpr):
    """Which of the columns start .. start + BLOCK_N of ``rows`` dropout keeps, in the sheet of ``number``."""
    return is_kept(seed, rows, number.to(tl.uint32), start, threshold, BLOCK_N)


@triton.jit
def column_range(first, last, n_cols, offset, left, right, BLOCK_N: tl.constexpr):
    """Bounds of three runs of column tiles for the rows first .. last: edge, all visible, edge."""
    low = first * 0
    high = n_cols
    full_low = low
    full_high = n_cols
    if left is not None:
        low = tl.maximum(first + offset - left, 0)
        full_low = tl.maximum(last + offset - left, 0)
    if right is not None:
        high = tl.minimum(n_cols, tl.maximum(last + offset + right + 1, 0))
        full_high = tl.minimum(n_cols, tl.maximum(first + offset + right + 1, 0))
    begin = low // BLOCK_N * BLOCK_N
    end = tl.maximum(high, begin)
    full_begin = tl.minimum((full_low + BLOCK_N - 1) // BLOCK_N * BLOCK_N, end)
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(tl.minimum(full_high // BLOCK_N * BLOCK_N, end), full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def row_range(first, last, n_rows, n_cols, offset, score, BLOCK_M: tl.constexpr):
    """The same for row tiles, seen from the columns first .. last; where last lies past n_cols every tile is edge.

    Rows past n_rows need no edge: their row_log2 is inf. Without a left bound the third run is empty.
    """
    low = first * 0
    high = n_rows
    full_low = low
    full_high = n_rows
    if score.right is not None:
        low = tl.maximum(first - offset - score.right, 0)
        full_low = tl.maximum(last - offset - score.right, 0)
    if score.left is not None:
        high = tl.minimum(n_rows, tl.maximum(last - offset + score.left + 1, 0))
        full_high = tl.minimum(n_rows, tl.maximum(first - offset + score.left + 1, 0))
    begin = low // BLOCK_M * BLOCK_M
    end = tl.maximum(high, begin)
    full_begin = tl.maximum(tl.minimum((full_low + BLOCK_M - 1) // BLOCK_M * BLOCK_M, end), begin)
    full_end = end
    if score.left is not None:
        full_end = tl.maximum(tl.minimum(full_high // BLOCK_M * BLOCK_M, end), full_begin)
    if last >= n_cols:
        full_begin = end
        full_end = end
    return begin, full_begin, full_end, end


keyed(scores)
