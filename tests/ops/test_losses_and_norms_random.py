"""Norms and cross-entropies with random options together, against the fp64 definition; and where each known failure of
such libraries is tested.

25 draws an op; FASTLLM_TESTS=thorough draws 1000.

Silent wrong results and failures seen in other libraries (a name alone is a test of this file):

    h + norm(h) with a gradient used twice       test_norm: test_residual_chain_and_post_norm_residual
    two backwards with retain_graph              test_ops: test_two_backwards_agree_and_nothing_is_overwritten
    two backwards, upstream 2                    test_cross_entropy: test_the_gradient_handed_out_is_the_callers_own
    an auxiliary loss on the same logits         test_cross_entropy: test_auxiliary_loss_on_the_same_logits
    logits written to under no_grad              test_cross_entropy: test_no_grad_leaves_the_logits_alone
    hidden states frozen, head trained           test_linear_cross_entropy: test_frozen_parts_get_nothing_...
    dW over 128 chunks in bf16                   test_linear_cross_entropy: test_dw_over_many_chunks_is_as_good_...
    a target that is no class                    test_out_of_range_target there, test_errors_name_what_is_wrong here
    32768 leading -inf logits                    test_cross_entropy: test_leading_minus_infinities
    an empty batch                               test_ops: the samples no_rows
    all targets ignored                          test_ops: the samples all_ignored
    3-D logits, class probabilities              test_ops: the samples images, classes_last, probabilities
    a bf16 mean summed in bf16                   test_cross_entropy: test_mean_in_bf16_is_summed_in_fp32
    LayerNorm without a bias                     test_modules_without_parameters
    65537 columns                                test_rows_wider_than_any_tile
    gated activations, a second backward         test_ops: test_two_backwards_agree_and_nothing_is_overwritten
    only under a GPU                             every test of this suite runs the kernels in the interpreter
    embeddings, importing the package            test_embedding, test_registry

and what goes wrong inside such kernels:

    mean and rstd in bf16                        test_statistics_are_fp32
    row losses in bf16                           test_cross_entropy: test_mean_in_bf16_is_summed_in_fp32
    p - 1 after rounding p                       test_cross_entropy: test_the_targets_own_gradient_keeps_its_...
    tail lanes in the variance                   test_ops: the sample large_mean
    more rows than programs; fewer               test_ops: the samples 300x8, 1x9, on poisoned memory
    rows further apart than 2^31 elements        test_rows_further_apart_than_32_bits_reach
    upstream gradients expanded or uneven        test_ops: test_upstream_gradients_of_any_layout
    -inf logits                                  test_cross_entropy: test_infinite_loss_and_nan_where_torch_has_them
    Python floats as fp64 in a kernel            test_static: test_norms_use_no_fp64, test_losses_and_...
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from contract import assert_all_as_true, copy, run, truth_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thorough import IS_THOROUGH

import fastllm
from fastllm import OPS
from fastllm.backends import why_not
from fastllm.functional import cross_entropy, layer_norm, linear_cross_entropy, rms_norm, swiglu
from fastllm.kernels.norm.forward import norm_fwd
from fastllm.ops.norm.call import NormForward
from fastllm.registry import Sample

pytestmark = [pytest.mark.cpu_level, pytest.mark.runs_on("gpu", "interpreter")]

DRAWS = 1000 if IS_THOROUGH else 25
RANDOM = settings(
    max_examples=DRAWS, deadline=None, derandomize=DRAWS <= 25, suppress_health_check=list(HealthCheck), database=None
)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def _agrees(op, sample: Sample, dtype: torch.dtype, floor: float = 4.0) -> None:
    """Kernels and eager against the definition in fp64, outputs and gradients."""
    yardstick = run(op.function, copy(sample), "eager")
    for backend in (name for name in op.backends if name != "eager" and why_not(name, DEVICE.type, op=op) is None):
        got = run(op.function, copy(sample), backend)
        what = f"{op.name}/{backend} {sample.kwargs}"
        assert_all_as_true(got, truth_of(op, sample), yardstick, dtype, what, floor=floor)


def _laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, contiguous, as a window of something wider, or with the last two dimensions swapped."""
    if layout == "window":
        wide = values.new_full((*values.shape[:-1], values.shape[-1] + 5), 7.0)
        wide[..., 3:-2] = values
        return wide[..., 3:-2]
    return values.mT.contiguous().mT if layout == "swapped" and values.dim() > 1 else values


