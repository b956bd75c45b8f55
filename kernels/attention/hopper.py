"""Attention forward for Hopper (sm_90), in Gluon: plain dense and packed attention in fp16 and bf16.

It has never run on a GPU. What is known of it: it compiles for sm_90 without spills, and its source gives the right
results in an emulator of barriers, copies and asynchronous products (tests/kernels/test_attention_hopper.py). It
serves only those who ask for the backend ``hopper``.

After FlashAttention-3 (Shah et al. 2024): persistent programs of a copying warp and two warpgroups of 64 query rows
each, a ring of key and value tiles in shared memory, scores of the next tile issued before the product of this one,
warpgroups that take turns. kernels/attention/hopper_warps.py has the parts.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..launch import OPTIONS, processor_count
from . import forward as portable
from .decode import splits
from .hopper_warps import ROWS, consume, produce
from .problem import Problem

# Head dim -> columns of a step, buffers of each ring: 96 and 176 KB of shared memory, and no spills with Triton 3.6 and
# 3.9, which 128 columns at head dim 128 have. Not timed yet.
SETTINGS = {
    64: dict(BLOCK_N=128, STAGES=2, PING_PONG=True),
    128: dict(BLOCK_N=64, STAGES=4, PING_PONG=True),
}
# Bytes of keys and values that programs side by side may hold in the L2 cache (50 MB on an H100 or H200).
L2 = 32 << 20


@gluon.jit
def _barriers(n: gl.constexpr, readers: gl.constexpr):
    """(full, empty) barriers of ``n`` buffers, which ``readers`` partitions empty."""
    full = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=readers)
    return full, empty


@gluon.jit
def _attention_hopper_fwd_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, stats_ptr, cu_q_ptr, cu_k_ptr,
    n_items, n_tiles, planes, bits, n_seqs, heads, group, length_q, length_k, n_rounds, unit,
    PACKED: gl.constexpr, CAUSAL: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, PING_PONG: gl.constexpr,
    BLOCK_N: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, ROWS, DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, DIM], v_desc.layout)
    q_full, q_empty = _barriers(2, 1)
    k_full, k_empty = _barriers(STAGES, 2)
    v_full, v_empty = _barriers(STAGES, 2)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    descs = (q_desc, k_desc, v_desc)
    buffers = (q_smem, k_smem, v_smem)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    sizes = (n_rounds, n_items, n_tiles, planes, bits, n_seqs, heads, length_q, length_k)
    results = (out_ptr, lse_ptr, stats_ptr)
    gl.warp_specialize(
        [
            (consume, (
                buffers, bars, turns, sizes, cu_q_ptr, cu_k_ptr, results, unit,
                0, PACKED, CAUSAL, BOTTOM_RIGHT, PING_PONG, BLOCK_N, DIM, STAGES,
            )),
            (consume, (
                buffers, bars, turns, sizes, cu_q_ptr, cu_k_ptr, results, unit,
                1, PACKED, CAUSAL, BOTTOM_RIGHT, PING_PONG, BLOCK_N, DIM, STAGES,
            )),
            (produce, (
                descs, buffers, bars, sizes, group, cu_q_ptr, cu_k_ptr,
                PACKED, CAUSAL, BOTTOM_RIGHT, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        # Of 168 registers a thread at the start: with fewer than 40 for the copying warp, ptxas spills what all share.
        [232, 40],
    )  # fmt: skip


def refuses(problem: Problem, out: torch.Tensor) -> str | None:
    """Why this kernel cannot take a call, which is then the portable kernel's; None if it can."""
    flags = problem.flags
    if flags["NATURAL"] or flags["DROPOUT"] or flags["LEFT"] or problem.right > 0:
        return "it has a feature besides the causal mask"
    if problem.q.dtype not in (torch.float16, torch.bfloat16):
        return "it is not in fp16 or bf16"
    if problem.dim != problem.dim_v or problem.dim not in SETTINGS:
        return "its head dims are not both 64 or both 128"
    if problem.arch != 90:
        return "the GPU is not of sm_90"
    if 0 in (problem.rows, problem.cols, problem.batch):
        return "it is empty"
    if not problem.packed and splits(problem) is not None:
        return "it has few queries for many keys"
    # A batch of packed sequences counts once: its rows are those of one tensor.
    batch = 1 if problem.packed else problem.batch
    if max(batch * problem.rows, batch * problem.cols, batch * problem.heads * -(-problem.rows // 128)) >= 2**31 - 128:
        return "it has too many rows for the copy engine's coordinates"
    if not out.is_contiguous() and not out.transpose(1, 2).is_contiguous():
        return "its output is not laid out token by token"
    return next((why for x in (problem.q, problem.k, problem.v) if (why := _uncopyable(problem, x))), None)


def _uncopyable(problem: Problem, x: torch.Tensor) -> str | None:
    """Why the tensor memory accelerator cannot read ``x``: it wants a last stride of 1 and multiples of 16 bytes."""
    *outer, inner = problem.strides(x)
    size = x.element_size()
    if inner != 1 or x.data_ptr() % 16 or any(n * size % 16 for n in outer):
        return "its tensors do not lie at multiples of 16 bytes"
    if any(stride <= 0 or stride * size >= 2**40 for stride, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        return "its tensors are expanded, or too far apart"
    return None


def _descriptor(problem: Problem, x: torch.Tensor, rows: int) -> TensorDescriptor:
    """``x`` as (B, H, S, D), packed (1, H, total, D), copied ``rows`` rows of one plane at a time."""
    shape = [1, x.shape[1], x.shape[0], x.shape[2]] if problem.packed else list(x.shape)
    # A stride along a dimension of one element is never used, and must be a legal one.
    strides = [s if n > 1 else x.shape[-1] for s, n in zip(problem.strides(x), shape, strict=True)]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    block = [1, 1, rows, x.shape[-1]]
    return TensorDescriptor(x, shape, [*strides[:3], 1], block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def attention_fwd(q, k, v, bias, sinks, alibi_slopes, seed, cu_q, cu_k, scale, softcap, left, right, bottom_right,
                  dropout_p, out):  # fmt: skip
    """As attention.attention_fwd, which serves the calls that :func:`refuses` has a word against."""
    args = (q, k, v, bias, sinks, alibi_slopes, seed, cu_q, cu_k, scale, softcap, left, right, bottom_right, dropout_p)
    problem = Problem(*args)
    if refuses(problem, out) is not None:
        return portable.attention_fwd(*args, out)
    lse = q.new_empty(problem.stats_shape(), dtype=torch.float32)
    stats = q.new_empty((2, *problem.stats_shape()), dtype=torch.float32)
    if problem.packed:
        # Rows past the last sequence are nobody's; they count as rows that see nothing.
        lse.fill_(-torch.inf)
        stats[0].zero_()
        stats[1].fill_(torch.inf)
    _launch(problem, out, lse, stats)
    return lse, stats


def _launch(problem: Problem, out: torch.Tensor, lse: torch.Tensor, stats: torch.Tensor) -> None:
    setting = SETTINGS[problem.dim]
    n_tiles, slots = problem.tiles(2 * ROWS.value, problem.rows)
    planes = problem.heads if problem.packed else problem.batch * problem.heads
    if problem.packed:
        n_tiles = slots
    causal = problem.flags["RIGHT"]
    held = 2 * problem.cols * problem.dim * problem.q.element_size()
    # Without a causal mask all tiles are alike: those of one head are side by side.
    bits = (min(planes, problem.group * max(1, L2 // held)) - 1).bit_length() if causal else 0
    n_items = n_tiles * (triton.cdiv(planes, 1 << bits) << bits)
    programs = min(n_items, processor_count(problem.q.device))
    _attention_hopper_fwd_kernel[(programs,)](
        _descriptor(problem, problem.q, ROWS.value),
        *(_descriptor(problem, x, setting["BLOCK_N"]) for x in (problem.k, problem.v)),
        out, lse, stats, *problem.cu, n_items, n_tiles, planes, bits, problem.batch, problem.heads, problem.group,
        problem.rows, problem.cols, triton.cdiv(n_items, programs), float(problem.unit),
        PACKED=problem.packed, CAUSAL=causal, BOTTOM_RIGHT=problem.bottom_right, DIM=problem.dim,
        **setting, num_warps=4, **OPTIONS,
    )  # fmt: skip
