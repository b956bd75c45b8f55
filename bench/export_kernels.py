"""A folder for ``kernels benchmark``, the command of Hugging Face's package kernels.

The runner loads a kernel from the folder, times every method ``benchmark_*`` of the classes in ``benchmarks/``, and
holds the class's ``out`` to what ``verify_*`` returns, by ``torch.allclose(atol=1e-2)``. That is less than one unit in
the last place of a 16-bit number above 2, so the calls are in float32 unless another dtype is asked for.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import torch

from .. import __version__
from ..registry import Op
from .exported import Exported
from .results import Run

SCRIPT = '''"""{name} on the shapes of fastllm, for `kernels benchmark`. Written by `fastllm bench export kernels`."""

from fastllm.bench.kernels_benchmark import OpBenchmark


class {title}(OpBenchmark):
    op, dtype = "{name}", "{dtype}"
'''
WORKLOAD = """
    def setup_{call.identifier}(self):
        self.make({call.shape!r})

    def benchmark_{call.identifier}(self):
        self.call()

    def verify_{call.identifier}(self):
        return self.expected()
"""


def _script(op: Op, calls: list[Exported]) -> str:
    title = op.name.title().replace("_", "")
    return "".join(
        [SCRIPT.format(name=op.name, title=title, dtype=calls[0].dtype), *(WORKLOAD.format(call=c) for c in calls)]
    )


def write(calls: list[Exported], folder: Path, device: torch.device, run: Run | None) -> str:
    """Writes ``benchmarks/benchmark_<op>.py`` and, as the kernel, the ops of this package. Returns what there is."""
    scripts, kernel = folder / "benchmarks", folder / "build" / "torch-universal"
    for new in (scripts, kernel):
        new.mkdir(parents=True)
    by_op = {op.name: list(group) for op, group in ((k, list(g)) for k, g in groupby(calls, key=lambda c: c.op))}
    for name, group in by_op.items():
        (scripts / f"benchmark_{name}.py").write_text(_script(group[0].op, group), encoding="utf-8")
    imported = f"from fastllm.functional import {', '.join(by_op)}\n"
    (kernel / "__init__.py").write_text(f'"""The ops of fastllm."""\n\n{imported}', encoding="utf-8")
    metadata = {
        "name": "fastllm-ops", "id": f"fastllm_ops_{__version__.replace('.', '_')}", "version": 1,
        "license": "Apache-2.0", "python-depends": [], "backend": {"type": device.type},
    }  # fmt: skip
    (kernel / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    return f"{len(by_op)} scripts with {len(calls)} workloads"
