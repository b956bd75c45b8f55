"""Attention with random combinations of features and shapes against the fp64 definition.

30 draws; FASTLLM_TESTS=thorough draws 500. The definition replays
the dropout mask on the host, from the same seed.
"""

import pytest
import torch
from conftest import DEVICE
from contract import assert_as_true
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from thorough import IS_THOROUGH

import fastllm
from fastllm.functional import attention
from fastllm.kernels.attention import backward, decode, forward
from fastllm.kernels.attention import bias_gradient as dbias
from fastllm.ops.attention.attention import attention_reference

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

DRAWS = 500 if IS_THOROUGH else 30


@pytest.fixture(autouse=True, scope="module")
def _small_tiles():
    """16 x 16 tiles: short sequences then have edge tiles, inner tiles and tiles that no row sees."""
    tile = dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "forward_tile", lambda *_: tile)
        patch.setattr(backward, "dkdv_tile", lambda *_: tile)
        patch.setattr(backward, "dq_tile", lambda *_: tile)
        patch.setattr(dbias, "dbias_tile", lambda *_: tile)
        patch.setattr(dbias, "STEP_BYTES", 64)
        # About half of the calls are then split over the keys.
        patch.setattr(decode, "MOST_ROWS", 16)
        patch.setattr(decode, "split_tile", lambda *_: dict(tile, CHUNK=16, SPLIT_FROM=12))
        yield


def _shape(draw, batch, heads, rows, cols):
    return [n if draw(st.booleans()) else 1 for n in (batch, heads, rows, cols)]


@st.composite
def calls(draw):
    """(dtype, tensors by name, other arguments, which tensors need a gradient)"""
    length = st.integers(0, 24) if draw(st.integers(0, 9)) == 0 else st.integers(1, 24)
    packed = draw(st.booleans())
    heads_kv = draw(st.integers(1, 2))
    heads = heads_kv * draw(st.sampled_from([1, 1, 2, 3]))
    # The interpreter's time is the number of tiles.
    few = 1 + 4 // heads
    dim, dim_v = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def values(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    spec = dict(causal=draw(st.booleans()), return_lse=draw(st.booleans()))
    if packed:
        lengths = draw(st.lists(st.tuples(length, length), min_size=1, max_size=min(few, 3)))
        rows, cols = (sum(n) for n in zip(*lengths, strict=True))
        batch, full = len(lengths), [max(n) for n in zip(*lengths, strict=True)]
        starts = torch.tensor([(0, 0), *lengths], dtype=draw(st.sampled_from([torch.int32, torch.int64]))).cumsum(0)
        spec["cu_seqlens_q"], spec["cu_seqlens_k"] = starts[:, 0].to(DEVICE), starts[:, 1].to(DEVICE)
        tensors = dict(
            query=values(rows, heads, dim), key=values(cols, heads_kv, dim), value=values(cols, heads_kv, dim_v)
        )
    else:
        batch, full = draw(st.integers(1, min(few, 2))), [draw(length), draw(length)]
        tensors = dict(
            query=values(batch, heads, full[0], dim),
            key=values(batch, heads_kv, full[1], dim),
            value=values(batch, heads_kv, full[1], dim_v),
        )
    if draw(st.booleans()):
        side = st.none() | st.integers(0, 20)
        spec["window"] = (draw(side), draw(side))
    if draw(st.booleans()):
        spec["softcap"] = draw(st.sampled_from([0.5, 3.0, 30.0]))
    if draw(st.booleans()):
        spec["scale"] = draw(st.sampled_from([0.1, 1.0, -0.3, 0.0]))
    if draw(st.booleans()):
        shape = (batch, heads) if draw(st.booleans()) else (heads,)
        spec["alibi_slopes"] = (values(*shape).abs() * 0.2).to(DEVICE)
    if draw(st.booleans()):
        tensors["sinks"] = values(heads)
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    if kind != "none":
        shape = _shape(draw, batch, heads, *full)
        if packed:
            spec["max_seqlen_q"], spec["max_seqlen_k"] = full
        if kind == "bool":
            spec["bias"] = (torch.rand(shape, generator=generator) < 0.7).to(DEVICE)
        else:
            tensors["bias"] = values(*shape)
    if draw(st.booleans()):
        spec["dropout_p"] = draw(st.sampled_from([0.1, 0.5, 0.9]))
    needs = {name: draw(st.integers(0, 4)) > 0 for name in tensors}
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    tensors = {name: t.to(DEVICE, dtype) for name, t in tensors.items()}
    return dtype, tensors, spec, needs


def _run(function, tensors, spec, needs, dtype=None):
    leaves = {n: t.to(dtype or t.dtype, copy=True).requires_grad_(needs[n]) for n, t in tensors.items()}
    torch.manual_seed(7)
    result = function(**leaves, **spec)
    outs = list(result) if isinstance(result, tuple) else [result]
    wanted = [t for n, t in leaves.items() if needs[n]]
    if not wanted:
        return outs, []
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outs]
    # The definition's lse does not depend on the values.
    used, upstream = zip(*[(o, g) for o, g in zip(outs, grads, strict=True) if o.requires_grad], strict=True)
    # The gradient of lse at an empty row, where it is -inf, means nothing: it is passed to see that it is ignored.
    return outs, torch.autograd.grad(used, wanted, upstream, allow_unused=True, materialize_grads=True)


@settings(
    max_examples=DRAWS,
    deadline=None,
    derandomize=DRAWS <= 40,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(calls())
def test_any_combination_of_features(call):
    dtype, tensors, spec, needs = call
    what = f"{spec} " + " ".join(f"{n}{list(t.shape)}" for n, t in tensors.items())
    truth = _run(attention_reference, tensors, spec, needs, torch.float64)
    plain = _run(attention_reference, tensors, spec, needs)
    with fastllm.backend("eager"):
        eager = _run(attention, tensors, spec, needs)
    with fastllm.backend("triton"):
        kernels = _run(attention, tensors, spec, needs)
    for kind in range(2):
        for true, stick, chunked, got in zip(truth[kind], plain[kind], eager[kind], kernels[kind], strict=True):
            assert_as_true(chunked, true, stick, dtype, f"eager: {what}", floor=32)
            # A score of size s carries s eps into its probability; with a scale of 1 they reach about 16 here. Eager's
            # error is no measure where it happens to be 0, as with a single key.
            assert_as_true(got, true, chunked, dtype, f"triton: {what}", floor=16)
