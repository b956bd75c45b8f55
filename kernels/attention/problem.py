"""What the attention kernels share: which rows a program owns, scores with every feature, dropout, visible ranges.

A score in the kernels' units is t, and a probability is exp2((t - m) * unit - log2 l). With nothing but a positive
scale, t is the raw dot product and ``unit`` = scale * log2(e), so that a score costs one multiply-add. With any other
feature (NATURAL) t is the logit itself and ``unit`` = log2(e).

Row i of the queries and column j of the keys meet at j - i = offset, the diagonal: offset = Sk - Sq (bottom-right), or
0 (top-left). Column j is visible if i + offset - left <= j <= i + offset + right.

Rows and columns count from the start of their sequence. Where sequences are packed (PACKED), cu_seqlens gives the
starts; program t of the row tiles belongs to the last sequence b with cu[b] // BLOCK + b <= t. That leaves each
sequence ceil(length / BLOCK) tiles or one more, without knowing any length on the host.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(
    program, cu_ptr, cu_other_ptr, n_tiles, length, length_other, n_seqs,
    BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """(sequence, tile in it, start, length, start of the other side, its length) of a program over (sequence, tile)."""
    if PACKED:
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
def plane_of(ptr, b, head, start, stride_b, stride_h, stride_m, ALIGN: tl.constexpr):
    """Where row ``start`` of plane (b, head) begins. Strides are multiples of ALIGN, which Triton cannot know."""
    stride_b = stride_b // ALIGN * ALIGN
    stride_h = stride_h // ALIGN * ALIGN
    return ptr + b * stride_b + head * stride_h + start * (stride_m // ALIGN * ALIGN)


@triton.jit
def tile_at(ptr, rows, in_rows, stride_m, d, stride_d, dim, ALIGN: tl.constexpr):
    """(pointers, mask) of a tile of rows of a plane and the columns ``d`` < ``dim``."""
    at = rows.to(tl.int64)[:, None] * (stride_m // ALIGN * ALIGN) + d[None, :] * stride_d
    return ptr + at, in_rows[:, None] & (d < dim // ALIGN * ALIGN)[None, :]


@triton.jit
def load_tile(ptr, rows, in_rows, stride_m, d, stride_d, dim, ALIGN: tl.constexpr):
    """The tile at :func:`tile_at`, 0 outside."""
    at, inside = tile_at(ptr, rows, in_rows, stride_m, d, stride_d, dim, ALIGN=ALIGN)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def step_tile(desc, b, head, first, ptr, rows, n_rows, stride_m, d, stride_d, dim, ALIGN: tl.constexpr):
    """The tile of ``rows``, from ``first`` on: a bulk copy where there is a descriptor, else :func:`load_tile`."""
    if desc is None:
        return load_tile(ptr, rows, rows < n_rows, stride_m, d, stride_d, dim, ALIGN=ALIGN)
    else:
        tile = desc.load([b.to(tl.int32), head.to(tl.int32), first, 0])
        return tl.reshape(tile, (rows.shape[0], d.shape[0]))


@triton.jit
def store_tile(ptr, tile, rows, in_rows, stride_m, d, stride_d, dim, ALIGN: tl.constexpr):
    """Stores ``tile`` in ptr's dtype."""
    at, inside = tile_at(ptr, rows, in_rows, stride_m, d, stride_d, dim, ALIGN=ALIGN)
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def tanh(x):
    """A rational function near 0 (continued fraction, error below 1e-9 for |x| < 1), exponentials beyond."""
    square = x * x
    near = (
        x * (135135.0 + square * (17325.0 + square * (378.0 + square)))
        / (135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0)))
    )  # fmt: skip
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 1.0, near, tl.where(x < 0.0, -far, far))


