"""A pytest plugin: this machine as one with an H200, as far as the tests look before they touch it.

``pytest -p as_if_gpu -m gpu`` passes a test that goes as far as the device and no further. It fails one that fails
before, and one that never asks for the device: that one needs none. With ``--first-cases`` a test runs for one case of
each op, or of what else comes first in its parameters: 74 s in place of 148.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys

import pytest

_exists = pathlib.Path.exists
_NO_DEVICE = ("Torch not compiled with CUDA enabled", "Found no NVIDIA driver", "No CUDA GPUs are available")


def _exists_with_gpu(self, *args, **kwargs):
    return True if str(self) == "/dev/nvidiactl" else _exists(self, *args, **kwargs)


# Before conftest.py decides, which it does when it is imported.
assert "torch" not in sys.modules, "CUDA's settings are read when torch starts"
os.environ.pop("CUDA_VISIBLE_DEVICES", None)
pathlib.Path.exists = _exists_with_gpu
_version = importlib.metadata.version
importlib.metadata.version = lambda name: _version(name).removesuffix("+cpu")


def pytest_collection():
    import torch

    from fastllm import extension
    from fastllm.kernels import device

    device.device_info = lambda where: device.GPUS[90] if where.type == "cuda" else device.INTERPRETER
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    extension.has_cuda = lambda: True
    extension.gpu_obstacle = lambda arch: None
    if importlib.util.find_spec("hypothesis"):  # every example fails: to look for a smaller one is a waste
        from hypothesis import Phase, settings

        settings.register_profile("as if gpu", phases=[Phase.generate])
        settings.load_profile("as if gpu")


def pytest_addoption(parser):
    parser.addoption("--first-cases", action="store_true", help="one case of each test and first parameter")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if not config.getoption("--first-cases"):
        return
    first = {}
    for item in items:
        first.setdefault(item.nodeid.partition("-")[0], item)
    config.hook.pytest_deselected(items=[item for item in items if item not in first.values()])
    items[:] = first.values()


def pytest_sessionfinish():
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "cuBLAS would warn, and warnings are errors"


def _reached(error: BaseException | None) -> bool:
    while error is not None:
        if any(message in str(error) for message in _NO_DEVICE):
            return True
        error = error.__cause__ or error.__context__
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "teardown" or report.skipped:
        return report
    if call.excinfo is not None and _reached(call.excinfo.value):
        # A test whose set-up has failed must not be called: pytest calls it where the set-up has passed.
        passed, reason = ("passed", None), (str(item.path), 0, "Skipped: asked for the device in its set-up")
        report.outcome, report.longrepr = passed if report.when == "call" else ("skipped", reason)
    elif report.when == "call" and report.passed:
        report.outcome, report.longrepr = "failed", f"{item.nodeid}: passes without a GPU, so it needs none"
    return report
