"""What is peculiar to rotary_embedding: the rotation itself, positions, tables, traffic, errors."""

import pytest
import torch
from conftest import DEVICE
from contract import backend_fixture

import fastllm
from fastllm import OPS
from fastllm.backends import BackendError, why_not
from fastllm.bench.traffic import measure
from fastllm.functional import rotary_embedding
from fastllm.kernels.rotary_embedding import rotary
from fastllm.ops.rotary_embedding import RotaryCall
from fastllm.registry import Sample

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

backend = backend_fixture("eager", "triton", "native", op="rotary_embedding")


def _tables(length, half, base=100.0):
    angles = torch.outer(torch.arange(length, device=DEVICE), base ** (-torch.arange(half, device=DEVICE) / half))
    return angles.cos(), angles.sin()


def test_a_pair_is_a_complex_number_times_its_phase(backend):
    x = torch.randn(2, 3, 5, 8, device=DEVICE)
    cos, sin = _tables(5, 4)
    phase = torch.complex(cos, sin)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * phase).flatten(-2)
    y, _ = rotary_embedding(x, None, cos, sin, interleaved=True)
    torch.testing.assert_close(y, expected)
    halves = torch.view_as_complex(x.unflatten(-1, (2, 4)).mT.contiguous()) * phase
    y, _ = rotary_embedding(x, None, cos, sin)
    torch.testing.assert_close(y, torch.cat((halves.real, halves.imag), -1))


def test_scores_depend_on_the_distance_alone(backend):
    """Su et al. 2021, equation 11."""
    query, key = (torch.randn(1, 1, 1, 16, device=DEVICE).expand(1, 1, 9, 16) for _ in range(2))
    for interleaved in (False, True):
        q, k = rotary_embedding(query, key, *_tables(9, 8), interleaved=interleaved)
        scores = (q @ k.mT)[0, 0]
        for i in range(1, 9):
            torch.testing.assert_close(scores[i:, : 9 - i].diagonal(), scores[i, 0].expand(9 - i), rtol=1e-4, atol=1e-4)


def test_rotated_back_it_is_the_same(backend):
    x = torch.randn(2, 4, 7, 12, device=DEVICE, requires_grad=True)
    y, _ = rotary_embedding(x, None, *_tables(7, 4))
    (back,) = torch.autograd.grad(y, x, y)
    torch.testing.assert_close(back, x)
    assert torch.equal(y[..., 8:], x[..., 8:])
    assert y.data_ptr() != x.data_ptr()


def test_ids_and_offset_name_the_same_rows(backend):
    query, key = torch.randn(2, 4, 3, 8, device=DEVICE), torch.randn(2, 2, 3, 8, device=DEVICE)
    cos, sin = _tables(10, 4)
    expected = rotary_embedding(query, key, cos, sin, offset=5)
    for ids in (torch.arange(5, 8), torch.arange(5, 8).expand(1, 3), torch.arange(5, 8).expand(2, 3).int()):
        got = rotary_embedding(query, key, cos, sin, position_ids=ids.to(DEVICE))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    by_sequence = rotary_embedding(query, key, cos.expand(2, 10, 4), sin.expand(1, 10, 4).expand(2, 10, 4), offset=5)
    torch.testing.assert_close(by_sequence, expected, rtol=0, atol=0)


def test_one_sequence_without_its_batch_dimension(backend):
    """Ids and tables of a batch of one, and a query without that dimension; no positions at all."""
    cos, sin = _tables(9, 3)
    for length in (5, 0):
        query, key = torch.randn(2, length, 8, device=DEVICE), torch.randn(1, length, 8, device=DEVICE)
        ids = torch.arange(2, 2 + length, device=DEVICE)
        expected = rotary_embedding(query, key, cos, sin, offset=2)
        for tables, options in (
            ((cos, sin), dict(position_ids=ids)), ((cos, sin), dict(position_ids=ids[None])),
            ((cos[None], sin[None]), dict(offset=2)),
        ):  # fmt: skip
            for got, right in zip(rotary_embedding(query, key, *tables, **options), expected, strict=True):
                torch.testing.assert_close(got, right)


def test_tables_of_one_sequence_for_a_batch(backend):
    cos, sin = _tables(9, 3)
    query = torch.randn(3, 2, 5, 8, device=DEVICE, requires_grad=True)
    found = []
    for tables in ((cos, sin), (cos[None], sin[None]), (cos.expand(3, 9, 3), sin.expand(3, 9, 3))):
        y, _ = rotary_embedding(query, None, *tables, offset=2)
        found.append((y, *torch.autograd.grad(y.square().sum() + y.sum(), query)))
    for got in found[1:]:
        for a, b in zip(got, found[0], strict=True):
            torch.testing.assert_close(a, b)


def test_decoding_continues_the_sequence(backend):
    x = torch.randn(1, 2, 6, 8, device=DEVICE)
    cos, sin = _tables(6, 4)
    whole, _ = rotary_embedding(x, None, cos, sin)
    steps = [rotary_embedding(x[:, :, i : i + 1], None, cos, sin, offset=i)[0] for i in range(6)]
    assert torch.equal(torch.cat(steps, 2), whole)


