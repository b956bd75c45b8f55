"""An argument of the wrong kind is named in the error, and an id out of range by its place in the caller's tensor."""

from __future__ import annotations

import inspect

import pytest
import torch

import fastllm
from fastllm import functional as FF
from fastllm.ops.cross_entropy.loss import row_out_of_range
from fastllm.registry import OPS

pytestmark = pytest.mark.runs_on("anywhere")

# Options that are only asked whether they are true, as torch asks them.
TRUTH = {
    "causal", "return_lse", "is_causal", "enable_gqa", "size_average", "reduce", "inplace", "recompute",
    "scale_grad_by_freq", "interleaved",
}  # fmt: skip
# torch takes it and has no use for it.
UNREAD = {("linear_cross_entropy", "options")}


class Odd:
    """No number, no tensor, no sequence."""


@pytest.mark.parametrize("name", OPS)
def test_an_argument_of_the_wrong_kind_is_named(name):
    op = OPS[name]
    sample = next(iter(op.samples(torch.device("cpu"), torch.float32)))
    signature = inspect.signature(op.function)
    given = signature.bind(*sample.args, **sample.kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.name in TRUTH or (name, parameter.name) in UNREAD:
            continue
        for value in (Odd(), "x", [object()]):
            bound = inspect.BoundArguments(signature, dict(given))
            bound.arguments[parameter.name] = value
            bound.apply_defaults()
            with pytest.raises((TypeError, ValueError)) as raised:
                op.function(*bound.args, **bound.kwargs)
            assert parameter.name in str(raised.value), (parameter.name, value, raised.value)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 4)])
def test_a_bad_target_is_named_by_its_place(backend, shape):
    target = torch.ones(shape, dtype=torch.int64)
    last = tuple(size - 1 for size in shape)
    target[last] = 7
    place = rf"target 7 at position \[{', '.join(map(str, last))}\] is out" if shape else "target 7 is out"
    x, w = torch.randn(*shape, 3), torch.randn(5, 3)
    logits = torch.randn(*shape, 5) if len(shape) < 2 else torch.randn(*shape, 5).movedim(-1, 1)
    with fastllm.backend(backend):
        with pytest.raises(IndexError, match=f"^cross_entropy: {place}"):
            FF.cross_entropy(logits, target)
        for op in (FF.linear_cross_entropy, FF.linear_log_probs):
            with pytest.raises(IndexError, match=f"^{op.__name__}: {place}"):
                op(x, w, target)
            if shape:
                # Bad targets before it are no input's.
                unread = target.clone()
                unread[..., 0] = 9
                with pytest.raises(IndexError, match=f"^{op.__name__}: {place}"):
                    op(x, w, unread, shift=1)


def test_where_the_targets_shape_is_lost_a_bad_target_is_named_by_its_row():
    target = torch.tensor([[1, -100, 2], [0, 1, 7]])
    error = row_out_of_range(target, -100, 5, "linear_cross_entropy")
    assert str(error).startswith("linear_cross_entropy: target 7 of row 5 of the logits is out of range")
    assert row_out_of_range(target, 7, 5, "linear_cross_entropy") is not None
    assert row_out_of_range(target.clamp(max=4), -100, 5, "linear_cross_entropy") is None
