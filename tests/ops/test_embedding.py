"""What is peculiar to embedding and embedding_sum: every option against fp64, ids out of range, bits, accumulation."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from contract import assert_as_true, backend_fixture
from hypothesis import given, settings
from hypothesis import strategies as st

import fastllm
import fastllm.functional as FF
from fastllm.backends import why_not
from fastllm.ops.embedding.embedding import embedding_reference
from fastllm.ops.embedding.embedding_sum import embedding_sum_reference

pytestmark = [pytest.mark.cpu_level, pytest.mark.runs_on("gpu", "interpreter")]

NOT_NATIVE = why_not("native", DEVICE.type)
NATIVE = NOT_NATIVE is None
BACKENDS = ["eager", *(["native"] if NATIVE else [])]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

backend = backend_fixture(*BACKENDS)


def table(rows, columns, dtype=torch.float32):
    return torch.randn(rows, columns, device=DEVICE).to(dtype).requires_grad_()


def grad_of(function, weight, upstream):
    (grad,) = torch.autograd.grad(function(weight), weight, upstream)
    return grad


def oracle(ids, upstream, rows, padding_idx=None, by_freq=False):
    """The table's gradient in fp64."""
    flat, grads = ids.flatten().long(), upstream.double().reshape(ids.numel(), upstream.shape[-1])
    if padding_idx is not None:
        grads = grads * (flat != padding_idx)[:, None]
    if by_freq:
        grads = grads / torch.bincount(flat, minlength=rows)[flat][:, None]
    return torch.zeros(rows, grads.shape[1], dtype=torch.float64, device=ids.device).index_add_(0, flat, grads)


DISTRIBUTIONS = {
    "equal": lambda n, v: torch.full((n,), v - 1),
    "ends": lambda n, v: torch.randint(2, (n,)) * (v - 1),
    "uniform": lambda n, v: torch.randint(v, (n,)),
    "head": lambda n, v: (torch.rand(n).pow(6) * v).long(),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(0, 140),
    tokens=st.integers(0, 700),
    distribution=st.sampled_from(sorted(DISTRIBUTIONS)),
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
    padding=st.one_of(st.none(), st.integers(-300, 299)),
    by_freq=st.booleans(),
    name=st.sampled_from(BACKENDS),
)
def test_any_lookup_against_fp64(rows, columns, tokens, distribution, dtype, index, padding, by_freq, name):
    torch.manual_seed(rows * 1000 + tokens)
    ids = DISTRIBUTIONS[distribution](tokens, rows).to(DEVICE, index)
    weight = table(rows, columns, dtype)
    padding = None if padding is None or not -rows <= padding < rows else padding
    upstream = torch.randn(tokens, columns, device=DEVICE).to(dtype)
    with fastllm.backend(name):
        out = FF.embedding(ids, weight, padding, scale_grad_by_freq=by_freq)
        (grad,) = torch.autograd.grad(out, weight, upstream)
    assert torch.equal(out, weight[ids.long()])
    assert grad.dtype == dtype
    truth = oracle(ids, upstream, rows, None if padding is None else padding % rows, by_freq)
    # fp32 sums of up to 700 terms of size 1, rounded once; in fp64 the oracle itself sums in another order.
    eps = torch.finfo(dtype).eps
    scale = truth.abs().clamp(min=1)
    bound = eps * scale + 700 * (eps if dtype == torch.float64 else torch.finfo(torch.float32).eps)
    assert ((grad.double() - truth).abs() <= bound).all()


