"""Which form serves a call whose backend is eager: AMX, one query by the extension, PyTorch's operator, or chunks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...backends import Choice, forward_mode, operators_alone
from ..shared.widened import widens
from .amx import amx_attention, amx_refuses
from .call import AttentionCall, AttentionForm, AttentionRequest, TorchArguments
from .step import step_attention, takes_step
from .widened import widened_attention

AMX, STEP, TORCH, CHUNKS = "AMX", "one query by the extension", "PyTorch's operator", "chunks of scores"
WIDENED = "PyTorch's operator in float32, some heads at a time"
# Where PyTorch's operator keeps all scores, it still serves a call of at most FEW_SCORES, with the arguments as they
# were given. It keeps them below four dimensions, where it multiplies 16-bit inputs in fp32, and for a mask's gradient.
FEW_SCORES = 2**16
# Scores of one head up to which PyTorch multiplies 16 bits itself: a decoder's first steps. One core of an AMD EPYC
# held to AVX2, one query of 8 heads of 64 in bfloat16, us: 1 key 5 by PyTorch and 81 in float32, 32 keys 24 and 71,
# 128 keys 86 and 91, 512 keys 370 and 170.
FEW_NARROW_SCORES = 32
# The smallest normal number of the dtype that scores are computed in: fp32, and fp64 for tensors in fp64.
MIN_NORMAL, MIN_NORMAL_DOUBLE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float64).tiny


_STEP = AttentionForm(STEP, "the extension reads keys and values once for one query")
_PLAIN = AttentionForm(TORCH, "its fused kernel holds no more than a block of scores")


def formed(request: AttentionRequest) -> AttentionRequest:
    """``request`` with its form, on a CPU, where the choice of a backend asks for it: it takes 2 us to find."""
    if not request.call.q.is_cpu:
        return request
    return request._replace(form=_found_form(request, ours=True))


def form_of(request: AttentionRequest, choice: Choice) -> AttentionForm | None:
    """The form that serves a call which ``choice`` leaves to eager, and why; None where another backend serves."""
    return eager_form(request, choice.asked) if choice.backend == "eager" else None


def eager_form(request: AttentionRequest, asked: bool = False) -> AttentionForm:
    """The form in which eager serves a call, and why. ``asked``: whether somebody asked for eager."""
    form = request.form
    return _found_form(request, ours=not asked) if form is None or (asked and form.name in (AMX, STEP)) else form


def _found_form(request: AttentionRequest, *, ours: bool) -> AttentionForm:
    """As :func:`eager_form`. ``ours``: whether the extension's are among the forms."""
    call = request.call
    one = ours and not call.causal and call.dropout_p == 0.0 and takes_step(call.q, call.k, call.v, call.bias)
    if one and _only_chunks(request) is None:
        return _STEP
    wide = widens(call.q) and not operators_alone() and call.q.layout == torch.strided
    if request.given is not None:
        if not wide and _few(call, request.given):
            return AttentionForm(TORCH, f"it has at most {FEW_SCORES} scores", as_given=True)
        if not wide and call.dropout_p > 0:
            return AttentionForm(TORCH, "PyTorch's generator draws the dropout mask, as without fastllm")
        if call.k.shape[1] != call.v.shape[1]:
            return AttentionForm(TORCH, "key and value have different numbers of heads")
    reason = _only_chunks(request)
    if reason is None:
        if ours and amx_refuses(call) is None:
            return AttentionForm(AMX, "the extension multiplies bfloat16 on this CPU's matrix units")
        reason = torch_fault(call)
    if reason is not None:
        return AttentionForm(CHUNKS, reason)
    if wide:
        if call.dropout_p > 0:
            return AttentionForm(CHUNKS, "this CPU has no products of that dtype, and they drop scores in float32")
        if call.q.shape[-2] * call.k.shape[-2] <= FEW_NARROW_SCORES:
            return AttentionForm(TORCH, f"a head has at most {FEW_NARROW_SCORES} scores")
        return AttentionForm(WIDENED, "this CPU has no products of that dtype")
    return _PLAIN


def _few(call: AttentionCall, given: TorchArguments) -> bool:
    if call.bottom_right or call.q.shape[-2] * call.k.shape[-2] > FEW_SCORES:
        return False
    if given.query.dim() < 4:
        return True
    if forward_mode():
        return False
    # In four dimensions PyTorch's fused kernel takes a mask, unless the mask has a gradient or scores are dropped.
    fused = call.dropout_p == 0 and not has_gradient(call.bias)
    return call.bias is not None and not (fused and torch_fault(call) is not None)


