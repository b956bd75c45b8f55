"""The one place that picks a backend, and says why.

A backend is how an op is computed:

=========  =====================================================================================
``eager``  PyTorch's own operators. Runs everywhere and is differentiable to any order.
``triton`` Our Triton kernels: CUDA tensors, or CPU tensors in Triton's interpreter (for tests).
``native`` The compiled C++/CUDA extension, for the ops that have such a kernel.
``hopper`` As ``triton``, with attention in Gluon for GPUs of sm_90 (H100, H200) in the calls that it
           takes: fp16 or bf16, head dim 64 or 128, nothing but causal, tensors at multiples of 16 bytes. Never
           chosen but on request: it has not been run on a GPU yet.
=========  =====================================================================================

The choice is made once per call, in the op's public function, so the backward always runs on the
backend that served the forward. It is process-wide, like ``torch.backends``: activation
checkpointing recomputes a forward on autograd's own threads, which a thread-local choice would miss.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from . import extension
from .config import InputError
from .registry import OPS, Call, Op

BACKENDS = ("eager", "triton", "native", "hopper")
_TORCHS, _NATIVES = ("auto", "eager"), ("auto", "native")
# In order of preference; `eager` is always possible. CPU has no `triton`: the interpreter is for tests only.
PREFERENCE = {"cuda": ("triton", "native"), "cpu": ("native",)}
_FIRST = {device_type: f"first choice on {device_type}" for device_type in PREFERENCE}
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NATIVE_DTYPES = (*KERNEL_DTYPES, torch.float64)


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve this call."""


class Choice(NamedTuple):
    """What serves a call, and why. ``asked``: FASTLLM_BACKEND or :func:`backend` named it."""

    backend: str
    why: str
    asked: bool = False


_choice = os.environ.get("FASTLLM_BACKEND", "auto").strip().lower() or "auto"
_told: set[str] = set()
_observers: list[Callable[[str, Choice], None]] = []


