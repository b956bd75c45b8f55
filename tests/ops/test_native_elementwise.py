"""What is peculiar to the CPU code of gated activations and rotary embedding (csrc/cpu): lengths, layouts, refusals.

That it is right with every option: tests/test_ops.py, backend ``native``; that bits do not depend on threads or vector
units: tests/ops/test_native_rows.py.
"""

import functools

import pytest
import torch
from contract import assert_all_as_true, run
from torch.utils._python_dispatch import TorchDispatchMode

import fastllm
from fastllm import OPS
from fastllm.backends import BackendError
from fastllm.extension import load as extension
from fastllm.functional import geglu, rotary_embedding, swiglu
from fastllm.registry import Sample

pytestmark = [
    pytest.mark.cpu_level,
    pytest.mark.skipif(extension.missing() is not None, reason="no extension here: no C++ compiler"),
]

KINDS = [("swiglu", {}), ("geglu", {}), ("geglu", {"approximate": "tanh"})]


def _leaf(x):
    return x.detach().requires_grad_()


def _agree(op, args, options, dtype, what):
    wide = Sample("", tuple(_leaf(a.double()) for a in args), options)
    yardstick = run(op.function, Sample("", tuple(_leaf(a) for a in args), options), "eager")
    got = run(op.function, Sample("", tuple(_leaf(a) for a in args), options), "native")
    assert_all_as_true(got, functools.partial(run, op.reference, wide), yardstick, dtype, what)