@triton.jit
def scores(
    dot, rows, cols, n_rows, n_cols, bias_ptr, stride_bm, stride_bn, slope, scale, softcap, offset, left, right,
    NATURAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(t, 1 - tanh^2 of the soft cap or 1): ``dot`` with every feature. ``rows`` and ``cols`` broadcast to it."""
    t = dot
    slack = 1.0
    if NATURAL:
        t = t * scale
    if SOFTCAP:
        capped = tanh(t / softcap)
        slack = 1.0 - capped * capped
        t = softcap * capped
    if ALIBI:
        t -= slope * tl.abs(rows + offset - cols).to(tl.float32)
    if BIAS == 1:
        inside = (rows < n_rows) & (cols < n_cols)
        at = rows.to(tl.int64) * stride_bm + cols.to(tl.int64) * stride_bn
        t += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS == 2:
        inside = (rows < n_rows) & (cols < n_cols)
        at = rows.to(tl.int64) * stride_bm + cols.to(tl.int64) * stride_bn
        t = tl.where(tl.load(bias_ptr + at, mask=inside, other=0) != 0, t, float("-inf"))
    if MASKED:
        visible = (cols < n_cols) & (rows < n_rows)
        if RIGHT:
            visible = visible & (cols <= rows + (offset + right))
        if LEFT:
            visible = visible & (cols >= rows + (offset - left))
        t = tl.where(visible, t, float("-inf"))
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
def kept(seed, plane, rows, start, threshold, BLOCK_N: tl.constexpr):
    """Which of the columns start .. start + BLOCK_N of ``rows`` dropout keeps, (rows, BLOCK_N).

    Philox-4x32-10 with the 64-bit key ``seed`` and the counter (column // 4, row, plane, 0), where plane = batch *
    heads + head; column % 4 picks the word, which is kept if >= threshold = p * 2^32.
    """
    groups = start // 4 + tl.arange(0, BLOCK_N // 4)
    zero = rows[:, None] * 0 + groups[None, :] * 0
    c0 = (zero + groups[None, :]).to(tl.uint32)
    c1 = (zero + rows[:, None]).to(tl.uint32)
    c2 = (zero + plane).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, zero.to(tl.uint32), 10)
    limit = threshold.to(tl.uint32)
    even = tl.join((w0 >= limit).to(tl.int8), (w2 >= limit).to(tl.int8))
    odd = tl.join((w1 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (rows.shape[0], BLOCK_N)) != 0


@triton.jit
def column_range(
    first, last, n_cols, offset, left, right,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Bounds of three runs of column tiles for the rows first .. last: edge, all visible, edge."""
    low = first * 0
    high = n_cols
    full_low = low
    full_high = n_cols
    if LEFT:
        low = tl.maximum(first + offset - left, 0)
        full_low = tl.maximum(last + offset - left, 0)
    if RIGHT:
        high = tl.minimum(n_cols, tl.maximum(last + offset + right + 1, 0))
        full_high = tl.minimum(n_cols, tl.maximum(first + offset + right + 1, 0))
    begin = low // BLOCK_N * BLOCK_N
    end = tl.maximum(high, begin)
    full_begin = tl.minimum((full_low + BLOCK_N - 1) // BLOCK_N * BLOCK_N, end)
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(tl.minimum(full_high // BLOCK_N * BLOCK_N, end), full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def row_range(
    first, last, n_rows, n_cols, offset, left, right,
    BLOCK_M: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """The same for row tiles, seen from the columns first .. last; where last lies past n_cols every tile is edge.

    Rows past n_rows need no edge: their row_log2 is inf. Without LEFT the third run is empty.
    """
    low = first * 0
    high = n_rows
    full_low = low
    full_high = n_rows
    if RIGHT:
        low = tl.maximum(first - offset - right, 0)
        full_low = tl.maximum(last - offset - right, 0)
    if LEFT:
        high = tl.minimum(n_rows, tl.maximum(last - offset + left + 1, 0))
        full_high = tl.minimum(n_rows, tl.maximum(first - offset + left + 1, 0))
    begin = low // BLOCK_M * BLOCK_M
    end = tl.maximum(high, begin)
    full_begin = tl.maximum(tl.minimum((full_low + BLOCK_M - 1) // BLOCK_M * BLOCK_M, end), begin)
    full_end = end
    if LEFT:
        full_end = tl.maximum(tl.minimum(full_high // BLOCK_M * BLOCK_M, end), full_begin)
    if last >= n_cols:
        full_begin = end
        full_end = end
    return begin, full_begin, full_end, end


def bulk_copies(arch: int, dtype: torch.dtype) -> bool:
    """Whether the kernels bring a dense tensor's tiles by bulk copies (TMA): sm_90 and sm_100, for matrix units."""
    return 90 <= arch < 120 and dtype != torch.float32


class Problem:
    """One attention call as the launchers see it: sizes, strides and flags derived once.

    Dense tensors are (B, H, S, D); packed ones (total, H, D), whose batch stride is 0 and whose starts come from
    cu_seqlens. ``left`` and ``right`` < 0 mean unbounded.
    """

    def __init__(self, q, k, v, bias, sinks, alibi_slopes, seed, cu_q, cu_k, scale, softcap, left, right,
                 bottom_right, dropout_p):  # fmt: skip
        self.packed = cu_q is not None
        self.q, self.k, self.v = q, k, v
        self.heads = q.shape[-2] if self.packed else q.shape[1]
        self.heads_kv = k.shape[-2] if self.packed else k.shape[1]
        self.group = self.heads // max(self.heads_kv, 1)
        self.batch = cu_q.numel() - 1 if self.packed else q.shape[0]
        self.rows = q.shape[0] if self.packed else q.shape[2]
        self.cols = k.shape[0] if self.packed else k.shape[2]
        self.dim, self.dim_v = q.shape[-1], v.shape[-1]
        self.bottom_right = bottom_right
        # Unused pointers still need a tensor: the kernel's flag keeps it from being read.
        self.cu = (cu_q, cu_k) if self.packed else (q, q)
        self.bias, self.sinks, self.slopes = bias, sinks, alibi_slopes
        self.seed = q if seed is None else seed
        natural = softcap > 0 or any(t is not None for t in (bias, sinks, alibi_slopes)) or not scale > 0
        self.scale, self.softcap = scale, softcap
        self.unit = LOG2E.value if natural else scale * LOG2E.value
        self.left, self.right = left, right
        self.threshold = min(int(dropout_p * 2**32), 2**32 - 1)
        self.keep_scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0
        bias_kind = 0 if bias is None else (2 if bias.dtype == torch.bool else 1)
        self.precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"
        self.flags = dict(
            PACKED=self.packed, NATURAL=natural, SOFTCAP=softcap > 0, ALIBI=alibi_slopes is not None, BIAS=bias_kind,
            LEFT=left >= 0, RIGHT=right >= 0, BOTTOM_RIGHT=bottom_right, DROPOUT=dropout_p > 0,
            PRECISION=self.precision if q.dtype == torch.float32 else "ieee",
            EXACT=natural or q.dtype == torch.float32,
        )  # fmt: skip
        # What the launch tables ask for: the architecture, the wider padded head dim, and the load.
        self.arch = 90
        if q.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(q.device)
            self.arch = 10 * major + minor
        heavy = bias is not None or dropout_p > 0
        self.load = 2 if heavy else min(sum((left >= 0, softcap > 0, alibi_slopes is not None)), 2)
        if self.align() == 1:
            self.load = 3
        self.blocks = dict(BLOCK_D=max(16, next_power_of_2(self.dim)), BLOCK_DV=max(16, next_power_of_2(self.dim_v)))
        self.widest = max(self.blocks.values())

    def strides(self, x):
        """(batch, head, row, column) strides of a tensor shaped like q, k, v or the output."""
        return (0, x.stride(1), x.stride(0), x.stride(2)) if self.packed else x.stride()

    def align(self, *tensors) -> int:
        """The ALIGN of a kernel that takes q, k, v and ``tensors``: elements in 16 bytes, or 1.

        Triton tells of a size or stride only whether 16 divides it, which head dims of 40, 72 or 120 do not fulfil.
        """
        size = 16 // self.q.element_size()
        numbers = [self.dim, self.dim_v]
        for x in (self.q, self.k, self.v, *tensors):
            # Along a dimension of one there is no step, whatever its stride says.
            numbers += [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
        return 1 if any(n % size for n in numbers) else size

    def descriptors(self, x, y, rows: int, columns: int, columns_y: int):
        """Descriptors of two dense tensors that a kernel walks ``rows`` at a time, or (None, None).

        A bulk copy takes what lies at multiples of 16 bytes. Packed sequences are read by pointers: it would bring
        rows of the next one too, whose NaN times a weight of 0 is NaN.
        """
        arch, dtype = self.arch if self.q.device.type == "cuda" else 0, self.q.dtype
        if self.packed or not bulk_copies(arch, dtype) or self.align(x, y) == 1:
            return None, None
        both = []
        for tensor, width in ((x, columns), (y, columns_y)):
            # Any stride will do for a dimension of one; an expanded one has a stride of 0, which no copy takes.
            strides = [s if n > 1 else width for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
            if tensor.numel() == 0 or tensor.data_ptr() % 16 or tensor.stride(3) != 1 or min(strides[:3]) <= 0:
                return None, None
            both.append(TensorDescriptor(tensor, list(tensor.shape), [*strides[:3], 1], [1, 1, rows, width]))
        return both

    def stat_strides(self):
        """(batch, head) strides of a contiguous per-row tensor: (B, H, Sq), packed (H, total)."""
        return (0 if self.packed else self.heads * self.rows, self.rows)

    def bias_args(self):
        """The bias and its four strides, 0 where it is broadcast."""
        if self.bias is None:
            return self.q, 0, 0, 0, 0
        bias = self.bias.view(torch.uint8) if self.bias.dtype == torch.bool else self.bias
        return bias, *(0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True))

    def slope_args(self):
        """The ALiBi slopes and their (batch, head) strides."""
        if self.slopes is None:
            return self.q, 0, 0
        return self.slopes, self.slopes.stride(0) if self.slopes.dim() == 2 else 0, self.slopes.stride(-1)

    def feature_args(self):
        """What scores() and kept() need besides the tensors."""
        return self.scale, self.softcap, self.unit, self.left, self.right, self.seed, self.threshold

    def tiles(self, block: int, length: int) -> tuple[int, int]:
        """(tiles of one sequence, programs over all sequences); packed: their upper bound, see :func:`locate`."""
        tiles = triton.cdiv(length, block)
        return tiles, (length // block + self.batch if self.packed else tiles * self.batch)

    @staticmethod
    def fit(tile: dict, name: str, length: int) -> dict:
        """``tile`` with the side that is spread over programs no longer than ``length`` needs, and warps to match.

        The side that a program walks stays: it sets the order of the sums, which must not depend on the length.
        """
        size = min(tile[name], max(16, next_power_of_2(length)))
        warps = max(4, tile["num_warps"] * size // tile[name])
        return {**tile, name: size, "num_warps": min(tile["num_warps"], warps)}

    def stats_shape(self):
        return (self.heads, self.rows) if self.packed else (self.batch, self.heads, self.rows)