def _check_choice(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise InputError(f"{source}: expected auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, every op that has the backend ``name`` uses it; ops that lack it keep their default.

    Args:
        name: ``"eager"``, ``"triton"``, ``"native"``, ``"hopper"``, or ``"auto"`` for the default by device. The
            environment variable FASTLLM_BACKEND sets the same for a whole process.

    The choice is process-wide, not per thread (see the module's docstring). A call that the chosen backend cannot serve
    raises :class:`BackendError`, whose message says what to do.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global _choice
    before, _choice = _choice, _check_choice(name, "fastllm.backend(name)")
    try:
        yield
    finally:
        _choice = before


def free_for_torch() -> bool:
    """Whether a call that PyTorch's operators serve may go to them at once: no kernel is asked for, and nobody looks at
    what is picked. A public function asks this first where PyTorch's operator takes less time than :func:`pick`."""
    return _choice in _TORCHS and not _observers


def free_for_native(tensor: torch.Tensor) -> bool:
    """Whether a call that the extension takes, of ordinary CPU tensors such as ``tensor``, may go to it at once: it is
    there, no other backend is asked for, nobody looks at what is picked, and neither a transform nor a tracer is at
    work."""
    return (
        _choice in _NATIVES
        and not _observers
        and extension.missing() is None
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and tensor.layout is torch.strided
        and tensor.numel() > 0
    )


def chosen_backend() -> str:
    """What FASTLLM_BACKEND or :func:`backend` asks for now; ``"auto"`` if neither does."""
    return _check_choice(_choice, "FASTLLM_BACKEND")


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET, read before the first import)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETING = interpreting()


def why_not(
    name: str, device_type: str, dtypes: Iterable[torch.dtype] = (), op: Op | None = None, index: int | None = None
) -> str | None:
    """Why the backend ``name`` cannot run on such tensors here, and what to do; None if it can.

    ``index``: of the tensors' GPU, where a machine has several; None is the current one.
    """
    if name == "native" and op is not None and device_type not in op.native_on:
        return f"the extension serves {op.name} on {' and '.join(op.native_on)} tensors, got {device_type}"
    if name in ("triton", "hopper"):
        if not _HAS_TRITON:
            return "Triton is not installed (pip install 'triton>=3.6', Linux only)"
        if device_type != "cuda" and not (device_type == "cpu" and _INTERPRETING):
            return (
                f"Triton kernels need CUDA tensors, got {device_type}; to run them on CPU tensors in Triton's "
                "interpreter, set TRITON_INTERPRET=1 before Python starts"
            )
        for dtype in dtypes:
            if dtype not in KERNEL_DTYPES:
                return f"the kernels take float32, float16 and bfloat16, got {str(dtype).removeprefix('torch.')}"
    if name == "hopper":
        return _not_hopper(device_type, index)
    if name == "native":
        missing = extension.missing()
        if missing is not None:
            return missing
        if device_type not in ("cpu", "cuda"):
            return f"the extension serves CPU and CUDA tensors, got {device_type}"
        if device_type == "cuda" and not extension.has_cuda():
            return "the extension was built without CUDA code (FASTLLM_CUDA=1 python -m fastllm.build says why)"
        if device_type == "cuda" and (obstacle := _not_compiled_for(device_type, index)) is not None:
            return obstacle
        for dtype in dtypes:
            if dtype not in NATIVE_DTYPES:
                return (
                    "the extension takes float64, float32, float16 and bfloat16, "
                    f"got {str(dtype).removeprefix('torch.')}"
                )
    return None


def _device(device_type: str, index: int | None) -> torch.device:
    return torch.device(device_type if index is None else f"{device_type}:{index}")


def _not_hopper(device_type: str, index: int | None) -> str | None:
    from .kernels.device import device_info

    info = device_info(_device(device_type, index))
    if info.vendor == "nvidia" and info.arch == 90:
        return None
    found = "the interpreter" if info.vendor == "interpreter" else info.architecture
    return f"it is for GPUs of sm_90 (H100, H200), this is {found}"


def _not_compiled_for(device_type: str, index: int | None) -> str | None:
    from .kernels.device import device_info

    return extension.gpu_obstacle(device_info(_device(device_type, index)).arch)


def product_obstacle(device_type: str, index: int | None = None) -> str | None:
    """Why PyTorch's own attention and matrix products are preferred to kernels' on such a GPU; None where not."""
    if device_type != "cuda" or not _HAS_TRITON:
        return None
    from .kernels.device import device_info

    return device_info(_device(device_type, index)).product_obstacle


# What torch.compiler.assume_constant_result does; that imports torch._dynamo, which takes longer than all of fastllm.
_not_hopper._dynamo_marked_constant = True
_not_compiled_for._dynamo_marked_constant = True
product_obstacle._dynamo_marked_constant = True


def device_type_of(tensor: torch.Tensor) -> str:
    """``tensor.device.type``, which takes 0.23 us; ``is_cpu`` takes 0.04 of the 5 us that a small op takes on a CPU."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def under_transform() -> bool:
    """Whether vmap, forward-mode differentiation or functionalize is at work: PyTorch's own operators take them,
    kernels do not."""
    return _at_work("Vmap", "Jvp", "Functionalize")


def forward_mode() -> bool:
    """Whether forward-mode differentiation is at work, which not all of PyTorch's own operators take."""
    return _at_work("Jvp")


def _at_work(*transforms: str) -> bool:
    """Whether one of torch.func's transforms of these names is; "Jvp" is autograd's own forward mode too."""
    if torch.compiler.is_compiling():
        return False
    if torch.autograd.forward_ad._current_level >= 0 and "Jvp" in transforms:
        return True
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    if functorch.maybe_current_level() is None:
        return False
    kinds = [getattr(functorch.TransformType, name) for name in transforms]
    return any(layer.key() in kinds for layer in functorch.get_interpreter_stack())


def _makes_program() -> bool:
    """Whether torch.export or torch.jit.trace makes a program of what runs.

    It keeps no node's backward, so the gradient would be that of an operator of ours, which has none; and a trace is
    loaded where there are PyTorch's operators alone.
    """
    # The first is what torch.compiler.is_exporting() returns. Whatever PyTorch 2.11 compiles, its compiler takes that
    # call for true, so that none of our operators was used. The second is what torch.jit.is_tracing() asks.
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


def operators_alone() -> bool:
    """Whether a call must be made of PyTorch's operators: under a transform, and for an exported or traced program."""
    return _makes_program() or under_transform()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor; not asked in compiled code, since a compiler cannot trace the name of a module."""
    return not torch.compiler.is_compiling() and type(tensor).__module__.startswith("torch.distributed.")


def plain_eager(backend: str, tensors: Iterable[torch.Tensor | None] = ()) -> bool:
    """Whether a call that eager serves must be made of PyTorch's operators alone, without a node of our own.

    ``tensors`` are the call's where its node cannot take DTensors.
    """
    return backend == "eager" and (operators_alone() or any(is_sharded(x) for x in tensors if x is not None))


@contextlib.contextmanager
def observed(observer: Callable[[str, Choice], None]) -> Iterator[None]:
    """Within the block, ``observer(op, choice)`` is called at every pick, on the thread that picks.

    Calls inside a compiled graph have been picked when it was compiled, and are not seen.
    """
    if observer not in _observers:
        _observers.append(observer)
        try:
            yield
        finally:
            _observers.remove(observer)
    else:
        yield


def _tell(op: str, choice: Choice) -> None:
    if not torch.compiler.is_compiling():
        for observer in list(_observers):
            observer(op, choice)


def pick(op: str, call: Call) -> Choice:
    """The backend that serves ``call`` of the op ``op``, and why.

    A backend that was asked for serves the call or raises. Otherwise PyTorch's operators serve what the op prefers to
    leave to them and what kernels cannot take (vmap, forward mode, sparse and nested tensors, torch.export). The first
    backend of :data:`PREFERENCE` that takes the call serves all others. That a preferred one refuses is said once, as a
    warning.

    Raises:
        BackendError: the backend asked for cannot serve the call.
    """
    choice = _pick(op, call)
    if _observers:
        _tell(op, choice)
    return choice


def _pick(op: str, call: Call) -> Choice:
    record = OPS[op]
    tensors = [t for t in call.tensors() if t is not None]
    device_type, asked = device_type_of(tensors[0]), chosen_backend()
    index = tensors[0].device.index if device_type == "cuda" else None
    missing = extension.missing() is not None and "native" in record.backends
    if missing and asked in ("auto", "native") and not torch.compiler.is_compiling():
        extension.build_at_first_use()
    if asked != "auto" and asked in record.backends:
        reason = why_not(asked, device_type, {t.dtype for t in tensors}, record, index)
        reason = reason or (None if asked == "eager" else _foreign(tensors)) or record.refuses(asked, call)
        if reason is not None:
            raise BackendError(
                f"{op}: the {asked} backend was asked for (FASTLLM_BACKEND or fastllm.backend) and cannot serve this "
                f"call: {reason}; or choose the eager or auto backend"
            )
        return Choice(asked, "asked for", asked=True)
    if _makes_program():
        return Choice("eager", "an exported or traced program has PyTorch's operators")
    names = _preferred(record, device_type)
    if not names:
        return Choice("eager", f"PyTorch's own operators are the choice on {device_type}")
    reason = record.prefers_torch(call) or _foreign(tensors)
    if reason is not None:
        return Choice("eager", reason)
    refusals = []
    for name in names:
        reason = why_not(name, device_type, {t.dtype for t in tensors}, record, index) or record.refuses(name, call)
        if reason is None:
            return Choice(name, _FIRST[device_type])
        _tell_once(f"{op}: eager instead of {name}: {reason}")
        refusals.append(f"{name}: {reason}")
    return Choice("eager", "; ".join(refusals))


def _preferred(record: Op, device_type: str) -> tuple[str, ...]:
    """The backends of ``record`` in their order of preference."""
    names = PREFERENCE.get(device_type, ())
    return names if all(name in record.backends for name in names) else tuple(n for n in names if n in record.backends)


def _foreign(tensors: Iterable[torch.Tensor]) -> str | None:
    """Why no kernel can take such tensors now, or None."""
    if under_transform():
        return "kernels support neither vmap nor forward-mode differentiation nor functionalize, and one is active"
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_nested:
            return "kernels take dense tensors, and one of these is sparse or nested"
        if is_sharded(tensor):
            return "PyTorch's operators alone know how to shard a DTensor"
    return None


@contextlib.contextmanager
def untold() -> Iterator[None]:
    """Within the block :func:`pick` gives no warning, and remembers none as given."""
    before = set(_told)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _told.intersection_update(before)


def _tell_once(message: str) -> None:
    if torch.compiler.is_compiling() or message in _told:
        return
    _told.add(message)
    warnings.warn(message, RuntimeWarning, stacklevel=5)