@pytest.mark.parametrize(("name", "options"), KINDS)
@pytest.mark.parametrize("columns", [1, 2, 15, 17, 255, 256, 257, 4095, 4097, 9001])
def test_rows_of_any_width(name, options, columns):
    """Whole and broken vectors, steps and pieces; two threads, alone and in gaps of something wider."""
    torch.manual_seed(columns)
    rows = max(2, 40_000 // columns)
    for gate_dtype, up_dtype in (
        (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16),
    ):  # fmt: skip
        wide = (torch.randn(rows, columns + 5) * 3).to(gate_dtype)
        up = torch.randn(rows, columns).to(up_dtype)
        dtype = gate_dtype if gate_dtype == up_dtype else torch.float32
        for gate in (wide[:, 3:-2], wide[:, 3:-2].contiguous()):
            _agree(OPS[name], (gate, up), options, dtype, f"{name} {columns} {gate_dtype} {up_dtype}")
        if gate_dtype == up_dtype:
            packed = (torch.randn(rows, 2 * columns) * 3).to(gate_dtype)
            _agree(OPS[name], (packed,), options, dtype, f"{name} {columns} {gate_dtype} packed")


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_gates_of_any_size(name, options):
    """Where exp saturates, where 1 - 2 / (e^2x + 1) or 1 + erf would cancel, and what is not finite."""
    gate = torch.cat([torch.linspace(-s, s, 397) for s in (1e-30, 1e-4, 0.1, 1, 3, 6, 14, 40, 90, 1e3, 1e12)])
    _agree(OPS[name], (gate, torch.ones_like(gate)), options, torch.float32, name)
    # Far below 0 the result is small, and right to its own size.
    far = torch.linspace(-5, -1, 999, requires_grad=True)
    one = torch.ones(999)
    with fastllm.backend("native"):
        mine = OPS[name].function(far, one, **options)
    torch.testing.assert_close(mine.double(), OPS[name].reference(far.double(), one, **options), rtol=4e-6, atol=0)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    with fastllm.backend("native"):
        y = OPS[name].function(odd, torch.ones(3), **options)
    assert y[0] == torch.inf
    assert y[1:].isnan().all()


def test_strided_and_expanded_gradients_alone():
    """A frozen up or gate; a gradient without memory of its own."""
    gate, up = torch.randn(50, 1100).t(), torch.randn(1100, 50)
    for frozen in range(3):
        leaves = [_leaf(gate), _leaf(up)]
        if frozen < 2:
            leaves[frozen].requires_grad_(False)
        for backend in ("native", "eager"):
            for leaf in leaves:
                leaf.grad = None
            with fastllm.backend(backend):
                swiglu(*leaves).sum().backward()
            grads = [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
            if backend == "native":
                mine = grads
        for a, b in zip(mine, grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("length", "half", "rest"), [(1, 1, 0), (45, 8, 3), (70, 33, 0), (32, 64, 64)])
def test_rotations_are_torchs_bit_for_bit(dtype, interleaved, length, half, rest):
    """More positions than one thread holds at a time, over the ends of sequences, in both orders of memory."""
    width = 2 * half + rest
    cos, sin = torch.randn(2, length + 9, half)
    ids = torch.randint(0, length + 9, (3, length))
    packed = torch.randn(3, length, 9, width).to(dtype)
    by_position = [t.transpose(1, 2) for t in packed.split((5, 2, 2), 2)[:2]]
    by_head = [t.contiguous() for t in by_position]
    for query, key in (by_position, by_head, (by_head[0], by_position[1]), (by_head[0], None)):
        for options in ({"offset": 9}, {"position_ids": ids}, {"position_ids": ids[:1].int()}):
            found = {}
            for backend in ("native", "eager"):
                leaves = [None if t is None else _leaf(t) for t in (query, key)]
                with fastllm.backend(backend):
                    out = rotary_embedding(*leaves, cos.to(dtype), sin, interleaved=interleaved, **options)
                out = [t for t in out if t is not None]
                leaves = [t for t in leaves if t is not None]
                found[backend] = (*out, *torch.autograd.grad(out, leaves, [t.detach().flip(0) for t in out]))
            for a, b in zip(found["native"], found["eager"], strict=True):
                # The gradient of a sum has its own order of the two products.
                torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
            for a, b in zip(found["native"][: len(out)], found["eager"], strict=False):
                assert torch.equal(a, b)


def test_a_rotation_may_have_no_key_heads_and_no_positions():
    cos, sin = torch.randn(2, 4, 4)
    with fastllm.backend("native"):
        query, key = rotary_embedding(torch.randn(2, 3, 4, 8), torch.randn(2, 0, 4, 8), cos, sin)
        assert query.shape == (2, 3, 4, 8)
        assert key.shape == (2, 0, 4, 8)
        assert rotary_embedding(torch.randn(0, 3, 4, 8), None, cos, sin)[0].shape == (0, 3, 4, 8)
        assert rotary_embedding(torch.randn(2, 3, 0, 8), None, cos, sin)[0].shape == (2, 3, 0, 8)


class _Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastllm":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def _operators(call) -> set:
    with _Called() as called:
        call()
    return called.names


def test_calls_that_torch_serves_stay_there():
    x, tables = torch.zeros(8), torch.ones(2, 3, 4).unbind()
    assert _operators(lambda: swiglu(x, x)) == {"gated_rows"}
    assert _operators(lambda: geglu(x, x)) == {"gated_rows"}
    assert _operators(lambda: swiglu(x.bfloat16(), x.bfloat16())) == {"gated_rows"}
    assert not _operators(lambda: swiglu(x.double(), x))
    assert _operators(lambda: rotary_embedding(torch.ones(1, 1, 3, 8), None, *tables)) == {"rotary_rows"}
    assert not _operators(lambda: rotary_embedding(torch.ones(1, 1, 3, 8).double(), None, *tables))
    learned = [t.clone().requires_grad_() for t in tables]
    assert not _operators(lambda: rotary_embedding(torch.ones(1, 1, 3, 8), None, *learned))


def test_what_it_does_not_take_is_refused_by_name():
    x = torch.ones(2, 2, 3, 8, dtype=torch.float64)
    tables = torch.ones(2, 3, 4).unbind()
    with fastllm.backend("native"):
        for call in (lambda: swiglu(x, x), lambda: geglu(x), lambda: rotary_embedding(x, None, *tables)):
            with pytest.raises(BackendError, match="computes in float32, for float32, float16 and bfloat16"):
                call()


def test_vmap_takes_torchs_operators():
    gate, up = torch.randn(2, 4, 64).unbind()
    options = {"approximate": "tanh"}
    torch.testing.assert_close(
        torch.func.vmap(lambda g, u: geglu(g, u, **options))(gate, up), geglu(gate, up, **options)
    )
    x, tables = torch.randn(4, 2, 3, 5, 8), torch.randn(2, 5, 4).unbind()
    mapped = torch.func.vmap(lambda x: rotary_embedding(x, None, *tables)[0])(x)
    torch.testing.assert_close(mapped, torch.stack([rotary_embedding(t, None, *tables)[0] for t in x]))


X, HALVES = torch.zeros(2, 3, 4, 8), torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("gated_rows", (X, X[:1], 0)),
        ("gated_rows", (X, X.double(), 0)),
        ("gated_rows", (X, X, 3)),
        ("gated_rows", (X[..., :5], None, 0)),
        ("gated_grad_rows", (X[0], X, X, 0, True, True)),
        ("gated_grad_rows", (X.bfloat16(), X, X, 0, True, True)),
        ("rotary_rows", (X[0], None, HALVES, HALVES, None, 0, False, False)),
        ("rotary_rows", (X, X[:1], HALVES, HALVES, None, 0, False, False)),
        ("rotary_rows", (X, X[:, :, :3], HALVES, HALVES, None, 0, False, False)),
        ("rotary_rows", (X, None, HALVES, HALVES[:3], None, 0, False, False)),
        ("rotary_rows", (X, None, HALVES, HALVES, None, 1, False, False)),
        ("rotary_rows", (X, None, HALVES.repeat(1, 2), HALVES.repeat(1, 2), None, 0, False, False)),
        ("rotary_rows", (X, None, HALVES.expand(3, 4, 4), HALVES.expand(3, 4, 4), None, 0, False, False)),
        ("rotary_rows", (X, None, HALVES, HALVES, torch.zeros(3, dtype=torch.long), 0, False, False)),
    ],
)
def test_operators_read_nothing_that_does_not_fit(name, args):
    with pytest.raises((RuntimeError, ValueError), match=name):
        getattr(torch.ops.fastllm, name)(*args)