def test_a_thousand_ones_are_a_thousand(backend):
    weight = torch.zeros(3, 70, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    ids = torch.ones(1000, dtype=torch.int64, device=DEVICE)
    grad = grad_of(lambda w: FF.embedding(ids, w), weight, torch.ones(1000, 70, dtype=torch.bfloat16, device=DEVICE))
    assert (grad[1] == 1000).all()
    assert (grad[[0, 2]] == 0).all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU an id out of range is a device-side assertion")
@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_id_out_of_range_is_named(backend, bad):
    ids = torch.tensor([[0, 6, 1], [3, bad, -5]])
    with pytest.raises(IndexError, match=rf"^embedding: input\[1, 1\] is {bad}, outside the table of 7 rows"):
        FF.embedding(ids, table(7, 5))
    with pytest.raises(IndexError, match=rf"indices\[1\]\[1, 1\] is {bad}, outside the table of 7 rows"):
        FF.embedding_sum([torch.zeros(2, 3, dtype=torch.int64), ids], [table(7, 5), table(7, 5)])
    with pytest.raises(IndexError, match=rf"^embedding: input\[1, 1\] is {bad}"):
        FF.embedding(ids, table(7, 5), sparse=True)
    with pytest.raises(IndexError, match=rf"^embedding: input\[1, 1\] is {bad}"):
        FF.embedding(ids, table(7, 5), max_norm=1.0)
    with pytest.raises(IndexError, match=r"^embedding: input\[0, 0\] is 0, outside the table of 0 rows"):
        FF.embedding(ids, table(0, 5))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU an id out of range is a device-side assertion")
def test_a_part_of_a_vocabulary_refuses_negative_ids_only(backend):
    out = FF.embedding(torch.tensor([0, 5, 10**9]), table(4, 6), vocab_range=(4, 8))
    assert (out[[0, 2]] == 0).all()
    with pytest.raises(IndexError, match=r"^embedding: input\[1\] is -1"):
        FF.embedding(torch.tensor([4, -1]), table(4, 6), vocab_range=(4, 8))


def test_parts_of_a_vocabulary_add_up_to_the_whole(backend):
    whole = table(20, 9)
    ids = torch.randint(20, (5, 30), device=DEVICE)
    upstream = torch.randn(5, 30, 9, device=DEVICE)
    expected = FF.embedding(ids, whole, 7)
    (expected_grad,) = torch.autograd.grad(expected, whole, upstream)
    cuts = [0, 6, 6, 15, 20]
    total, grads = 0, []
    for start, end in itertools.pairwise(cuts):
        part = whole[start:end].detach().requires_grad_()
        out = FF.embedding(ids, part, 7, vocab_range=(start, end))
        grads += torch.autograd.grad(out, part, upstream)
        total = total + out
    assert torch.equal(total, expected)
    assert torch.equal(torch.cat(grads), expected_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_gets_the_gradient_added(backend, dtype):
    ids = torch.randint(11, (40,), device=DEVICE)
    weight = table(11, 33, dtype)
    for into in {dtype, torch.float32}:
        main_grad = torch.randn(11, 33, device=DEVICE).to(into)
        truth = main_grad.double()
        out = FF.embedding(ids, weight, 3, main_grad=main_grad)
        for _ in range(2):
            upstream = torch.randn(40, 33, device=DEVICE).to(dtype)
            truth = truth + oracle(ids, upstream, 11, 3)
            out.backward(upstream, retain_graph=True)
        assert weight.grad is None
        assert ((main_grad.double() - truth).abs() <= 3 * torch.finfo(into).eps * truth.abs().clamp(min=4)).all()


def test_module_accumulates_in_place_beside_a_tied_head():
    torch.manual_seed(0)
    mine = fastllm.nn.Embedding(13, 8, accumulate_grad=True, device=DEVICE)
    theirs = torch.nn.Embedding(13, 8, device=DEVICE)
    theirs.load_state_dict(mine.state_dict())
    for _ in range(3):
        ids = torch.randint(13, (4, 5), device=DEVICE)
        for module in (mine, theirs):
            (module(ids) @ module.weight.t()).square().sum().backward()
        if mine.weight.grad is not None:
            torch.testing.assert_close(mine.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-5)
    before = mine.weight.grad.data_ptr()
    mine(ids).sum().backward()
    assert mine.weight.grad.data_ptr() == before


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"max_norm": 0.5, "norm_type": 1.0}, {"sparse": True},
    {"sparse": True, "padding_idx": 0, "max_norm": 1.0}])  # fmt: skip
def test_torchs_own_options(backend, options):
    ids = torch.tensor([[1, 3], [3, 0]], device=DEVICE)
    weight = table(5, 6)
    other = weight.detach().clone().requires_grad_()
    mine, theirs = FF.embedding(ids, weight, **options), F.embedding(ids, other, **options)
    assert torch.equal(mine, theirs)
    assert torch.equal(weight, other)
    mine.sum().backward()
    theirs.sum().backward()
    assert weight.grad.is_sparse == other.grad.is_sparse
    torch.testing.assert_close(weight.grad.to_dense(), other.grad.to_dense())


def test_integer_tables_are_looked_up_too():
    ids = torch.tensor([2, 0], device=DEVICE)
    assert torch.equal(
        FF.embedding(ids, torch.arange(6, device=DEVICE).view(3, 2)), ids[:, None] * 2 + ids.new_tensor([0, 1])
    )


