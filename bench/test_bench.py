"""The cases of ``fastllm bench`` under pytest-benchmark: ``pytest bench/ --benchmark-only``.

Its groups, comparison and JSON then work as for any other project's benchmarks. A provider must be right before it is
timed, as in ``fastllm bench``: one that is not installed, or refuses the call, is skipped; a wrong one fails. On CUDA
a round is one call and a wait for the device; the L2 cache is as the call before has left it.
"""

import functools
from dataclasses import replace

import pytest
import torch

from fastllm.bench import cases, run
from fastllm.bench.results import NOT_INSTALLED, OURS
from fastllm.bench.timing import synchronize


@functools.lru_cache(maxsize=1)
def _entrants(planned, provider, device, dtype):
    """The call and who may be timed on it, once for all directions."""
    torch.manual_seed(0)
    sample = replace(planned.make(device, dtype), name=planned.name)
    return sample, run.entered(planned.op, sample, dtype, device, run.Effort(rounds=1), [provider])


def test_op(planned, provider, direction, device, dtype, benchmark):
    sample, entrants = _entrants(planned, provider, device, getattr(torch, dtype))
    problem = entrants.problems.get(provider)
    if problem is not None and provider != OURS and problem.startswith((NOT_INSTALLED, "NotImplementedError")):
        pytest.skip(problem)
    assert problem is None
    call = cases.calls_of({provider: entrants.functions[provider]}, sample, direction)[provider]
    benchmark.group = f"{planned.op.name}, {planned.name}, {dtype}, {direction}"
    benchmark.extra_info["first call s"] = entrants.first[provider].get(direction)

    def timed(argument):
        call.run(argument)
        synchronize(device)

    # Each round has a prepared argument of its own: a graph can be walked backwards once.
    rounds = run.ROUNDS[device.type]
    benchmark.pedantic(timed, setup=lambda: ((call.prepare(),), {}), rounds=rounds, warmup_rounds=1)
