"""Where attentions elsewhere have broken, and the test of each; those without another home are here.

no rows, keys, batch; one of each     test_sizes_of_none_and_one
empty sequences, nothing packed       test_packed_sequences_may_be_empty, test_rows_of_no_packed_sequence_give_zero
more rows than keys, causal           test_rows_without_a_key_give_zero_and_no_gradient
lengths between tiles; windows        test_windows, test_windows_leave_chunks_without_a_key
window with causal, Sq != Sk          test_windows, test_any_combination_of_features
window of no width                    test_windows_below_zero_are_refused
first visible tile hidden             test_a_mask_that_hides_the_first_tiles_of_some_rows
very negative and -inf logits         test_rows_of_extreme_logits
infinite and NaN inputs               test_nan_and_infinity_stay_in_their_rows
logits past fp16                      test_fp16_logits_beyond_its_range
natural logarithm, its gradient       test_lse_is_the_natural_logarithm_and_merges_halves
offsets past 2^31                     test_offsets_past_32_bits, test_packed_offsets_past_32_bits
dropout counters past 2^32            test_dropout_words_differ_past_32_bits_of_scores
any strides, packed projections       test_parity, test_upstream_gradients_of_any_layout
unaligned bases and rows              test_unaligned_bases_and_rows
gradient of a sum, stride 0           test_gradients_that_are_one_expanded_number
head dims of no power of 2            test_head_dims_do_not_read_past_the_row
head dim of values another            test_head_dims_do_not_read_past_the_row, test_any_group_and_length
head dims past 256                    test_head_dims_past_the_kernels_run_eager
groups of no power of 2               test_any_group_and_length, test_any_combination_of_features
heads that do not divide              test_bad_arguments_are_named
shared heads summed in fp32           test_gradients_of_shared_heads_are_summed_in_fp32
dropout mask free of the tiles        test_dropout_drops_what_the_host_says
dropout of 0 and 1, another a call    test_dropout_probabilities
dropout probability exact             test_dropout_is_exact_to_more_than_eight_bits
dropout seed stays on the device      test_the_dropout_seed_is_a_tensor
ALiBi from the diagonal, in fp32      test_alibi_is_the_distance_from_the_diagonal
soft cap's derivative                 test_soft_cap_at_its_bound, test_chunked_eager_gradients_in_fp64
soft cap, window and sink at once     test_any_combination_of_features, test_all_features_at_once
sink in the denominator alone         test_a_sink_is_in_the_denominator_alone
deterministic flag                    test_deterministic_algorithms_change_nothing
ten backwards, one result             test_ten_backwards_are_equal_bit_for_bit
alone, in a batch, packed             test_a_sequence_has_the_same_bits_alone_in_a_batch_and_packed
fake kernels, exact strides           test_opcheck
compiled whole, any length            test_compiles_whole_with_dynamic_shapes, test_one_graph_for_all_lengths
autocast                              test_autocast_runs_in_its_dtype
activation checkpointing              test_activation_checkpointing_replays_dropout
torch's CausalBias, compiled or not   test_torchs_causal_biases_are_masks
vmap                                  test_vmap_is_for_eager
functorch's grad                      test_functorch_grad_equals_autograd
backward on another thread            test_backward_on_another_thread
another device than the current       test_another_device_than_the_current_one
gradient of the gradient              test_double_backward_is_right
CPU tensors run eager                 test_cpu_tensors_run_eager_unless_asked
products of fp32                      test_fp32_products_follow_torchs_setting
memory linear in the length           test_memory_is_linear_in_the_length
"""

import math
import re
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from attention_calls import BACKENDS, agree, qkv
from conftest import DEVICE
from contract import backend_fixture
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastllm
from fastllm.backends import pick
from fastllm.functional import attention, scaled_dot_product_attention
from fastllm.kernels.attention import problem as kernels
from fastllm.ops.attention.attention import attention_reference
from fastllm.ops.attention.call import AttentionCall, AttentionRequest
from fastllm.ops.attention.reference import dropout_kept
from fastllm.ops.shared.philox import draw_seed

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

backend = backend_fixture(*BACKENDS)


