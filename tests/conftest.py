"""Kernels run on the GPU where there is one, otherwise in Triton's interpreter, which must be chosen before torch."""

import gc
import logging
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

# Until pytest_collection ends, since imports make no garbage: 1 s of processor time in each worker.
gc.disable()
# CUDA_VISIBLE_DEVICES= pytest: the interpreter's tests on a machine with a GPU.
# PyTorch's wheels for CPUs alone say so in their version: with them a GPU is of no use.
_HAS_CUDA = not version("torch").endswith("+cpu")
HAS_GPU = Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and _HAS_CUDA
if HAS_GPU:
    # Read when CUDA starts. Without it cuBLAS warns in deterministic mode, which `poisoned_memory` turns on.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("FASTLLM_BACKEND", None)
os.environ.setdefault("MPLBACKEND", "Agg")
# A shell starts what it puts in the background with SIGINT ignored; processes started from here would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Workers share the cores, and so do the processes that they start. Two workers of two threads each on two busy cores
# took 1.6 times as long as of one thread each.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import torch  # noqa: E402

# pytest 9 gives its handlers to every logger that does not propagate. One handler is what torch asks for before it
# writes out all graphs, guards and times of a compilation, here for records that nobody reads.
logging.getLogger("torch.__trace").propagate = True

if not HAS_GPU:
    import interpreter

    interpreter.repair()

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


PLACES = {"gpu", "interpreter", "anywhere"}


def _places(item: pytest.Function) -> set[str]:
    """Where a test runs, by its closest ``runs_on`` marker.

    Raises:
        UsageError: the marker names another place, or a test that uses DEVICE has none.
    """
    marker = item.get_closest_marker("runs_on")
    if marker is None:
        given = getattr(getattr(item, "callspec", None), "params", {})
        if "DEVICE" in item.function.__code__.co_names or "device" in set(item.fixturenames) - set(given):
            raise pytest.UsageError(f"{item.nodeid}: uses the device, and no runs_on marker says which it may be")
        return {"anywhere"}
    places = set(marker.args)
    if not places or not places <= PLACES or ("anywhere" in places and len(places) > 1):
        raise pytest.UsageError(
            f"{item.nodeid}: runs_on takes 'gpu', 'interpreter' or both, or 'anywhere'; got {marker.args}"
        )
    return places


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """``-m gpu`` and ``-m interpreter`` select by ``runs_on``; what cannot run here is skipped, and says why."""
    for item in items:
        places = _places(item)
        for place in places - {"anywhere"}:
            item.add_marker(place)
        if places == {"gpu"} and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))
        if places == {"interpreter"} and HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="Triton's interpreter is off where there is a GPU"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection():
    """Then what was imported stays, and the garbage collector need not look through it again and again."""
    collected = yield
    gc.freeze()
    gc.enable()
    return collected


def pytest_unconfigure():
    """At the end Triton's bindings count what is left, and say so."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def poisoned_memory():
    """Every ``torch.empty`` comes filled with NaN (integers: the largest), so that reading one's own output shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="module")
def one_thread():
    """Toys only lose by a second thread, and much where other processes run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def whole_run():
    """With ``short_runs``: asks for a run with everything that it does at its start and end."""


@pytest.fixture
def short_runs(request, monkeypatch, one_thread):
    """Runs without picture, samples and meter, which take longer than a toy's training, and on one thread."""
    from toy import shorten_runs

    from fastllm.training.reports import report

    monkeypatch.setattr(report, "SAMPLE_TOKENS", 20)
    if "whole_run" not in request.fixturenames:
        shorten_runs(monkeypatch.setattr)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    """The path of a text to train on."""
    from prose import prose

    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose(80))
    return str(path)


@pytest.fixture
def config(text):
    """``config(**training)``: six steps of a toy on ``text``."""
    from toy import TOY

    from fastllm.data import DataConfig
    from fastllm.training import RunConfig, TrainingConfig

    def make(**training):
        settings = {"steps": 6, "batch_size": 4, "device": "cpu", "dtype": "float32", **training}
        return RunConfig(DataConfig(data=(text,)), TOY, TrainingConfig(**settings))

    return make
