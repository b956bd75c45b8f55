"""What the launchers choose on a pretended GPU for calls that differ in their number of rows alone.

    python tests/launch_choices.py GPU...

prints a line for each call whose choices are not the same for every number of rows, and how many calls there were.
Choices are the kernels, in order, their constants and their options, as Triton's own binder takes them; nothing is
compiled. Grids may differ, and so may kernels whose sums are over the rows.
"""

import sys
from types import SimpleNamespace
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from fastllm import functional
from fastllm.backends import backend
from fastllm.bench.capture import pretend
from fastllm.bench.limits import EVERY_GPU

# From one row to dozens for each multiprocessor of any GPU, and either side of powers of 2.
ROWS = (1, 2, 3, 7, 16, 17, 64, 129, 300, 1000, 1025, 5000, 20000)
COLUMNS = (8, 96, 1000, 4096, 5000, 20000, 40000, 128256)
# Their sums are over the rows themselves, or they have none.
OF_ALL_ROWS = {"_sum_kernel", "_mass_kernel", "_scale_kernel", "_column_sum_kernel"}


def choices(gpu, function, *leaves):
    """(kernel, constants, options) of each launch of a forward and a backward."""
    found = []

    def do_compile(self, key, signature, device, constexprs, options, attrs, warmup):
        # An argument that is 1 is compiled in too, which is no launcher's choice.
        declared = {i for i, param in enumerate(self.params) if param.is_constexpr}
        constants = sorted(f"{where} {value}" for where, value in constexprs.items() if where[0] in declared)
        made = SimpleNamespace(constants=constants, options=options)
        self.device_caches[device][0][key] = made
        return made

    def on_launch(kernel, grid, made):
        if kernel not in OF_ALL_ROWS:
            found.append((kernel, *made.constants, repr(made.options)))

    with mock.patch.object(JITFunction, "_do_compile", do_compile), pretend(gpu, on_launch), backend("triton"):
        made = [make() for make in leaves]
        out = function(*made)
        torch.autograd.grad(out, [x for x in made if x.requires_grad], torch.empty_like(out))
    return tuple(found)


def _leaf(*shape, dtype):
    return lambda: torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=True)


def _fixed(*shape, dtype=torch.int64):
    return lambda: torch.empty(*shape, dtype=dtype, device="cuda")


def calls(gpu, dtype):
    """(name, rows, call) of ops with sums: ``call(n)`` is a function and what makes its tensors, for ``n`` of rows."""
    for cols in COLUMNS:
        one, weight = lambda n, c=cols: _leaf(n, c, dtype=dtype), _fixed(cols, dtype=dtype)
        for norm in (functional.layer_norm, functional.rms_norm):
            yield f"{norm.__name__} {cols}", ROWS, lambda n, f=norm, c=cols, x=one, w=weight: (
                lambda t, v: f(t, (c,), v), x(n), w,
            )  # fmt: skip
        yield f"add_layer_norm {cols}", ROWS, lambda n, c=cols, x=one, w=weight: (
            lambda t, r, v: functional.add_layer_norm(t, r, (c,), v, dropout_p=0.1)[0], x(n), x(n), w,
        )  # fmt: skip
        for options in ({}, {"softcap": 5.0, "label_smoothing": 0.1}, {"reduction": "none"}):
            yield f"cross_entropy {cols} {options}", ROWS, lambda n, o=options, x=one: (
                lambda t, y: functional.cross_entropy(t, y, **o), x(n), _fixed(n),
            )  # fmt: skip
        # Of one position it is the classes that are adjacent: another layout in memory.
        yield f"cross_entropy of adjacent positions, {cols}", ROWS[1:], lambda n, c=cols: (
            functional.cross_entropy, _leaf(1, c, n, dtype=dtype), _fixed(1, n),
        )  # fmt: skip
    if gpu.product_obstacle is None:
        yield from attention_calls(dtype)


def attention_calls(dtype):
    """As :func:`calls`; rows are queries or sequences. Few queries are split over their keys, which is a choice."""

    def causal(q, k, v):
        return functional.attention(q, k, v, causal=True)

    def packed(q, k, v, starts):
        return functional.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)

    for dim in (64, 128, 256):
        for queries in (3, 300):
            yield f"attention {dim}, sequences of {queries} queries", ROWS, lambda n, d=dim, r=queries: (
                causal, *(_leaf(n, h, m, d, dtype=dtype) for h, m in ((4, r), (2, 1024), (2, 1024))),
            )  # fmt: skip
        for kind, queries in (("few", (1, 2, 3, 5, 16)), ("many", (70, 128, 300, 1025))):
            yield f"attention {dim}, {kind} queries", queries, lambda n, d=dim: (
                causal, *(_leaf(3, h, m, d, dtype=dtype) for h, m in ((4, n), (2, 1024), (2, 1024))),
            )  # fmt: skip
        yield f"attention {dim}, packed sequences", ROWS, lambda n, d=dim: (
            packed, *(_leaf(n * 40, h, d, dtype=dtype) for h in (4, 2, 2)), _fixed(n + 1, dtype=torch.int32),
        )  # fmt: skip


def differing(gpu):
    """(number of calls, names of those whose choices follow the number of rows)."""
    count, found = 0, []
    for dtype in (torch.float32, torch.bfloat16 if gpu.has_bfloat16 else torch.float16):
        for name, rows, call in calls(gpu, dtype):
            seen = {choices(gpu, *call(n)) for n in rows}
            count += 1
            if len(seen) != 1 or () in seen:
                found.append(f"{name} {dtype}: {len(seen)} ways")
    return count, found


def main():
    for name in sys.argv[1:]:
        count, found = differing(EVERY_GPU[name])
        for line in found:
            print("DIFFERS", name, line)
        print(name, count, "calls")


if __name__ == "__main__":
    main()