@pytest.mark.runs_on("anywhere")
def test_every_test_of_the_list_exists():
    named = set(re.findall(r"test_\w+", __doc__))
    files = Path(__file__).parents[1].rglob("test_*.py")
    defined = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    assert len(named) > 40
    assert named <= defined, named - defined


def test_windows_below_zero_are_refused():
    with pytest.raises(ValueError, match="window must hold integers >= 0"):
        attention(*qkv(), window=(3, -4))


def test_packed_offsets_past_32_bits():
    # Two rows of a packed tensor and of its gradient more than 2^31 elements apart.
    far = 2**31 + 64
    whole = torch.empty(2 * far + 64, dtype=torch.float16, device=DEVICE)
    base = torch.randn(3, 2, 16, device=DEVICE).half()
    wide = [whole.as_strided((3, 2, 16), (far, 32, 2), offset) for offset in (0, 1)]
    for view in wide:
        view.copy_(base)
    starts = torch.tensor([0, 1, 3], device=DEVICE)
    kwargs = dict(cu_seqlens_q=starts, cu_seqlens_k=starts)
    with fastllm.backend("triton"):
        leaves = [w.detach().requires_grad_() for w in (wide[0], wide[1], wide[0])]
        near = [base.clone().requires_grad_() for _ in range(3)]
        out, expected = attention(*leaves, **kwargs), attention(*near, **kwargs)
        assert torch.equal(out, expected)
        grads = torch.autograd.grad(out, leaves, wide[1])
        for a, b in zip(grads, torch.autograd.grad(expected, near, base), strict=True):
            assert torch.equal(a, b)


def test_column_offsets_past_32_bits():
    # The last of 16 columns lies 15 * 2^28 elements behind the first: queries, keys, values, and the output's gradient.
    step = 2**28
    whole = torch.empty(16 * step, dtype=torch.float16, device=DEVICE)
    base = torch.randn(1, 2, 3, 16, device=DEVICE).half()
    wide = whole.as_strided((1, 2, 3, 16), (6, 3, 1, step))
    wide.copy_(base)
    with fastllm.backend("triton"):
        leaves = [wide.detach().requires_grad_() for _ in range(3)]
        near = [base.clone().requires_grad_() for _ in range(3)]
        out, expected = attention(*leaves), attention(*near)
        assert torch.equal(out, expected)
        grads = torch.autograd.grad(out, leaves, wide)
        for a, b in zip(grads, torch.autograd.grad(expected, near, base), strict=True):
            assert torch.equal(a, b)


@pytest.mark.runs_on("anywhere")
def test_dropout_words_differ_past_32_bits_of_scores():
    # Planes and rows whose scores lie 2^32 apart in one long count; and the kernels' own words there.
    seed = torch.tensor([17, 0])
    planes = torch.tensor([0, 2**16, 2**30])
    words = [dropout_kept(seed, planes, torch.tensor([row]), 64, 0.5) for row in (0, 2**20)]
    masks = torch.stack(words).reshape(6, 64)
    assert len({tuple(mask.tolist()) for mask in masks}) == 6


def test_unaligned_bases_and_rows(backend):
    for dim in (36, 40, 33):
        room = [torch.randn(1, 9, 2, dim + 1, device=DEVICE).half() for _ in range(3)]
        views = [x[:, 1:, :, 1:].transpose(1, 2) for x in room]
        whole = [x.clone(memory_format=torch.contiguous_format) for x in views]
        torch.testing.assert_close(attention(*views, causal=True), attention(*whole, causal=True), rtol=2e-3, atol=2e-3)
        leaves = [x.detach().requires_grad_() for x in views]
        out = attention(*leaves)
        # The gradient, too, starts at an odd address.
        grad = torch.randn(1, 2, 8, dim + 1, device=DEVICE).half()[..., 1:]
        reference = [x.detach().float().requires_grad_() for x in views]
        expected = torch.autograd.grad(attention_reference(*reference), reference, grad.float())
        for a, b in zip(torch.autograd.grad(out, leaves, grad), expected, strict=True):
            # Rounded to fp16; measured at most 1e-3.
            torch.testing.assert_close(a.float(), b, rtol=2e-3, atol=2e-3)