def test_the_tables_have_gradients_in_eager_only():
    x = torch.randn(1, 2, 3, 8, device=DEVICE)
    cos, sin = (t.requires_grad_() for t in _tables(3, 4))
    with fastllm.backend("eager"):
        y, _ = rotary_embedding(x, None, cos, sin)
        dcos, dsin = torch.autograd.grad(y.sum(), (cos, sin))
    a, b = x.split(4, -1)
    torch.testing.assert_close(dcos, (a + b).sum((0, 1)))
    torch.testing.assert_close(dsin, (a - b).sum((0, 1)))
    for name in ("triton", "native"):
        if why_not(name, DEVICE.type, op=OPS["rotary_embedding"]) is not None:
            continue
        with fastllm.backend(name), pytest.raises(BackendError, match="no gradient for cos and sin"):
            rotary_embedding(x, None, cos, sin)


@pytest.mark.parametrize("backend", ["triton", "native"], indirect=True)
def test_outputs_lie_as_their_inputs(backend):
    packed = torch.randn(2, 5, 6, 8, device=DEVICE)
    query, key = (t.transpose(1, 2) for t in packed.split((4, 2), 2))
    q, k = rotary_embedding(query, key, *_tables(5, 4))
    assert q.transpose(1, 2).is_contiguous()
    assert k.transpose(1, 2).is_contiguous()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_tensor_is_moved_once(interleaved):
    packed = torch.randn(1, 40, 8, 48, dtype=torch.bfloat16).requires_grad_()
    query, key, _ = (t.transpose(1, 2) for t in packed.split((5, 2, 1), 2))
    measured = measure(
        OPS["rotary_embedding"], Sample("", (query, key, *_tables(40, 16)), {"interleaved": interleaved})
    )
    assert measured.forward_ratio == pytest.approx(1.0, abs=0.02), measured.forward.table()
    assert measured.backward_ratio == pytest.approx(1.0, abs=0.02), measured.backward.table()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a device-side assert ends the process's use of the GPU")
@pytest.mark.parametrize("bad", [-1, 10])
def test_an_id_outside_the_tables(backend, bad):
    ids = torch.tensor([[0, 1, 2], [3, bad, 4]])
    with pytest.raises(IndexError, match=rf"position_ids {bad} at \[1, 1\].*\[0, 10\)"):
        rotary_embedding(torch.randn(2, 1, 3, 8), None, *_tables(10, 4), position_ids=ids)


@pytest.mark.runs_on("interpreter")
@pytest.mark.parametrize("bad", [-1, 10])
def test_an_id_outside_the_tables_shows_as_nan_where_asserts_are_compiled_out(monkeypatch, bad):
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_assert", lambda *args: None)
    query, ids = torch.randn(1, 1, 3, 8), torch.tensor([3, bad, 4])
    # Rows of a larger table: what lies beside them are numbers.
    cos, sin = (table[1:11] for table in _tables(12, 3))
    y = torch.empty_like(query)
    rotary(RotaryCall(query, None, cos, sin, ids, 0, False), y, None)
    assert y[0, 0].isnan().tolist() == [[False] * 8, [True] * 6 + [False] * 2, [False] * 8]


X, COS, IDS = torch.zeros(2, 4, 3, 8), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long)


@pytest.mark.runs_on("anywhere")
@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    [
        ((X.long(), X, COS, COS), {}, TypeError, "query.*int64"),
        ((X, 3, COS, COS), {}, TypeError, "key.*int"),
        ((X, X, COS.to("meta"), COS), {}, ValueError, "cos is on meta"),
        ((X[0, 0], None, COS, COS), {}, ValueError, r"query.*\[3, 8\]"),
        ((X, X[:, :, :2], COS, COS), {}, ValueError, r"key.*\[2, 4, 2, 8\]"),
        ((X, X, COS, COS[:3]), {}, ValueError, r"alike.*\[5, 4\] and \[3, 4\]"),
        ((X, X, COS.expand(3, 5, 4), COS.expand(3, 5, 4)), {}, ValueError, "batch size 2 or 1, got 3"),
        ((X, X, COS.repeat(1, 2), COS.repeat(1, 2)), {}, ValueError, "at most 4 of query's 8 features, got 8"),
        ((X, X, COS, COS), {"offset": 3}, ValueError, "3 positions from offset 3.*have 5 rows"),
        ((X, X, COS, COS), {"offset": -1}, ValueError, "offset -1"),
        ((X, X, COS, COS), {"position_ids": IDS.float()}, TypeError, "position_ids.*float32"),
        ((X, X, COS, COS), {"position_ids": IDS[:2]}, ValueError, r"position_ids.*\[3\] or \[2, 3\], got \[2\]"),
        ((X, X, COS, COS), {"position_ids": IDS, "offset": 1}, ValueError, "without an offset"),
    ],
)
def test_errors_name_what_is_wrong(args, options, error, words):
    with pytest.raises(error, match=f"rotary_embedding: .*{words}"):
        rotary_embedding(*args, **options)