LAYOUTS = st.sampled_from(["contiguous", "window", "swapped"])


@RANDOM
@given(
    dtype=DTYPES, layout=LAYOUTS, rows=st.integers(0, 7), classes=st.sampled_from([1, 2, 33, 128, 300]),
    positions=st.sampled_from([None, 1, 5]), kind=st.sampled_from(["indices", "few", "ignored", "probabilities"]),
    weighted=st.booleans(), seed=st.integers(0, 9),
    options=st.fixed_dictionaries(
        {
            "reduction": st.sampled_from(["none", "mean", "sum"]),
            "label_smoothing": st.sampled_from([0.0, 0.2, 1.0]),
            "softcap": st.sampled_from([None, 3.0]),
            "logit_scale": st.sampled_from([1.0, -0.5, 20.0]),
            "z_loss": st.sampled_from([0.0, 0.1]),
            "return_lse": st.booleans(),
        }
    ),
)  # fmt: skip
def test_cross_entropy(dtype, layout, rows, classes, positions, kind, weighted, seed, options):
    torch.manual_seed(seed)
    shape = (rows, classes) if positions is None else (rows, classes, positions)
    x = _laid_out((torch.randn(shape, device=DEVICE) * 3).to(dtype), layout)
    if kind == "probabilities":
        target = torch.softmax(torch.randn(shape, device=DEVICE), 1).to(dtype).requires_grad_()
    else:
        target = torch.randint(0, classes, (rows, *shape[2:]), device=DEVICE)
        share = {"indices": 0.0, "few": 0.5, "ignored": 1.0}[kind]
        target = torch.where(torch.rand(target.shape, device=DEVICE) < share, -100, target)
    if weighted:
        options = options | {"weight": torch.rand(classes, device=DEVICE).to(dtype) + 0.5}
    # The gradient is logit_scale times numbers of order 1, and so is their rounding.
    floor = 4.0 * max(1.0, abs(options["logit_scale"]))
    _agrees(OPS["cross_entropy"], Sample("", (x.requires_grad_(), target), options), dtype, floor)


@RANDOM
@given(
    name=st.sampled_from(["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"]), dtype=DTYPES, layout=LAYOUTS,
    rows=st.integers(0, 9), heads=st.sampled_from([None, 1, 3]), cols=st.sampled_from([2, 8, 33, 128, 250]),
    weight=st.sampled_from([None, "same", "fp32"]), bias=st.booleans(), wide=st.booleans(), seed=st.integers(0, 9),
    offset=st.sampled_from([0.0, 1.0]), eps=st.sampled_from([1e-5, 1e-2]),
)  # fmt: skip
def test_norms(name, dtype, layout, rows, heads, cols, weight, bias, wide, seed, offset, eps):
    torch.manual_seed(seed)
    shape = (rows, cols) if heads is None else (rows, heads, cols)

    def made(*shape, dtype=dtype):
        return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()

    # Values well apart: with two columns alike, 1/std is 1/sqrt(eps), which eager PyTorch's own steps amplify.
    spread = torch.linspace(-2, 2, cols, device=DEVICE)
    inputs = [_laid_out((made(*shape) + spread).detach().to(dtype), layout).requires_grad_()]
    if name.startswith("add"):
        inputs.append(made(*shape, dtype=torch.float32 if wide else dtype))
    options = {"eps": eps, "weight_offset": offset}
    if weight is not None:
        options["weight"] = made(cols, dtype=torch.float32 if weight == "fp32" else dtype)
    if bias and name.endswith("layer_norm"):
        options["bias"] = made(cols)
    _agrees(OPS[name], Sample("", (*inputs, (cols,)), options), dtype)


