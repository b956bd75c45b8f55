"""Kernels run on the GPU where there is one, otherwise in Triton's interpreter, which must be chosen before torch."""

import os
import sys
from pathlib import Path

HAS_GPU = Path("/dev/nvidiactl").exists()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("FASTLLM_BACKEND", None)
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import torch  # noqa: E402

if not HAS_GPU:
    import interpreter

    interpreter.repair()

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


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
