"""Attention's operators and gradient: what the kernels and the eager chunks serve."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ...backends import plain_eager
from ...registry import define
from ..shared.autograd import apply, frozen, gradients, unwrapped
from .call import AttentionCall, ForwardResult, OutputGradients, Wanted
from .eager import eager_attention_bwd, eager_attention_fwd
from .native import native_attention_bwd, native_attention_fwd
from .reference import reference

# The fields of AttentionCall, in their order.
CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor? slopes, Tensor? seed, Tensor? cu_q, "
    "Tensor? cu_k, float scale, float softcap, int left, int right, bool bottom_right, float dropout_p"
)


def like_query(call: AttentionCall, heads: int, length: int, dim: int) -> torch.Tensor:
    """Uninitialised (B, heads, length, dim), laid out (B, length, heads, dim); packed (length, heads, dim), zeros."""
    if call.packed:
        # Nobody writes the rows past the last sequence.
        return call.q.new_zeros(length, heads, dim)
    return call.q.new_empty(call.q.shape[0], length, heads, dim).transpose(1, 2)


def _output(call: AttentionCall) -> torch.Tensor:
    heads, _, rows, _ = call.sizes()
    return like_query(call, heads, rows, call.v.shape[-1])


def _fwd_fake(*values):
    call = AttentionCall(*values[:-1])
    q = call.q
    heads, _, rows, _ = call.sizes()
    shape = (heads, rows) if call.packed else (q.shape[0], heads, rows)
    wide = torch.promote_types(q.dtype, torch.float32)
    return _output(call), q.new_empty(shape, dtype=wide), q.new_empty((2, *shape), dtype=wide)


@define(f"attention_fwd({CALL}, str backend) -> (Tensor, Tensor, Tensor)", _fwd_fake)
def _attention_fwd(*values):
    *values, backend = values
    call = AttentionCall(*values)
    out = _output(call)
    if backend in ("triton", "hopper") and call.bias is not None and call.packed:
        _assert_room(call.bias, call)
    return out, *_forward_of(backend)(call, out)


def _assert_room(bias: torch.Tensor, call: AttentionCall) -> None:
    """Fails on the device, before a kernel reads past the end of ``bias``, where a packed sequence is longer than that.

    The host does not wait. Along a dimension of one a bias is the same for any length.
    """
    sides = [(bias.shape[2], call.cu_q), (bias.shape[3], call.cu_k)]
    fits = [(starts.diff() <= most).all() for most, starts in sides if most != 1 and starts is not None]
    if fits:
        message = "attention: a sequence is longer than max_seqlen_q or max_seqlen_k"
        torch.ops.aten._assert_async.msg(functools.reduce(torch.logical_and, fits), message)


def _forward_of(backend: str):
    """The forward of a backend: ``(call, out) -> (lse, stats)``."""
    if backend == "hopper":
        from ...kernels.attention.hopper import attention_hopper_fwd

        return attention_hopper_fwd
    if backend == "triton":
        from ...kernels.attention.forward import attention_fwd

        return attention_fwd
    return native_attention_fwd if backend == "native" else eager_attention_fwd


def _buffers(call: AttentionCall, needs) -> Wanted:
    heads, heads_kv, rows, cols = call.sizes()
    shapes = ((call.q, heads, rows), (call.k, heads_kv, cols), (call.v, heads_kv, cols))
    dq, dk, dv = [
        like_query(call, h, s, x.shape[-1]) if need else None for (x, h, s), need in zip(shapes, needs[:3], strict=True)
    ]
    return Wanted(dq, dk, dv, needs[3], needs[4])


def _bwd_fake(dout, dlse, out, stats, needs, *values):
    call = AttentionCall(*values[:-1])
    wanted = _buffers(call, needs)
    grads = list(wanted[:3])
    for x, need in ((call.bias, wanted.bias), (call.sinks, wanted.sinks)):
        grads.append(x.new_empty(x.shape) if need and x is not None else None)
    return tuple(call.q.new_empty(0) if g is None else g for g in grads)


@define(
    f"attention_bwd(Tensor dout, Tensor? dlse, Tensor out, Tensor stats, bool[5] needs, {CALL}, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)
def _attention_bwd(dout, dlse, out, stats, needs, *values):
    *values, backend = values
    call = AttentionCall(*values)
    wanted = _buffers(call, needs)
    backward = _backward_of(backend)
    dbias, dsinks = backward(call, ForwardResult(out, stats), OutputGradients(dout, dlse), wanted)
    return tuple(call.q.new_empty(0) if g is None else g for g in (*wanted[:3], dbias, dsinks))


def _backward_of(backend: str):
    """The backward of a backend: ``(call, forward, upstream, wanted) -> (dbias, dsinks)``."""
    if backend in ("eager", "native"):
        return eager_attention_bwd if backend == "eager" else native_attention_bwd
    if backend == "hopper":
        from ...kernels.attention.hopper_backward import attention_hopper_bwd

        return attention_hopper_bwd
    from ...kernels.attention.backward import attention_bwd

    return attention_bwd


class _Served(NamedTuple):
    """What :class:`_Attention` takes besides what is differentiable: the rest of the call, and the backend.

    ``rest`` has None in place of the tensors that are arguments of their own: q, k, v and sinks.
    """

    rest: AttentionCall
    backend: str


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, bias, sinks, served):
        # A boolean mask has no derivative: it is in the rest.
        bias = served.rest.bias if bias is None else bias
        return _attention_fwd(*served.rest._replace(q=q, k=k, v=v, bias=bias, sinks=sinks), served.backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, bias, sinks, served = inputs
        out, lse, stats = output
        rest = served.rest
        ctx.served = _Served(
            rest._replace(bias=None, slopes=None, seed=None, cu_q=None, cu_k=None), served.backend
        )  # fmt: skip
        ctx.mark_non_differentiable(stats, *frozen(lse, (q, k, bias, sinks)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, bias, sinks, rest.bias, rest.slopes, rest.seed, rest.cu_q, rest.cu_k, out, stats)

    @staticmethod
    def backward(ctx, dout, dlse, _dstats):
        if dout is None and dlse is None:
            return (None,) * 6
        q, k, v, bias, sinks, *constants = ctx.saved_tensors
        options, backend = ctx.served

        def call_of(inputs, mask, slopes, seed, cu_q, cu_k):
            q, k, v, bias, sinks = inputs
            bias = mask if bias is None else bias
            return options._replace(
                q=q, k=k, v=v, bias=bias, sinks=sinks, slopes=slopes, seed=seed, cu_q=cu_q, cu_k=cu_k
            )

        def launch(inputs, outputs_grad, extras, needs):
            *constants, out, stats = extras
            dout, dlse = outputs_grad
            dout = torch.zeros_like(out) if dout is None else dout
            return _attention_bwd(dout, dlse, out, stats, needs, *call_of(inputs, *constants), backend)

        def formula(*inputs):
            return reference(call_of(inputs, *unwrapped(constants[:5])))

        inputs = (q, k, v, bias, sinks)
        grads = gradients(launch, formula, inputs, ctx.needs_input_grad[:5], (dout, dlse), constants)
        return *grads, None


def apply_attention(call: AttentionCall, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of a call, differentiable."""
    if plain_eager(backend):
        return reference(call)
    boolean = call.bias is not None and call.bias.dtype == torch.bool
    rest = call._replace(q=None, k=None, v=None, bias=call.bias if boolean else None, sinks=None)
    bias = None if boolean else call.bias
    out, lse, _ = apply(_Attention, call.q, call.k, call.v, bias, call.sinks, _Served(rest, backend))
    return out, lse