@pytest.mark.parametrize("classes", [1, 2, 4097, 32769, 300_000])
def test_vocabularies_of_one_to_300_thousand(classes):
    x = torch.randn(2, classes, device=DEVICE, requires_grad=True)
    y = torch.tensor([classes - 1, 0], device=DEVICE)
    hidden = torch.randn(2, 2, device=DEVICE, requires_grad=True)
    w = torch.randn(classes, 2, device=DEVICE, requires_grad=True)
    with fastllm.backend("triton"):
        mine = torch.autograd.grad(cross_entropy(x, y), x)
        linear = torch.autograd.grad(linear_cross_entropy(hidden, w, y), (hidden, w))
    torch.testing.assert_close(mine, torch.autograd.grad(F.cross_entropy(x, y), x))
    torch.testing.assert_close(linear, torch.autograd.grad(F.cross_entropy(hidden @ w.t(), y), (hidden, w)))


@pytest.mark.parametrize(
    ("cols", "dtype"), [(65537, torch.float32), (65537, torch.bfloat16), (262_144, torch.bfloat16)]
)
def test_rows_wider_than_any_tile(cols, dtype):
    x = (torch.randn(2, cols, device=DEVICE) + 3).to(dtype).requires_grad_()
    weight, bias = (torch.randn(cols, device=DEVICE).to(dtype).requires_grad_() for _ in range(2))
    _agrees(OPS["layer_norm"], Sample("", (x, (cols,)), {"weight": weight, "bias": bias}), dtype)


def test_rows_further_apart_than_32_bits_reach():
    """Two rows 2^31 elements apart; the memory between them is never touched, so it takes no room."""
    rows = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 64), (2**31, 1))
    rows.copy_(torch.randn(2, 64))
    near = rows.clone().contiguous()
    y = torch.tensor([3, 63], device=DEVICE)
    calls = {
        "layer_norm": lambda x: layer_norm(x, (64,)),
        "rms_norm": lambda x: rms_norm(x, (64,)),
        "cross_entropy": lambda x: cross_entropy(x, y, reduction="none"),
        "swiglu": lambda x: swiglu(x),
        "rotary_embedding": lambda x: fastllm.functional.rotary_embedding(
            x.unsqueeze(1), None, torch.ones(2, 16, device=DEVICE), torch.ones(2, 16, device=DEVICE)
        )[0],
    }
    for name, call in calls.items():
        found = []
        for x in (rows, near):
            x = x.detach().requires_grad_()
            with fastllm.backend("triton"):
                out = call(x)
                found.append((out, *torch.autograd.grad(out.float().square().sum(), x)))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b), name


def test_classes_further_apart_than_32_bits_reach():
    """The last of 16 classes lies 15 * 2^28 elements behind the first, in logits and in the targets' probabilities."""
    step = 2**28
    whole = torch.empty(16 * step, dtype=torch.bfloat16, device=DEVICE)
    logits, q = (whole.as_strided((3, 16), (1, step), start) for start in (0, 8))
    logits.copy_(torch.randn(3, 16))
    q.copy_(torch.randn(3, 16).softmax(1))
    for target in (torch.tensor([3, 15, 8], device=DEVICE), q):
        found = []
        for x, y in ((logits, target), (logits.contiguous(), target.contiguous())):
            x = x.detach().requires_grad_()
            with fastllm.backend("triton"):
                loss = cross_entropy(x, y, reduction="none")
                found.append((loss, *torch.autograd.grad(loss.float().square().sum(), x)))
        torch.testing.assert_close(*found)


def test_statistics_are_fp32():
    x = torch.randn(3, 40, device=DEVICE).bfloat16()
    _, _, mean, rstd = norm_fwd(NormForward(x, None, None, None, None, 1e-5, 0.0, 0.0, True, "triton"))
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean, x.float().mean(1))
    torch.testing.assert_close(rstd, (x.float().var(1, unbiased=False) + 1e-5).rsqrt())


def test_modules_without_parameters():
    x = torch.randn(3, 8, device=DEVICE)
    for backend in ("eager", "triton"):
        with fastllm.backend(backend):
            for options in ({"bias": False}, {"elementwise_affine": False}):
                module = fastllm.nn.LayerNorm(8, **options).to(DEVICE)
                assert list(module.state_dict()) == list(torch.nn.LayerNorm(8, **options).state_dict())
                torch.testing.assert_close(module(x), F.layer_norm(x, (8,)))
            torch.testing.assert_close(fastllm.nn.RMSNorm(8, elementwise_affine=False)(x), F.rms_norm(x, (8,)))
