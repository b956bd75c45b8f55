"""Logits that are computed when somebody reads them, and whose cross-entropy never computes them all."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..backends import BackendError
from ..functional import linear, linear_cross_entropy
from ..ops.shared.widened import widens
from .calls import serve
from .deferred import WATCH, Deferred, as_in_the_forward, defer
from .logit_steps import step_after
from .plain import plain

SKIP = 'fastllm.accelerate(model, skip="linear_cross_entropy") keeps logits as they were'
TOO_LATE = f"the loss of these logits was taken without computing them; {SKIP}"


class _Values(torch.autograd.Function):
    """From a :class:`Deferred` to its values: the gradient passes through it, and through hooks on it."""

    @staticmethod
    def forward(ctx, tensor, plan):
        return plan.compute()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _widened_product(a, b):
    """``a @ b`` of 16-bit tensors where the CPU has no such products."""
    return linear(a, b.t())


def _autocast_state(device_type: str):
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


class _Loss(NamedTuple):
    """What ``F.cross_entropy`` was asked for after its logits."""

    target: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    size_average: bool | None = None
    ignore_index: int = -100
    reduce: bool | None = None
    reduction: str = "mean"
    label_smoothing: float = 0.0


class Logits:
    """The plan of ``linear(hidden, weight, bias)``, reshaped, indexed, cast, scaled and soft-capped since.

    Each step is a plan of its own, with its parent; ``rows`` are the hidden states that belong to its rows.
    """

    too_late = TOO_LATE

    def __init__(
        self, hidden, weight, bias, *, parent: Logits | None = None, step: Any = None, view=False, rows=None, shape,
        dtype, strides=None,
    ):  # fmt: skip
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.parent, self.step, self.view = parent, step, view
        self.rows = hidden if rows is None else rows
        self.shape, self.dtype, self.strides = torch.Size(shape), dtype, strides  # strides None: contiguous
        self.class_dim = len(shape) - 1
        # last: the last factor; pending: the soft cap that tanh has begun.
        self.scale, self.softcap, self.last, self.pending = 1.0, None, 1.0, None
        self.shift: Any = None  # a constant for each class, added since: (..., V), its own copy
        self.value: Any = None  # once they were read
        self.version: int | None = None
        self.parent_tensor: Any = None
        self.consumed = False
        if parent is None:
            self.autocast = _autocast_state(hidden.device.type)
            self.versions = [t if t is None else t._version for t in (hidden, weight, bias)]
        else:
            self.autocast, self.versions = parent.autocast, parent.versions

    @staticmethod
    def of(hidden, weight, bias) -> Deferred:
        """Deferred ``F.linear(hidden, weight, bias)``."""
        narrow, dtype = _autocast_state(hidden.device.type)
        shape = (*hidden.shape[:-1], weight.shape[0])
        narrow = narrow and hidden.dtype != torch.float64
        plan = Logits(hidden, weight, bias, shape=shape, dtype=dtype if narrow else hidden.dtype)
        return defer(plan, hidden, weight, *([] if bias is None else [bias]))

    def _check_fresh(self) -> None:
        for tensor, version in zip((self.hidden, self.weight, self.bias), self.versions, strict=True):
            if tensor is None:
                continue
            if tensor._version != version:
                raise RuntimeError(
                    "these logits were not computed in the forward, and the weights or hidden states that they are "
                    "made of have changed since (an optimizer's step?). Either read them before the change "
                    f"(logits = outputs.logits + 0 before optimizer.step()), or have every forward compute them: {SKIP}"
                )
            if tensor.untyped_storage().nbytes() == 0 and tensor.numel():
                raise RuntimeError(
                    "these logits were not computed in the forward, and their weights have been freed since (sharded "
                    f"parameters); read them inside the forward, or {SKIP}"
                )

    def compute(self) -> torch.Tensor:
        self._check_fresh()
        with torch.autocast(self.hidden.device.type, self.autocast[1], enabled=self.autocast[0]):
            flat = linear(self.hidden.flatten(0, -2), self.weight, self.bias)
        # Not a view in autograd's eyes: it may then be changed in place outside the node that makes it.
        return torch.ops.aten._unsafe_view(flat, (*self.hidden.shape[:-1], len(self.weight)))

    def read(self, tensor: Deferred) -> torch.Tensor:
        """The values, computed once; changes in place then show in what was derived from them as views."""
        if self.value is None:
            with as_in_the_forward(True):
                self.value = self._make(tensor)
            self.version = self.value._version
        return self.value if torch.is_grad_enabled() else self.value.detach()

    def _make(self, tensor: Deferred) -> torch.Tensor:
        if self.parent is None:
            return _Values.apply(tensor, self)
        base = self.parent.read(self.parent_tensor)
        if not self.view and self.parent._changed():
            # Somebody has changed the parent in place since; what was derived before did not change with it.
            base = self.parent._anew()
        return self.step(base)

    def _changed(self) -> bool:
        """Whether these values, or those that they were derived from, have been changed in place since."""
        here = self.value is not None and self.value._version != self.version
        return here or (self.parent is not None and self.parent._changed())

    def _anew(self) -> torch.Tensor:
        return self.compute() if self.parent is None else self.step(self.parent._anew())

    def gradients(self, grad, inputs, needs):
        if self.parent is not None:
            with torch.enable_grad():
                pull = torch.func.vjp(self.step, self.parent.read(self.parent_tensor).detach())[1]
            return pull(grad)
        hidden, weight = (t.to(grad.dtype) for t in inputs[:2])
        flat = grad.reshape(-1, grad.shape[-1])
        grads: list[torch.Tensor | None] = [None] * len(inputs)
        product = _widened_product if widens(grad) else torch.matmul
        if needs[0]:
            grads[0] = product(grad, weight).to(inputs[0].dtype)
        if needs[1]:
            grads[1] = product(flat.t(), hidden.reshape(-1, hidden.shape[-1])).to(inputs[1].dtype)
        if len(inputs) > 2 and needs[2]:
            grads[2] = flat.sum(0).to(inputs[2].dtype)
        return grads

    def laid_out(self) -> torch.Tensor:
        """A tensor without values of the values' shape, strides and dtype."""
        if self.strides is None:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")

    def derive(self, tensor, step, *, rows=None, result=None, class_dim=None, cast=False, **changes) -> Deferred:
        """``step`` of these logits; ``result`` is its output laid out, found by ``step`` itself unless given."""
        before = self.laid_out()
        result = step(before) if result is None else result
        plan = Logits(
            self.hidden, self.weight, self.bias, parent=self, step=step, view=result is before or result._is_view(),
            rows=self.rows if rows is None else rows, shape=result.shape, dtype=result.dtype, strides=result.stride(),
        )  # fmt: skip
        plan.class_dim = (result.dim() - 1) if class_dim is None else class_dim
        plan.parent_tensor = tensor
        plan.scale, plan.softcap, plan.pending, plan.shift = self.scale, self.softcap, self.pending, self.shift
        plan.last = self.last if cast else 1.0
        for name, value in changes.items():
            setattr(plan, name, value)
        return defer(plan, tensor)

    def _unread(self) -> bool:
        plan = self
        while plan is not None:
            if plan.value is not None:
                return False
            plan = plan.parent
        return True

    def handle(self, tensor, func, args, kwargs):
        """What ``func`` gives without the values, or NotImplemented."""
        if func is torch.autograd.grad:
            return NotImplemented
        if func in WATCH:
            self.read(tensor)  # from here on they are ordinary logits, whose loss passes through them
            return NotImplemented
        if not self._unread():
            return NotImplemented
        if func is torch.nn.functional.cross_entropy and args and args[0] is tensor:
            return self._loss(_Loss(*args[1:], **kwargs))
        if args and args[0] is tensor and torch.is_grad_enabled():
            return step_after(self, tensor, func, args[1:], kwargs)
        return NotImplemented

    def _gives(self, asked: _Loss) -> bool:
        """Whether linear_cross_entropy has the loss that is asked for."""
        target, weight = asked.target, asked.weight
        return (
            self.class_dim == 1
            and self.pending is None
            and asked.size_average is None
            and asked.reduce is None
            and type(target) is torch.Tensor
            and target.dtype in (torch.int64, torch.uint8)
            and target.shape == self.shape[:1] + self.shape[2:]
            and target.device == self.rows.device
            and (weight is None or (plain(weight) and not weight.requires_grad))
        )

    def _loss(self, asked: _Loss):
        if not self._gives(asked):
            return NotImplemented
        self._check_fresh()
        bias = self.bias
        if self.shift is not None:
            bias = self.shift.reshape(-1) if bias is None else bias + self.shift.reshape(-1)
        out = self.dtype
        if torch.is_autocast_enabled(self.hidden.device.type):
            out = torch.promote_types(out, torch.float32)
        enabled, narrow = self.autocast
        if not enabled and self.rows.dtype in (torch.bfloat16, torch.float16) and out == torch.float32:
            enabled, narrow = True, self.rows.dtype  # the op gives its loss in fp32 under autocast
        try:
            with torch.autocast(self.hidden.device.type, narrow, enabled=enabled):
                loss = serve(
                    None, linear_cross_entropy, self.rows, self.weight, asked.target, linear_bias=bias,
                    weight=asked.weight, reduction=asked.reduction, ignore_index=asked.ignore_index,
                    label_smoothing=asked.label_smoothing, softcap=self.softcap, logit_scale=self.scale,
                ).to(out)  # fmt: skip
        except BackendError:
            raise
        except (TypeError, ValueError):
            return NotImplemented  # torch's own function takes it, or says in its own words why not
        plan = self
        while plan is not None:
            plan.consumed = True
            plan = plan.parent
        return loss
