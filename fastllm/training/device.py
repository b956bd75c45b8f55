"""The device that a run trains on."""

from __future__ import annotations

import torch

from ..config import InputError


def pick_device(name: str) -> torch.device:
    """``auto``: CUDA where it is available.

    Raises:
        InputError: CUDA was asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda was asked for, but torch.cuda.is_available() is False")
    return torch.device(name)


def keep_random_state(device: torch.device):
    """Within the block, torch's default generators may be drawn from and seeded; afterwards they are as before."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Autocast for ``dtype`` "bfloat16"; does nothing for "float32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
