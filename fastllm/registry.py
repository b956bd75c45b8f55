"""One record per op, and the helper that registers an operator. What picks a backend is in :mod:`.backends`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch


class Call(Protocol):
    """A call of an op as one value: a NamedTuple of the family, with the tensors and the options, checked."""

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The floating-point tensors, an absent one as None. The first one's device is the call's."""
        ...


class Form(Protocol):
    """How a backend serves a call, where it has several ways: the way's name, and why it is taken."""

    @property
    def name(self) -> str: ...

    @property
    def why(self) -> str: ...


CallT = TypeVar("CallT", bound=Call)


@dataclass(frozen=True)
class Sample:
    """One call of an op: what the generic tests and the bench run. ``name`` says what is special about it."""

    name: str
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """The least an op must do for one call: bytes moved and floating-point operations, each way."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0


@dataclass(frozen=True)
class Op(Generic[CallT]):
    """All that tests, bench, ``info`` and the README know of an op.

    ``function`` and ``reference`` take the same arguments. The reference is eager PyTorch that upcasts with
    ``torch.promote_types(dtype, torch.float32)``, so fp64 inputs make it the oracle.
    ``samples(device, dtype)`` yields :class:`Sample`; floating tensors that take part in differentiation come
    with ``requires_grad``. ``cost(*args, **kwargs)`` gives the :class:`Cost` of such a call. ``native_on`` names the
    types of device that the backend ``native`` has code for.

    :func:`fastllm.backends.pick` decides what serves a call. ``call`` takes the function's arguments, checks them and
    returns them as one :class:`Call`, about which ``pick`` asks the op two things. ``refuses(backend, call)`` is why
    that backend cannot take it, beyond devices and dtypes, or None. ``prefers_torch(call)`` is why PyTorch's own
    operators serve it where nobody asked for a backend, or None. Where a backend has several ways, ``form(call,
    choice)`` is the :class:`Form` that serves a call which got that :class:`fastllm.backends.Choice`, or None.
    ``examples(device)`` yields the samples that ``fastllm info`` asks about; without it these are the first sample in
    each dtype.
    """

    name: str
    summary: str
    function: Callable
    reference: Callable
    samples: Callable[[torch.device, torch.dtype], Iterable[Sample]]
    cost: Callable[..., Cost]
    backends: tuple[str, ...]
    call: Callable[..., CallT]
    module: type | None = None
    native_on: tuple[str, ...] = ("cpu",)
    refuses: Callable[[str, CallT], str | None] = lambda backend, call: None
    prefers_torch: Callable[[CallT], str | None] = lambda call: None
    form: Callable[[CallT, Any], Form | None] = lambda call, choice: None
    examples: Callable[[torch.device], Iterable[Sample]] | None = None


OPS: dict[str, Op] = {}


def register(op: Op[CallT]) -> Op[CallT]:
    """Add ``op`` to :data:`OPS`; a second record of the same name is an error."""
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} is registered already")
    OPS[op.name] = op
    return op


_LIBRARY = torch.library.Library("fastllm", "DEF")
# Operator name -> its launcher, for tools that look inside an operator (bench/capture.py, bench/traffic.py).
LAUNCHERS: dict[str, Callable] = {}


def define(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register a kernel launcher as the operator ``fastllm::<name>``, opaque to autograd and to the compiler.

    ``schema`` is torch.library's ("name(Tensor x, float eps) -> Tensor"). ``fake`` takes the same arguments and
    allocates what the launcher would return. Use as a decorator; what comes back is the operator to call.
    """
    name = schema.partition("(")[0]

    def decorate(launch: Callable):
        def on_cuda(*args):
            device = next(a.device for a in args if isinstance(a, torch.Tensor))
            with torch.cuda.device(device):
                return launch(*args)

        LAUNCHERS[name] = launch
        _LIBRARY.define(schema)
        # Some of them are made of PyTorch's operators where no kernel serves, as on the GPUs of Apple and Intel.
        for key in ("CPU", "MPS", "XPU"):
            _LIBRARY.impl(name, launch, key)
        _LIBRARY.impl(name, on_cuda, "CUDA")
        torch.library.register_fake(f"fastllm::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.fastllm, name).default

    return decorate
