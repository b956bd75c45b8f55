"""Triton's interpreter as tests/interpreter.py leaves it: nothing of it stays behind, and it computes as before."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.runs_on("interpreter")


@triton.jit
def _doubled(x):
    return tl.sum(x, 0) + tl.max(x, 0)


@triton.jit
def _calls_helpers(x_ptr, y_ptr, limit, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    for _ in range(3):
        x += _doubled(x)
    tl.device_assert(tl.sum(x, 0) < limit)
    tl.store(y_ptr + tl.arange(0, BLOCK), x)


@triton.jit
def _fails(x_ptr):
    tl.load(x_ptr + _doubled(tl.arange(0, 3)))


def _names() -> dict[str, object]:
    """Triton's language as a kernel sees it."""
    found = {f"{module.__name__}.{name}": value for module in (tl, tl.math) for name, value in vars(module).items()}
    return found | {f"tensor.{name}": value for name, value in vars(tl.tensor).items()}


def _expected(x):
    for _ in range(3):
        x = x + x.sum() + x.max()
    return x


def test_a_launch_patches_each_module_for_its_first_user_and_takes_all_back(monkeypatch):
    patched, patch = [], interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda pkg, *rest: (patched.append(pkg), patch(pkg, *rest))[1])
    x, y = torch.arange(4.0), torch.empty(4)
    _calls_helpers[(1,)](x, y, 1e9, BLOCK=4)
    before, patched[:] = _names(), []
    _calls_helpers[(2,)](x, y, 1e9, BLOCK=4)
    torch.testing.assert_close(y, _expected(x), rtol=0, atol=0)
    # For the kernel, and for tl.sum, whose module has triton.language.core as well; not for the twelve other calls.
    assert patched.count(tl) == 2
    assert patched.count(tl.core) == 1
    assert _names() == before


def test_a_kernel_that_fails_takes_all_back_and_the_next_one_runs():
    x, y = torch.arange(4.0), torch.empty(4)
    before = _names()
    with pytest.raises(InterpreterError):
        _fails[(1,)](x)
    assert _names() == before
    _calls_helpers[(1,)](x, y, 1e9, BLOCK=4)
    torch.testing.assert_close(y, _expected(x), rtol=0, atol=0)