def has_gradient(x: torch.Tensor | None) -> bool:
    """Whether a backward pass will want the gradient of ``x``."""
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def _only_chunks(request: AttentionRequest) -> str | None:
    """What the call asks for that only our chunks can do, or None."""
    feature = _feature(request)
    if feature is not None:
        return f"PyTorch's fused kernel does not take {feature}"
    call = request.call
    if call.q.numel() == 0 or call.k.numel() == 0:
        return "the call is empty"
    if has_gradient(call.bias):
        return "PyTorch's operator keeps all scores for the gradient of a mask"
    if call.q.device.type == "cpu" and forward_mode():
        return "PyTorch's fused kernel has no forward-mode differentiation"
    return None


def _feature(request: AttentionRequest) -> str | None:
    call = request.call
    if call.cu_q is not None:
        return "packed sequences"
    if call.softcap > 0:
        return "a soft cap"
    if call.slopes is not None:
        return "ALiBi slopes"
    if call.sinks is not None:
        return "sinks"
    if call.left >= 0 or call.right > 0:
        return "a window"
    if call.seed is not None:
        return "a dropout mask that every backend agrees on"
    if request.return_lse:
        return "the log-sum-exp as an output"
    if call.causal and call.bias is not None:
        return "a causal edge beside a mask"
    if call.bottom_right and call.causal and not call.square:
        return "a bottom-right causal edge"
    if call.q.shape[-1] != call.v.shape[-1]:
        return "a value of another head dim"
    return None


def torch_fault(call: AttentionCall) -> str | None:
    """Why PyTorch's fused kernel on CPUs would give wrong numbers, or None.

    Both faults are in torch 2.11 to 2.13. Its causal edge multiplies -inf by the scale, so that a scale of 0 gives NaN
    and a negative one shows what is hidden; a scale below the smallest normal number becomes 0. Its backward computes a
    probability as exp(t - lse). Where a mask adds -1e38 to a whole row, lse has no digit left for the sum, and each of
    n keys gets a probability of 1 instead of 1 / n.
    """
    if not call.q.is_cpu:
        return None
    # Not by an index: the torch.compile of torch 2.11 takes no bool for one.
    smallest = MIN_NORMAL_DOUBLE if call.q.dtype == torch.float64 else MIN_NORMAL
    if not smallest <= call.scale <= 1 / smallest:
        return f"PyTorch's fused kernel is wrong for a scale of {call.scale:.3g}"
    if call.bias is not None and call.bias.is_floating_point() and any(map(has_gradient, (call.q, call.k, call.v))):
        return "PyTorch's fused backward is wrong for rows that an added mask hides without -inf"
    return None


def _taken(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A mask in a dtype that PyTorch's operator takes, boolean, query's or float32 beside 16 bits.

    Its fused kernel on CPUs takes float32 beside float64 too, and reads it as float64 (torch 2.11 to 2.13).
    """
    if not mask.is_floating_point() or mask.dtype == query.dtype:
        return mask
    return mask.to(query.dtype if query.dtype.itemsize > 2 else torch.float32)


def attention_by_form(request: AttentionRequest, form: AttentionForm) -> torch.Tensor:
    """The output by AMX or PyTorch's operator; of the given shape if ``form.as_given``, else (B, H, Sq, Dv)."""
    call, given = request.call, request.given
    if form.as_given and given is not None:
        query, key, value, mask, dropout_p, causal, scale, gqa = given
        if mask is not None and call.bias is not None:  # not a CausalBias
            mask = _taken(mask, query)
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, causal, scale=scale, enable_gqa=gqa
        )  # fmt: skip
    if form.name == AMX:
        return amx_attention(call)
    if form.name == STEP:
        return step_attention(call)
    if form.name == WIDENED:
        return widened_attention(call)
    mask = None if call.bias is None else _taken(call.bias, call.q)
    if call.bottom_right and call.causal and not call.square:
        rows, cols = call.q.shape[-2], call.k.shape[-2]
        mask = torch.ones(rows, cols, dtype=torch.bool, device=call.q.device).tril(cols - rows)
    causal = call.causal and mask is None
    # A plain bool even where the shapes are symbolic.
    gqa = True if not call.q.shape[1] == call.k.shape[1] == call.v.shape[1] else False  # noqa: SIM210
    return F.scaled_dot_product_attention(
        call.q, call.k, call.v, mask, call.dropout_p, causal, scale=call.scale, enable_gqa=gqa
    )