def test_gradients_that_are_one_expanded_number(backend):
    q, k, v = qkv()
    got = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    expected = torch.autograd.grad(attention_reference(q, k, v).sum(), (q, k, v))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_the_dropout_seed_is_a_tensor():
    # A CUDA graph replays its launches: a number read by the host would repeat one mask for ever.
    seed = draw_seed(DEVICE)
    assert (seed.dtype, seed.shape, seed.device.type) == (torch.int64, (2,), DEVICE.type)
    assert not torch.equal(seed, draw_seed(DEVICE))


def test_alibi_is_the_distance_from_the_diagonal(backend):
    rows, cols = 3, 70
    q, k, v = qkv(2, 2, rows, cols)
    # A slope that bf16 would round.
    slopes = torch.tensor([[0.0101, 0.3333], [0.5, 0.0009765]], device=DEVICE)
    i, j = torch.arange(rows, device=DEVICE)[:, None], torch.arange(cols, device=DEVICE)
    dense = -slopes[..., None, None] * (i + cols - rows - j).abs()
    torch.testing.assert_close(attention(q, k, v, alibi_slopes=slopes), attention(q, k, v, bias=dense))
    torch.testing.assert_close(
        attention(q, k, v, alibi_slopes=slopes[0]), attention(q, k, v, bias=dense[:1]), rtol=1e-5, atol=1e-6
    )


def test_soft_cap_at_its_bound(backend):
    # Logits from far within the cap to far beyond it, where 1 - tanh^2 is 0.
    q, k, v = qkv(scale=4.0)
    for cap in (0.1, 3.0, 1000.0):
        agree((q, k, v), softcap=cap, rtol=1e-4, atol=1e-4)


def test_a_sink_is_in_the_denominator_alone(backend):
    q, k, v = qkv()
    sinks = torch.tensor([0.7, -2.0], device=DEVICE)
    out, lse = attention(q, k, v, return_lse=True)
    with_sink, lse_sink = attention(q, k, v, sinks=sinks, return_lse=True)
    expected = torch.logaddexp(lse, sinks.view(1, 2, 1))
    torch.testing.assert_close(lse_sink, expected)
    torch.testing.assert_close(with_sink, out * torch.exp(lse - expected).unsqueeze(-1))
    absent = torch.full((2,), -math.inf, device=DEVICE)
    torch.testing.assert_close(attention(q, k, v, sinks=absent), out)


def test_deterministic_algorithms_change_nothing(backend):
    q, k, v = qkv(1, 4, 20, 20, heads_kv=2)
    bias = torch.randn(1, 1, 1, 20, device=DEVICE, requires_grad=True)

    def run():
        out = attention(q, k, v, bias=bias, causal=True)
        return out, *torch.autograd.grad(out.sin().sum(), (q, k, v, bias))

    before = run()
    torch.use_deterministic_algorithms(True)
    try:
        after = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_one_graph_for_all_lengths(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *x: attention(*x, causal=True, softcap=5.0), fullgraph=True, backend=counter)
    for length in (24, 17, 40, 33):
        tensors = qkv(rows=length, cols=length)
        for x in tensors:
            torch._dynamo.mark_dynamic(x, 2)
        torch.testing.assert_close(compiled(*tensors), attention(*tensors, causal=True, softcap=5.0))
    assert counter.frame_count == 1


def test_vmap_is_for_eager(backend):
    q, k, v = (torch.randn(3, 1, 2, 5, 8, device=DEVICE) for _ in range(3))
    batched = torch.func.vmap(lambda *x: attention(*x, softcap=2.0))
    if backend == "eager":
        expected = torch.stack([attention(*x, softcap=2.0) for x in zip(q, k, v, strict=True)])
        torch.testing.assert_close(batched(q, k, v), expected)
    else:
        with pytest.raises(fastllm.BackendError, match="vmap"):
            batched(q, k, v)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    other = torch.device("cuda", 1)
    stream = torch.cuda.Stream(other)
    q, k, v = (torch.randn(1, 2, 20, 8, device=other, requires_grad=True) for _ in range(3))
    stream.wait_stream(torch.cuda.current_stream(other))
    with torch.cuda.device(0), torch.cuda.stream(stream):
        out = attention(q, k, v, causal=True)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    stream.synchronize()
    expected = torch.autograd.grad(attention_reference(q, k, v, causal=True).sum(), (q, k, v))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.runs_on("anywhere")