@pytest.mark.skipif(not NATIVE, reason=f"native: {NOT_NATIVE}")
def test_a_frequency_counts_every_row_that_an_id_gathered():
    # Each of three ids stands for two rows of the gradient, 3 apart.
    ids, grad = torch.tensor([2, 0, 2], device=DEVICE), torch.randn(6, 4, device=DEVICE)
    got = torch.ops.fastllm.embedding_bwd(grad, ids, 5, -1, True, None, 1.0, False)
    expected = torch.zeros(5, 4, device=DEVICE).index_add_(0, ids.repeat(2), grad)
    torch.testing.assert_close(got, expected / torch.tensor([2.0, 1, 4, 1, 1], device=DEVICE)[:, None])


BITS = """
import sys, torch, fastllm
torch.manual_seed(0)
results = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    skewed = torch.randint(30, (70000,)) * torch.randint(30, (70000,))
    for ids in (torch.zeros(3000, dtype=torch.int64), skewed, torch.randint(900, (5000,))):
        # Not randn, whose bits depend on the instruction set.
        grad = (torch.randint(-(2**20), 2**20, (ids.numel(), 130)) / 2**18).to(dtype)
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            fresh = torch.ops.fastllm.embedding_bwd(grad, ids, 900, 5, False, None, 0.7, False)
            added = torch.ones_like(fresh)
            torch.ops.fastllm.embedding_bwd_(added, grad, ids, 5, False, None, 0.7, True)
            results.append(torch.stack((fresh, added)))
            assert torch.equal(results[-1], results[-1 - (1, 2, 8).index(threads)]), (dtype, threads)
print(fastllm._C.build_info()["cpu_capability"])
print(hash(tuple(bytes(r.view(torch.uint8).numpy()) for r in results)))
"""


@pytest.mark.skipif(DEVICE.type == "cuda", reason="about the CPU code")
def test_same_bits_for_any_number_of_threads_and_any_instruction_set():
    runs = {}
    for wish in ("default", "avx2", "avx512"):
        env = {**os.environ, "ATEN_CPU_CAPABILITY": wish, "PYTHONHASHSEED": "0"}
        result = subprocess.run([sys.executable, "-c", BITS], env=env, capture_output=True, text=True, check=True)
        name, digest = result.stdout.split()
        runs[name] = digest
    assert "default" in runs
    assert len(set(runs.values())) == 1, runs


