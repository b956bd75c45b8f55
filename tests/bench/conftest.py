"""What the tests of the bench share: an op with small shapes and three bad rivals."""

import pytest
import torch.nn.functional as F

from fastllm import OPS
from fastllm.bench import cases, run
from fastllm.bench.norms import norm_shapes


def _wrong():
    return lambda x, shape, weight, bias: F.layer_norm(x, shape, weight * 1.1, bias)


def _failing():
    def layer_norm(*args, **kwargs):
        raise RuntimeError("no kernel image\nis available")

    return layer_norm


def _missing():
    import a_package_that_nobody_has  # noqa: F401


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch):
    """Seconds for each call on a CPU: on a busy machine 30 passes of a small one may take longer than the usual 9."""
    monkeypatch.setitem(run.CASE, "cpu", 9000.0)


@pytest.fixture
def small(monkeypatch):
    """layer_norm with two small shapes and three bad rivals."""
    shapes = norm_shapes(bias=True, of={"first": (3, 24), "second": (5, 24)})
    module = cases.importlib.import_module("fastllm.bench.layer_norm")
    monkeypatch.setattr(module, "shapes", shapes)
    monkeypatch.setattr(module, "rivals", {"wrong": _wrong, "failing": _failing, "missing": _missing})
    return OPS["layer_norm"]
