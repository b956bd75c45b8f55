"""In the extension's C++ a row has the same bits in any batch, at any place in it, and on any number of threads."""

import pytest
import torch

import fastllm
from fastllm import functional
from fastllm.registry import OPS

pytestmark = [pytest.mark.cpu_level, pytest.mark.skipif(fastllm.extension.missing() is not None, reason="no extension")]

ROWS, WIDTH = 41, 77
PARTS = [slice(0, 1), slice(7, 8), slice(5, 22), slice(9, ROWS)]


def _norm(name, tensors):
    weight = torch.linspace(0.5, 1.5, WIDTH).to(tensors[0].dtype)

    def call(rows, *leaves):
        return getattr(functional, name)(*leaves, (WIDTH,), weight)

    return call


def _loss(name, tensors):
    target = torch.arange(ROWS) % WIDTH

    def call(rows, x):
        return functional.cross_entropy(x, target[rows], reduction="none", label_smoothing=0.1, return_lse=True)

    return call


def _gated(name, tensors):
    return lambda rows, gate, up: getattr(functional, name)(gate, up)


def _rotary(name, tensors):
    angles = torch.rand(ROWS, WIDTH // 2)

    def call(rows, x):
        x = x.unsqueeze(0).unsqueeze(0)
        return functional.rotary_embedding(x, None, angles.cos()[rows], angles.sin()[rows])[0][0, 0]

    return call


def _embedding(name, tensors):
    ids, table = torch.arange(ROWS) * 7 % 13, torch.randn(13, WIDTH).to(tensors[0].dtype)
    return lambda rows, x: functional.embedding(ids[rows], table) + x


def _embedding_sum(name, tensors):
    ids, tables = torch.arange(ROWS) * 7 % 13, [torch.randn(13, WIDTH).to(tensors[0].dtype) for _ in range(3)]
    return lambda rows, x: functional.embedding_sum([ids[rows], ids[rows] // 2, ids[rows] // 3], tables, scale=0.3) + x


def _attention(name, tensors):
    causal = {"attention": "causal", "scaled_dot_product_attention": "is_causal"}[name]

    def call(rows, *leaves):
        q, k, v = (x.view(len(x), 1, 7, WIDTH // 7) for x in leaves)
        return getattr(functional, name)(q, k, v, **{causal: True}).flatten(1)

    return call


# Op -> what makes its call of some rows, and how many tensors of rows it takes.
CALLS = {
    "layer_norm": (_norm, 1),
    "rms_norm": (_norm, 1),
    "add_layer_norm": (_norm, 2),
    "add_rms_norm": (_norm, 2),
    "cross_entropy": (_loss, 1),
    "swiglu": (_gated, 2),
    "geglu": (_gated, 2),
    "rotary_embedding": (_rotary, 1),
    "embedding": (_embedding, 1),
    "embedding_sum": (_embedding_sum, 1),
    "attention": (_attention, 3),
    "scaled_dot_product_attention": (_attention, 3),
}
# Its products are PyTorch's, whose library orders sums by the shape of the matrix.
OF_PYTORCH = {"linear_cross_entropy", "linear_kl_div", "linear_log_probs"}


def test_every_native_op_is_here():
    native = {op.name for op in OPS.values() if "native" in op.backends and "cpu" in op.native_on}
    assert native == set(CALLS) | OF_PYTORCH


def _bits(call, rows, leaves):
    leaves = [x[rows].detach().requires_grad_() for x in leaves]
    outs = call(rows, *leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = torch.autograd.grad(outs, leaves, [y.detach() for y in outs])
    return [*(y.detach() for y in outs), *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_row_does_not_depend_on_its_batch(name, dtype):
    make, tensors = CALLS[name]
    leaves = [torch.randn(ROWS, WIDTH).to(dtype) for _ in range(tensors)]
    before = torch.get_num_threads()
    try:
        with fastllm.backend("native"):
            call = make(name, leaves)
            torch.set_num_threads(2)
            whole = _bits(call, slice(None), leaves)
            torch.set_num_threads(1)
            for rows in PARTS:
                for found, expected in zip(_bits(call, rows, leaves), whole, strict=True):
                    assert torch.equal(found, expected[rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [8, 100, 768])
@pytest.mark.parametrize("name", ["swiglu", "geglu", "geglu by tanh"])
def test_a_gated_row_has_the_same_bits_in_any_batch_by_default(name, columns, dtype):
    """PyTorch's own operators compute a tensor's last elements by other code than the rest."""
    options = {"approximate": "tanh"} if name == "geglu by tanh" else {}
    function = getattr(functional, name.split()[0])
    gate, up = torch.randn(2, 64, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = function(gate, up, **options)
    for count in (1, 2, 3, 32):
        assert torch.equal(function(gate[:count], up[:count], **options), whole[:count])
