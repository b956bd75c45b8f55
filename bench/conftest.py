"""Options of ``pytest bench/``, and the calls that it runs."""

import pytest
import torch

from fastllm import cpu
from fastllm.bench import cases, run


def pytest_addoption(parser):
    group = parser.getgroup("fastllm")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=sorted(run.ROUNDS))
    group.addoption("--dtype", choices=("bfloat16", "float16", "float32"))
    group.addoption("--quick", action="store_true", help="of each op only the smallest shape")


def _dtype(options) -> str:
    """--dtype; by default bfloat16, or float32 on a CPU that has no products of bfloat16."""
    return options.dtype or cpu.precision(torch.device(options.device))


def _smallest(calls, dtype):
    meta = torch.device("meta")
    return min(calls, key=lambda planned: cases.held_bytes(planned.make(meta, dtype)))


def pytest_generate_tests(metafunc):
    if "planned" not in metafunc.fixturenames:
        return
    options = metafunc.config.option
    dtype, largest = getattr(torch, _dtype(options)), run.LARGEST[options.device]
    chosen = []
    for op in cases.selected([]):
        calls = run.plan([op], [""], device=options.device)
        chosen += [_smallest(calls, dtype)] if options.quick else calls
    entries = [
        pytest.param(planned, provider, direction, id=f"{planned.op.name}-{planned.name}-{provider}-{direction}")
        for planned in chosen
        if cases.held_bytes(planned.make(torch.device("meta"), dtype)) <= largest
        for provider in run.providers(planned.op)
        for direction in run.DIRECTIONS
    ]
    metafunc.parametrize(("planned", "provider", "direction"), entries)


@pytest.fixture
def device(request) -> torch.device:
    return torch.device(request.config.option.device)


@pytest.fixture
def dtype(request) -> str:
    return _dtype(request.config.option)
