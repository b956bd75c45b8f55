"""Every op on an Apple and an Intel GPU that are not there: PyTorch's operators serve it, and none of ours is missing.

The tensors hold a CPU's numbers and say that they are elsewhere. Their operators run on the CPU. One of ours runs as it
would there, if it is registered for such a device.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastllm.bench import cases
from fastllm.registry import LAUNCHERS, OPS, Sample

CPU = torch.device("cpu")


class _Elsewhere(torch.Tensor):
    place = torch.device("mps")
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: _Elsewhere.place)
    is_cpu = is_cuda = property(lambda self: False)

    @staticmethod
    def __new__(cls, numbers):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype,
            device=CPU,
        )  # fmt: skip
        tensor.numbers = numbers
        return tensor

    def tolist(self):
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    if func.namespace == "fastllm":
        key = _Elsewhere.place.type.upper()
        assert torch._C._dispatch_has_kernel_for_dispatch_key(func._schema.name, key), f"{func} has no kernel for {key}"
        with _Place():
            return LAUNCHERS[func._schema.name.removeprefix("fastllm::")](*args, **kwargs)
    args, kwargs = tree_map_only(_Elsewhere, lambda t: t.numbers, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda d: CPU if d == _Elsewhere.place else d, (args, kwargs))
    return tree_map_only(torch.Tensor, _placed, func(*args, **kwargs))


def _placed(numbers):
    # Apple's GPUs have no such numbers, and PyTorch refuses them there.
    assert numbers.dtype != torch.float64 or _Elsewhere.place.type != "mps", "float64 on mps"
    return _Elsewhere(numbers)


class _Place(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        named = any(isinstance(x, torch.device) and x == _Elsewhere.place for x in leaves)
        if named or any(isinstance(x, _Elsewhere) for x in leaves):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _on(monkeypatch, place):
    with monkeypatch.context() as patch, _Place():
        patch.setattr(_Elsewhere, "place", torch.device(place))
        patch.setattr(torch.xpu, "_lazy_init", lambda: None)  # which torch.tensor calls before any operator
        yield


def _results(op, sample):
    """Outputs and gradients, from the same random numbers."""
    torch.manual_seed(0)
    outs, leaves = list(cases.forward(op.function, sample)), cases.differentiable(sample)
    if leaves and any(y.requires_grad for y in outs):
        outs += cases.backward(outs, leaves, [torch.ones_like(y) for y in outs])
    return [y.detach() for y in outs if y is not None]


@pytest.mark.parametrize("place", ["mps", "xpu"])
@pytest.mark.parametrize("name", OPS)
def test_every_op_is_served_by_pytorchs_operators(monkeypatch, name, place):
    op = OPS[name]
    for sample in op.samples(CPU, torch.float32):
        if name == "linear" and sample.args[0].dim() == 1:
            continue  # PyTorch's own operator changes its result's shape in place, which such tensors do not see
        expected = _results(op, sample)
        with _on(monkeypatch, place):
            args, kwargs = tree_map_only(
                torch.Tensor,
                lambda t: _Elsewhere(t.detach()).requires_grad_(t.requires_grad),
                (sample.args, dict(sample.kwargs)),
            )
            found = [y.numbers for y in _results(op, Sample(sample.name, args, kwargs))]
        torch.testing.assert_close(found, expected, equal_nan=True, msg=lambda m, s=sample: f"{name}/{s.name}: {m}")
