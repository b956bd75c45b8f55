"""Logits that are computed when somebody reads them, and whose cross-entropy never computes them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

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


class _Product(NamedTuple):
    """``linear(hidden, weight, bias)`` as it was called: its autocast, (on, dtype), and its tensors' versions."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    autocast: tuple[bool, torch.dtype]
    versions: tuple[int | None, ...]

    def check_fresh(self) -> None:
        """Refuse to compute what the forward would have computed of other values, or of values that are gone."""
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
        self.check_fresh()
        enabled, dtype = self.autocast
        with torch.autocast(self.hidden.device.type, dtype, enabled=enabled):
            flat = linear(self.hidden.flatten(0, -2), self.weight, self.bias)
        # Not a view in autograd's eyes: it may then be changed in place outside the node that makes it.
        return torch.ops.aten._unsafe_view(flat, (*self.hidden.shape[:-1], len(self.weight)))


class LogitsForm(NamedTuple):
    """How logits came from their product, as far as their loss has to know.

    ``rows``: the hidden states that belong to their rows. ``class_dim``: which dimension is that of the classes.
    ``scale``, then ``softcap``: what they are multiplied with and capped at. ``last``: the last factor. ``pending``:
    the soft cap that a tanh has begun. ``shift``: added before any scale, for each class one constant, (..., V).
    """

    rows: torch.Tensor
    class_dim: int
    scale: float = 1.0
    softcap: float | None = None
    last: float = 1.0
    pending: float | None = None
    shift: torch.Tensor | None = None

    def of_rows(self, rows: torch.Tensor) -> LogitsForm:
        """The form of logits with other rows, whose last dimension is that of the classes."""
        return self._replace(rows=rows, class_dim=rows.dim() - 1, last=1.0)


class _Source(NamedTuple):
    """What logits were derived from: ``step`` of ``tensor``, whose plan is ``plan``; ``view``: of the same memory."""

    plan: Logits
    tensor: Deferred
    step: Callable[[torch.Tensor], torch.Tensor]
    view: bool


class Logits:
    """The plan of ``linear(hidden, weight, bias)``, reshaped, indexed, cast, scaled and soft-capped since.

    Each step is a plan of its own, which knows its ``source``. ``layout`` is a tensor without values of the values'
    shape, strides and dtype.
    """

    too_late = TOO_LATE

    def __init__(self, product: _Product, form: LogitsForm, layout: torch.Tensor, source: _Source | None = None):
        self.product, self.form, self.layout, self.source = product, form, layout, source
        # Once they were read: the values, and their version then.
        self.value: torch.Tensor | None = None
        self._version: int | None = None
        self.consumed = False

    @staticmethod
    def of(hidden, weight, bias) -> Deferred:
        """Deferred ``F.linear(hidden, weight, bias)``."""
        autocast = _autocast_state(hidden.device.type)
        narrow, dtype = autocast
        versions = tuple(None if t is None else t._version for t in (hidden, weight, bias))
        layout = torch.empty(
            (*hidden.shape[:-1], weight.shape[0]), device="meta",
            dtype=dtype if narrow and hidden.dtype != torch.float64 else hidden.dtype,
        )  # fmt: skip
        product = _Product(hidden, weight, bias, autocast, versions)
        plan = Logits(product, LogitsForm(hidden, class_dim=layout.dim() - 1), layout)
        return defer(plan, hidden, weight, *([] if bias is None else [bias]))

    @property
    def shape(self) -> torch.Size:
        return self.layout.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self.layout.stride()

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    def compute(self) -> torch.Tensor:
        return self.product.compute()

    def read(self, tensor: Deferred) -> torch.Tensor:
        """The values, computed once; changes in place then show in what was derived from them as views."""
        if self.value is None:
            with as_in_the_forward(True):
                self.value = self._make(tensor)
            self._version = self.value._version
        return self.value if torch.is_grad_enabled() else self.value.detach()

    def _make(self, tensor: Deferred) -> torch.Tensor:
        source = self.source
        if source is None:
            return _Values.apply(tensor, self)
        base = source.plan.read(source.tensor)
        if not source.view and source.plan._changed():
            # Somebody has changed them in place since; what was derived before did not change with them.
            base = source.plan._anew()
        return source.step(base)

    def _changed(self) -> bool:
        """Whether these values, or those that they were derived from, have been changed in place since."""
        return any(plan.value is not None and plan.value._version != plan._version for plan in self._lineage())

    def _anew(self) -> torch.Tensor:
        return self.compute() if self.source is None else self.source.step(self.source.plan._anew())

    def _lineage(self) -> Iterator[Logits]:
        """This plan, and those that it was derived from."""
        plan: Logits | None = self
        while plan is not None:
            yield plan
            plan = None if plan.source is None else plan.source.plan

    def gradients(self, grad, inputs, needs):
        if self.source is not None:
            with torch.enable_grad():
                pull = torch.func.vjp(self.source.step, self.source.plan.read(self.source.tensor).detach())[1]
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

    def derive(
        self, tensor: Deferred, step: Callable, form: LogitsForm, layout: torch.Tensor | None = None
    ) -> Deferred:
        """``step`` of these logits, in the form that it has then; ``step`` itself finds the layout unless given."""
        layout = step(self.layout) if layout is None else layout
        view = layout is self.layout or layout._is_view()
        return defer(Logits(self.product, form, layout, _Source(self, tensor, step, view)), tensor)

    def handle(self, tensor, func, args, kwargs):
        """What ``func`` gives without the values, or NotImplemented."""
        if func is torch.autograd.grad:
            return NotImplemented
        if func in WATCH:
            self.read(tensor)  # from here on they are ordinary logits, whose loss passes through them
            return NotImplemented
        if any(plan.value is not None for plan in self._lineage()):
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
            self.form.class_dim == 1
            and self.form.pending is None
            and asked.size_average is None
            and asked.reduce is None
            and type(target) is torch.Tensor
            and target.dtype in (torch.int64, torch.uint8)
            and target.shape == self.shape[:1] + self.shape[2:]
            and target.device == self.form.rows.device
            and (weight is None or (plain(weight) and not weight.requires_grad))
        )

    def _loss(self, asked: _Loss):
        if not self._gives(asked):
            return NotImplemented
        product, form = self.product, self.form
        product.check_fresh()
        bias = product.bias
        if form.shift is not None:
            bias = form.shift.reshape(-1) if bias is None else bias + form.shift.reshape(-1)
        out = self.dtype
        if torch.is_autocast_enabled(product.hidden.device.type):
            out = torch.promote_types(out, torch.float32)
        enabled, narrow = product.autocast
        if not enabled and form.rows.dtype in (torch.bfloat16, torch.float16) and out == torch.float32:
            enabled, narrow = True, form.rows.dtype  # the op gives its loss in fp32 under autocast
        try:
            with torch.autocast(product.hidden.device.type, narrow, enabled=enabled):
                loss = serve(
                    None, linear_cross_entropy, form.rows, product.weight, asked.target, linear_bias=bias,
                    weight=asked.weight, reduction=asked.reduction, ignore_index=asked.ignore_index,
                    label_smoothing=asked.label_smoothing, softcap=form.softcap, logit_scale=form.scale,
                ).to(out)  # fmt: skip
        except BackendError:
            raise
        except (TypeError, ValueError):
            return NotImplemented  # torch's own function takes it, or says in its own words why not
        for plan in self._lineage():
            plan.consumed = True
        return loss
