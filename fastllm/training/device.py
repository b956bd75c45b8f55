"""The device that a run trains on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..config import InputError
from ..cpu import matmul_dtype
from ..kernels.device import device_info


def pick_device(name: str) -> torch.device:
    """``auto``: CUDA where it is available, else the CPU.

    Raises:
        InputError: a device was asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu":
        module = "torch.backends.mps" if name == "mps" else f"torch.{name}"
        if not getattr(torch.backends if name == "mps" else torch, name).is_available():
            raise InputError(f"device: {name} was asked for, but {module}.is_available() is False")
    return torch.device(name)


@contextlib.contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """Within the block, torch's default generators may be drawn from and seeded; afterwards they are as before."""
    if device.type == "mps":  # whose generator fork_rng does not take
        with torch.random.fork_rng(devices=[]):
            before = torch.mps.get_rng_state()
            try:
                yield
            finally:
                torch.mps.set_rng_state(before)
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield


def narrow_dtype(device: torch.device) -> str | None:
    """The 16-bit dtype that autocast may use on ``device``; None where the hardware has none.

    float16 on NVIDIA's GPUs before sm_80, which have no bfloat16.
    """
    if device.type == "cuda":
        return "bfloat16" if device_info(device).has_bfloat16 else "float16"
    return "bfloat16" if matmul_dtype(device) == torch.bfloat16 else None


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Autocast for ``dtype`` "bfloat16" or "float16"; does nothing for "float32"."""
    narrow = torch.float16 if dtype == "float16" else torch.bfloat16
    return torch.autocast(device.type, narrow, enabled=dtype != "float32")
