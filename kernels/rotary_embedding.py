"""Rotary position embedding of queries and keys: every pair (a, b) of features turned by its position's angle.

    a' = a cos - b sin,   b' = b cos + a sin

Pairs are (i, i + half), or (2 i, 2 i + 1) where interleaved; features past 2 half are copied. A program takes the
cosines and sines of some positions into registers and then the rows of one head after another, queries and keys alike,
so that every tensor is read or written once. The gradient is the same with the angles' sign turned.
"""

import triton
import triton.language as tl

from .launch import OPTIONS, next_power_of_2

# Features to a program: 16 to a thread of 4 warps, as two times 16 bytes. From compiled register counts, not timings.
TILE = 2048
# Programs below which the heads are divided further.
PROGRAMS = 1024


@triton.jit
def _turn(
    x_ptr, y_ptr, x_at, y_at, in_rows, cos, sin, half: tl.constexpr, rest: tl.constexpr,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """The rows at ``x_at`` to ``y_at``, both (BLOCK_M,); cos and sin (BLOCK_M, HALF)."""
    x_ptr += x_at[:, None]
    y_ptr += y_at[:, None]
    if INTERLEAVED:
        cols = tl.arange(0, 2 * HALF)[None, :]
        mask = in_rows[:, None] & (cols < 2 * half)
        x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (x.shape[0], HALF, 2)))
        y = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (x.shape[0], 2 * HALF))
        tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        cols = tl.arange(0, HALF)[None, :]
        mask = in_rows[:, None] & (cols < half)
        a = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + half + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + cols, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_ptr + half + cols, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        cols = tl.arange(0, REST)[None, :]
        mask = in_rows[:, None] & (cols < rest)
        tl.store(y_ptr + 2 * half + cols, tl.load(x_ptr + 2 * half + cols, mask=mask), mask=mask)


@triton.jit
def _rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, ids_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_qob, stride_qoh, stride_qos, stride_kob, stride_koh, stride_kos,
    stride_cb, stride_cp, stride_cc, stride_sb, stride_sp, stride_sc, stride_ib, stride_is,
    length, heads_q, heads_k, heads_each, table_rows, offset,
    half: tl.constexpr, rest: tl.constexpr, HAS_IDS: tl.constexpr, HAS_KEY: tl.constexpr,
    INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length, BLOCK_M)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    s = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = s < length
    if HAS_IDS:
        position = tl.load(ids_ptr + batch * stride_ib + s * stride_is, mask=in_rows, other=0).to(tl.int64)
    else:
        position = s + offset
    known = (position >= 0) & (position < table_rows)
    tl.device_assert(known | ~in_rows, "rotary_embedding: a position is not in [0, rows of cos)")
    cols = tl.arange(0, HALF).to(tl.int64)[None, :]
    # Where asserts are compiled out, an unknown position shows as NaN.
    mask = known[:, None] & (cols < half)
    c_at = batch * stride_cb + position[:, None] * stride_cp + cols * stride_cc
    s_at = batch * stride_sb + position[:, None] * stride_sp + cols * stride_sc
    cos = tl.load(cos_ptr + c_at, mask=mask, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + s_at, mask=mask, other=float("nan")).to(tl.float32)
    if INVERSE:
        sin = -sin
    first = tl.program_id(1) * heads_each
    last = first + heads_each
    x_at, y_at = batch * stride_qb + s * stride_qs, batch * stride_qob + s * stride_qos
    for head in range(first, tl.minimum(last, heads_q)):
        h = tl.cast(head, tl.int64)
        _turn(
            q_ptr, q_out_ptr, x_at + h * stride_qh, y_at + h * stride_qoh, in_rows, cos, sin, half, rest,
            INTERLEAVED, HALF, REST,
        )  # fmt: skip
    if HAS_KEY:
        x_at, y_at = batch * stride_kb + s * stride_ks, batch * stride_kob + s * stride_kos
        for head in range(tl.maximum(first - heads_q, 0), tl.minimum(last - heads_q, heads_k)):
            h = tl.cast(head, tl.int64)
            _turn(
                k_ptr, k_out_ptr, x_at + h * stride_kh, y_at + h * stride_koh, in_rows, cos, sin, half, rest,
                INTERLEAVED, HALF, REST,
            )  # fmt: skip


def rotary(query, key, query_out, key_out, cos, sin, position_ids, offset: int, interleaved: bool, inverse: bool):
    """Write the rotated ``query`` and ``key`` to ``query_out`` and ``key_out``.

    Args:
        query, key: (B, H, S, D), any strides; H may differ. key may be None.
        query_out, key_out: of their shapes, the features side by side.
        cos, sin: (P, half) or (B, P, half), any strides.
        position_ids: (S,) or (B, S) integers, the rows of the tables; or None for ``offset`` onwards.
        inverse: turn the other way, as the gradient does.
    """
    tensors = [query] if key is None else [query, key]
    outs = [query_out, key_out][: len(tensors)]
    if query.numel() + (0 if key is None else key.numel()):
        tensors = [t if t.stride(3) == 1 else t.contiguous() for t in tensors]
        batch, _, length, width = query.shape
        heads = [t.shape[1] for t in tensors]
        half = cos.shape[-1]
        rest = width - 2 * half
        block_half = next_power_of_2(half)
        block_m = max(1, min(TILE // next_power_of_2(width), next_power_of_2(length), 32))
        blocks = batch * triton.cdiv(length, block_m)
        groups = min(sum(heads), max(1, triton.cdiv(PROGRAMS, blocks)))
        heads_each = triton.cdiv(sum(heads), groups)
        tables = [t if t.dim() == 3 else t.expand(batch, *t.shape) for t in (cos, sin)]
        ids = None if position_ids is None else position_ids.expand(batch, length)
        strides = [n for t in (*tensors, *outs) for n in t.stride()[:3]]
        if key is None:
            strides = [*strides[:3], 0, 0, 0, *strides[3:], 0, 0, 0]
        # Asserts are compiled in for ids alone; the integer arithmetic needs none of the overflow checks.
        asserts = dict(debug=True, sanitize_overflow=False) if query.is_cuda and ids is not None else {}
        _rotary_kernel[(blocks, triton.cdiv(sum(heads), heads_each))](
            tensors[0], None if key is None else tensors[1], outs[0], None if key is None else outs[1], *tables, ids,
            *strides, *tables[0].stride(), *tables[1].stride(), *((0, 0) if ids is None else ids.stride()),
            length, heads[0], 0 if key is None else heads[1], heads_each, cos.shape[-2], offset,
            half=half, rest=rest, HAS_IDS=ids is not None, HAS_KEY=key is not None,
            INVERSE=inverse, INTERLEAVED=interleaved,
            BLOCK_M=block_m, HALF=block_half, REST=next_power_of_2(rest) if rest else 0,
            num_warps=max(1, min(8, block_m * next_power_of_2(width) // 512)), **OPTIONS, **asserts,
        )  # fmt: skip
