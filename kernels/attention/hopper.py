"""Attention forward for Hopper (sm_90), in Gluon: plain dense and packed attention in fp16 and bf16.

It has never run on a GPU. What is known of it: it compiles for sm_90 without spills, and its source gives the right
results in an emulator of barriers, copies and asynchronous products (tests/kernels/test_attention_hopper.py). It
serves only those who ask for the backend ``hopper``.

After FlashAttention-3 (Shah et al. 2024): persistent programs of a copying warp and two warpgroups of 64 query rows
each, a ring of key and value tiles in shared memory, scores of the next tile issued before the product of this one,
warpgroups that take turns. kernels/attention/hopper_warps.py has the parts.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..launch import cdiv, launch_options, processor_count
from .decode import splits
from .forward import attention_fwd
from .hopper_warps import ROWS, HopperMode, HopperResults, HopperWork, Ring, consume, produce
from .problem import Problem

# Head dim -> columns of a step, buffers of each ring: 96 and 176 KB of shared memory, and no spills with Triton 3.6 and
# 3.9, which 128 columns at head dim 128 have. Not timed yet.
SETTINGS = {
    64: dict(BLOCK_N=128, STAGES=2, PING_PONG=True),
    128: dict(BLOCK_N=64, STAGES=4, PING_PONG=True),
}
# Bytes of keys and values that programs side by side may hold in the L2 cache (50 MB on an H100 or H200). A guess.
L2 = 32 << 20


@gluon.jit
def barriers(n: gl.constexpr, readers: gl.constexpr):
    """(full, empty) barriers of ``n`` buffers, which ``readers`` partitions empty."""
    full = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=readers)
    return full, empty


@gluon.jit
def _attention_hopper_fwd_kernel(q_desc, k_desc, v_desc, results, work, sizes, unit, mode: gl.constexpr):
    DIM: gl.constexpr = mode.dim
    STAGES: gl.constexpr = mode.stages
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, ROWS, DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, mode.block_n, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, mode.block_n, DIM], v_desc.layout)
    q_full, q_empty = barriers(2, 1)
    k_full, k_empty = barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 2)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    descs = (q_desc, k_desc, v_desc)
    q = Ring(q_smem, q_full, q_empty)
    k = Ring(k_smem, k_full, k_empty)
    v = Ring(v_smem, v_full, v_empty)
    gl.warp_specialize(
        [
            (consume, (q, k, v, turns, work, sizes, results, unit, 0, mode)),
            (consume, (q, k, v, turns, work, sizes, results, unit, 1, mode)),
            (produce, (descs, q, k, v, work, sizes, mode)),
        ],
        [4, 1],
        # Of 168 registers a thread at the start: with fewer than 40 for the copying warp, ptxas spills what all share.
        [232, 40],
    )


def feature_refuses(problem: Problem) -> str | None:
    """Why neither Hopper kernel, forward or backward, takes a call, however its tensors lie; None if they can."""
    score = problem.score
    if problem.natural or problem.dropout is not None or score.left is not None or score.right not in (None, 0):
        return "it has a feature besides the causal mask"
    if problem.q.dtype not in (torch.float16, torch.bfloat16):
        return "it is not in fp16 or bf16"
    if problem.dim != problem.dim_v or problem.dim not in SETTINGS:
        return "its head dims are not both 64 or both 128"
    if problem.arch != 90:
        return "the GPU is not of sm_90"
    if 0 in (problem.rows, problem.cols, problem.batch):
        return "it is empty"
    # The rows of all packed sequences are those of one tensor.
    batch = 1 if problem.packed else problem.batch
    if max(batch * problem.rows, batch * problem.cols, batch * problem.heads * -(-problem.rows // 128)) >= 2**31 - 128:
        return "it has too many rows for the copy engine's coordinates"
    return None


def hopper_refuses(problem: Problem, out: torch.Tensor) -> str | None:
    """Why this kernel cannot take a call, which is then the portable kernel's; None if it can."""
    if (why := feature_refuses(problem)) is not None:
        return why
    if not problem.packed and splits(problem) is not None:
        return "it has few queries for many keys"
    if not out.is_contiguous() and not out.transpose(1, 2).is_contiguous():
        return "its output is not laid out token by token"
    return next((why for x in (problem.q, problem.k, problem.v) if (why := uncopyable(problem, x))), None)


def uncopyable(problem: Problem, x: torch.Tensor) -> str | None:
    """Why the tensor memory accelerator cannot read ``x``: it wants a last stride of 1 and multiples of 16 bytes."""
    *outer, inner = problem.strides(x)
    size = x.element_size()
    if inner != 1 or x.data_ptr() % 16 or any(n * size % 16 for n in outer):
        return "its tensors do not lie at multiples of 16 bytes"
    if any(stride <= 0 or stride * size >= 2**40 for stride, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        return "its tensors are expanded, or too far apart"
    return None


def descriptor(problem: Problem, x: torch.Tensor, rows: int) -> TensorDescriptor:
    """``x`` as (B, H, S, D), packed (1, H, total, D), copied ``rows`` rows of one plane at a time."""
    shape = [1, x.shape[1], x.shape[0], x.shape[2]] if problem.packed else list(x.shape)
    # A stride along a dimension of one element is never used, and must be a legal one.
    strides = [s if n > 1 else x.shape[-1] for s, n in zip(problem.strides(x), shape, strict=True)]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    block = [1, 1, rows, x.shape[-1]]
    return TensorDescriptor(x, shape, [*strides[:3], 1], block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def attention_hopper_fwd(call, out):
    """As forward.attention_fwd, which serves the calls that :func:`hopper_refuses` gives a reason against."""
    problem = Problem(call)
    if hopper_refuses(problem, out) is not None:
        return attention_fwd(call, out)
    lse, stats = problem.new_statistics()
    _launch(problem, HopperResults(out, lse, stats))
    return lse, stats


def _launch(problem: Problem, results: HopperResults) -> None:
    setting = SETTINGS[problem.dim]
    tiles, slots = problem.programs(2 * ROWS.value, problem.rows)
    planes = problem.heads if problem.packed else problem.batch * problem.heads
    if problem.packed:
        tiles = slots
    causal = problem.score.right is not None
    held = 2 * problem.cols * problem.dim * problem.q.element_size()
    # Without a causal mask all tiles are alike: those of one head are side by side.
    bits = (min(planes, problem.group * max(1, L2 // held)) - 1).bit_length() if causal else 0
    items = tiles * (cdiv(planes, 1 << bits) << bits)
    programs = min(items, processor_count(problem.q.device))
    work = HopperWork(cdiv(items, programs), items, tiles, planes, bits)
    mode = HopperMode(
        packed=problem.packed,
        causal=causal,
        bottom_right=problem.bottom_right,
        ping_pong=setting["PING_PONG"],
        block_n=setting["BLOCK_N"],
        dim=problem.dim,
        stages=setting["STAGES"],
    )
    _attention_hopper_fwd_kernel[(programs,)](
        descriptor(problem, problem.q, ROWS.value),
        *(descriptor(problem, x, mode.block_n) for x in (problem.k, problem.v)),
        results, work, problem.sizes, float(problem.score.unit), mode=mode,
        **launch_options(problem.q.device, num_warps=4),
    )  # fmt: skip