def test_double_backward_of_every_option(backend):
    ids = torch.randint(6, (3, 9), device=DEVICE)
    for options in ({}, {"padding_idx": 2}, {"padding_idx": -6, "scale_grad_by_freq": True}, {"vocab_range": (1, 5)}):
        start, end = options.get("vocab_range", (0, 6))
        weight = torch.randn(end - start, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
        upstream = torch.randn(3, 9, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)

        def gradient(weight, upstream, options=options):
            out = FF.embedding(ids, weight, **options)
            return torch.autograd.grad((out.sin() * upstream).sum(), weight, create_graph=True)[0]

        def true_gradient(weight, upstream, options=options):
            out = embedding_reference(ids, weight, **options)
            return torch.autograd.grad((out.sin() * upstream).sum(), weight, create_graph=True)[0]

        for mine, theirs in zip(
            torch.autograd.grad(gradient(weight, upstream).square().sum(), (weight, upstream)),
            torch.autograd.grad(true_gradient(weight, upstream).square().sum(), (weight, upstream)),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_is_replayed_and_scaled(backend, p):
    ids = torch.randint(9, (50, 7), device=DEVICE)
    weights = [table(9, 30, torch.float64), table(7, 30, torch.float64)]
    torch.manual_seed(5)
    out = FF.embedding_sum([ids, None], weights, dropout_p=p, scale=2.0)
    torch.manual_seed(5)
    expected = embedding_sum_reference([ids, None], weights, dropout_p=p, scale=2.0)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    for mine, true in zip(
        torch.autograd.grad(out, weights, upstream), torch.autograd.grad(expected, weights, upstream), strict=True
    ):
        torch.testing.assert_close(mine, true)
    dropped = (out == 0).double().mean().item()
    assert abs(dropped - p) < 4 * (p * (1 - p) / out.numel()) ** 0.5 + 1e-9


def test_sum_module_matches_three_modules():
    module = fastllm.nn.EmbeddingSum([20, 16, 2], 12, padding_idx=1, scale=(12**0.5, 1.0, 1.0), device=DEVICE)
    assert list(module.state_dict()) == ["tables.0.weight", "tables.1.weight", "tables.2.weight"]
    assert (module.tables[0].weight[1] == 0).all()
    tokens, segments = torch.randint(20, (3, 9), device=DEVICE), torch.randint(2, (3, 9), device=DEVICE)
    a, b, c = (t.weight for t in module.tables)
    expected = F.embedding(tokens, a, 1) * 12**0.5 + b[:9] + F.embedding(segments, c)
    out = module(tokens, None, segments)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    mine = torch.autograd.grad(out, (a, b, c), upstream)
    for x, y in zip(mine, torch.autograd.grad(expected, (a, b, c), upstream), strict=True):
        torch.testing.assert_close(x, y)
    module.dropout = 0.5
    assert (module(tokens, None, segments) == 0).any()
    assert not (module.eval()(tokens, None, segments) == 0).any()


def test_bad_arguments_are_named():
    ids = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    weight = table(4, 5)
    for error, match, call in (
        (TypeError, "embedding: input must be int32 or int64, got float32", lambda: FF.embedding(ids.float(), weight)),
        (TypeError, "embedding: input must be a tensor, got list", lambda: FF.embedding([0], weight)),
        (ValueError, r"weight must have shape \(rows, columns\), got \[4\]", lambda: FF.embedding(ids, weight[:, 0])),
        (TypeError, "padding_idx must be an integer, got 1.5", lambda: FF.embedding(ids, weight, 1.5)),
        (ValueError, "padding_idx must lie within a table of 4 rows, got 4", lambda: FF.embedding(ids, weight, 4)),
        (ValueError, "padding_idx must lie within a table of 4 rows, got -5", lambda: FF.embedding(ids, weight, -5)),
        (ValueError, "vocab_range", lambda: FF.embedding(ids, weight, vocab_range=(3, 6))),
        (ValueError, "neither max_norm", lambda: FF.embedding(ids, weight, vocab_range=(3, 7), max_norm=1.0)),
        (ValueError, "main_grad must have the table's shape", lambda: FF.embedding(ids, weight, main_grad=weight[:2])),
        (ValueError, "main_grad must be", lambda: FF.embedding(ids, weight, main_grad=weight.detach().half())),
        (
            ValueError,
            "main_grad's rows must not overlap",
            lambda: FF.embedding(ids, weight, main_grad=weight.detach()[:1].expand(weight.shape)),
        ),
        (ValueError, "must be sequences of one length", lambda: FF.embedding_sum([ids], [weight, weight])),
        (ValueError, "share columns", lambda: FF.embedding_sum([ids, ids], [weight, table(4, 6)])),
        (ValueError, "share columns", lambda: FF.embedding_sum([ids, ids], [weight, table(4, 5, torch.float16)])),
        (ValueError, "do not broadcast", lambda: FF.embedding_sum([ids, ids[:2]], [weight, weight])),
        (ValueError, "dropout_p", lambda: FF.embedding_sum([ids], [weight], dropout_p=1.5)),
        (ValueError, "scale has 2 entries for 1", lambda: FF.embedding_sum([ids], [weight], scale=(1.0, 2.0))),
        (ValueError, r"positions \(None\)", lambda: FF.embedding_sum([None], [weight])),
        (TypeError, "must be a sequence", lambda: FF.embedding_sum(ids, [weight])),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()


def test_positions_beyond_the_table_raise(backend):
    if DEVICE.type == "cuda":
        pytest.skip("on a GPU an id out of range is a device-side assertion")
    with pytest.raises(IndexError, match=r"indices\[1\]\[4\] is 4, outside the table of 4 rows"):
        FF.embedding_sum([torch.zeros(2, 6, dtype=torch.int64), None], [table(3, 5), table(4, 5)])


def test_sum_in_16_bits_is_rounded_once(backend):
    ids = [torch.randint(40, (200,), device=DEVICE) for _ in range(3)]
    weights = [table(40, 65, torch.bfloat16) for _ in range(3)]
    out = FF.embedding_sum(ids, weights)
    truth = embedding_sum_reference(ids, [w.double() for w in weights])
    best = truth.bfloat16()
    assert_as_true(out, truth, best, torch.bfloat16, "sum", slack=1.0, floor=0.01)
