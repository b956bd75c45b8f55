"""Launches over tensors of more elements than memory holds, in the interpreter: only their last programs run.

``with last_programs(module, ...)`` runs the last two programs of a long grid, and the last two turns of a long loop.
Large tensors are made of addresses without memory behind them; a page is there once it is written.
"""

from __future__ import annotations

import builtins
import contextlib
import math
import mmap
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.runtime import interpreter

# A grid or loop of more than this many turns is a long one, and a tensor of more bytes a large one.
LONG, LARGE = 1000, 1 << 28
# Linux's number; Python 3.13 is the first that names it.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
INT32 = range(-(2**31), 2**31)
_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default, _aten.empty_strided.default}


def large(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, contiguous, that take no memory before they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class _Large(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _EMPTY:
            meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), args)
            like = func(*meta, **{**(kwargs or {}), "device": "meta", "pin_memory": None})
            if like.numel() * like.element_size() > LARGE:
                assert like.is_contiguous()
                return large(*like.shape, dtype=like.dtype)
        return func(*args, **(kwargs or {}))


def _last(*bounds) -> builtins.range:
    """``range(*bounds)``, of a long one the last two. A kernel counts in 32 bits where its bounds have 32."""
    turns = builtins.range(*(int(n) for n in bounds))
    ends = turns.stop in INT32 and turns.start in INT32
    if ends and len(turns):
        assert turns[-1] + turns.step in INT32, f"a loop of 32 bits runs from {turns[-1]} by {turns.step}"
    return turns if len(turns) <= LONG else turns[-2:]


@contextlib.contextmanager
def last_programs(*modules: ModuleType) -> Iterator[None]:
    """Within the block, kernels of ``modules`` run as the module's docstring says."""
    with contextlib.ExitStack() as stack:
        for module in (interpreter, *modules):
            stack.enter_context(mock.patch.object(module, "range", _last, create=True))
        # Copies every tensor onto itself on a CPU.
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "_restore_args_dev"))
        stack.enter_context(_Large())
        yield