def test_cpu_tensors_run_eager_unless_asked():
    x = torch.randn(1, 2, 4, 8)
    assert pick("attention", AttentionRequest(AttentionCall(x, x, x))).backend == "eager"


def test_fp32_products_follow_torchs_setting():
    q, k, v = (t.detach() for t in qkv())

    def precision(dtype):
        tensors = [t.to(dtype) for t in (q, k, v)]
        call = AttentionCall(*tensors, *(None,) * 6, 1.0, 0.0, -1, -1, True, 0.0)
        return kernels.Problem(call).flags().precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert (precision(torch.float32), precision(torch.float16)) == ("tf32", "ieee")
        # The newer way to say it, after which torch.get_float32_matmul_precision() raises.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert (precision(torch.float32), precision(torch.float16)) == ("tf32", "ieee")
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert precision(torch.float32) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11 says so once, of any profile
@pytest.mark.runs_on("anywhere")
def test_memory_is_linear_in_the_length():
    """Forward and backward at 16k: everything allocated at one time stays below 3 x inputs and outputs."""
    length, dim = 16384, 128
    q, k, v = (torch.randn(1, 1, length, dim, requires_grad=True) for _ in range(3))
    held = 4 * q.numel() * q.element_size()
    with (
        fastllm.backend("eager"),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        out = attention(q, k, v, causal=True, window=(400, 0), softcap=30.0)
        grads = torch.autograd.grad(out, (q, k, v), out.detach())
    assert all(g.isfinite().all() for g in grads)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    # The inputs were there before; three gradients and the output are the least.
    assert peak > held
    assert 3 * q.numel() * q.element_size() + peak < 3 * held, (peak, held)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("make", [causal_lower_right, causal_upper_left])
def test_torchs_causal_biases_are_masks(make, compiled):
    torch._dynamo.reset()
    function = scaled_dot_product_attention
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    q, k, v = (torch.randn(1, 2, n, 8, device=DEVICE) for n in (5, 9, 9))
    mask = torch.ones(5, 9, dtype=torch.bool, device=DEVICE).tril(4 if make is causal_lower_right else 0)
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(function(q, k, v, make(5, 9)), expected)


@pytest.mark.parametrize("backend", ["auto", "eager", "triton"])
@pytest.mark.parametrize("shape", [(5, 9), (2, 1, 9, 5), (9,)])
@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_a_mask_beside_is_causal_hides_more(kind, shape, backend):
    rows, cols = (9, 5) if len(shape) == 4 else (5, 9)
    shape = (1, *shape) if len(shape) == 1 else shape
    leaves = [torch.randn(2, 2, n, 8, device=DEVICE, requires_grad=True) for n in (rows, cols, cols)]
    mask = torch.rand(shape, device=DEVICE) < 0.7
    if kind == "added":
        mask = torch.randn(shape, device=DEVICE).masked_fill(~mask, -torch.inf).requires_grad_()
        leaves.append(mask)
    below = torch.ones(rows, cols, dtype=torch.bool, device=DEVICE).tril()
    both = mask & below if kind == "boolean" else torch.where(below, mask, -torch.inf)
    expected = F.scaled_dot_product_attention(*leaves[:3], both)
    with fastllm.backend(backend):
        out = scaled_dot_product_attention(*leaves[:3], mask, is_causal=True)
        found = torch.autograd.grad(out.square().sum(), leaves)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), leaves), rtol=1e-4, atol=1e-5)


def test_a_causal_bias_stands_alone():
    q = torch.randn(1, 2, 5, 8, device=DEVICE)
    with pytest.raises(ValueError, match="must not be a CausalBias when is_causal"):
        scaled_dot_product_attention(q, q, q, causal_upper_left(5, 5), is_causal=True)
