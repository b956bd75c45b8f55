"""One tensor given twice, or as a view of itself, where torch.compile traces a call whole."""

import pytest
import torch
from thorough import IS_THOROUGH

import fastllm
from fastllm.functional import attention, scaled_dot_product_attention
from fastllm.nn import MultiheadAttention

STARTS = torch.tensor([0, 4, 9])


def _packed(q, k, v):
    flat = [x[0].transpose(0, 1) for x in (q, k, v)]
    return attention(*flat, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS)


FORMS = {
    "window": lambda q, k, v: attention(q, k, v, window=(3, 0)),
    "sinks that are slopes": lambda q, k, v: attention(
        q, k, v, sinks=q[0, :, 0, 0].detach(), alibi_slopes=q[0, :, 0, 0].detach()
    ),
    "a bias of the query": lambda q, k, v: attention(q, k, v, bias=q[..., :1]),
    "packed": _packed,
    "plain": lambda q, k, v: attention(q, k, v, causal=True),
    "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, scale=-1.0),
}


# The inputs of the compiled function by number, and what it makes of them.
PAIRS = {
    "key is value": ((0, 1, 1), lambda q, k, v: (q, k, v)),
    "query is key": ((0, 0, 1), lambda q, k, v: (q, k, v)),
    "all one": ((0, 0, 0), lambda q, k, v: (q, k, v)),
    "key is value inside": ((0, 1, 2), lambda q, k, v: (q, k, k)),
    "views": ((0, 0, 0), lambda q, k, v: (q, k[:], v.view(1, 2, 9, 8))),
    "detached": ((0, 1, 1), lambda q, k, v: (q, k, v.detach())),
}


CASES = [*((form, "eager") for form in FORMS), ("packed", "triton")]


@pytest.mark.parametrize(("form", "backend"), CASES)
def test_a_tensor_given_twice_compiles_whole(form, backend):
    # Each is a compilation: the forms take turns with the pairs, the packed one on eager has all.
    every, at = list(PAIRS), CASES.index((form, backend))
    names = every if IS_THOROUGH or (form, backend) == ("packed", "eager") else every[at % 2 :: 2]
    with fastllm.backend(backend):
        for name in names:
            inputs, views = PAIRS[name]
            torch.compiler.reset()

            def function(*tensors, views=views):
                return FORMS[form](*views(*tensors))

            leaves = [torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(max(inputs) + 1)]
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            results = []
            for call in (function, compiled):
                out = call(*(leaves[i] for i in inputs))
                grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True)
                results.append([out, *grads])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_multihead_attention_of_one_tensor_compiles_whole():
    module = MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, _ = module(x, x, x, need_weights=False)
    out, _ = compiled(x, x, x, need_weights=False)
    torch.testing.assert_close(out, expected)
    for a, b in zip(*(torch.autograd.grad(y.sum(), x) for y in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)
