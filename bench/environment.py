"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastllm
from fastllm import cpu

PACKAGES = (
    "torch", "triton", "numpy", "transformers", "liger-kernel", "quack-kernels", "flash-attn", "cut-cross-entropy",
    "xformers",
)  # fmt: skip


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*command: str, cwd: Path | None = None) -> str | None:
    try:
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str | None:
    """The source tree's commit, with ``+changes`` where files differ from it.

    Outside a checkout FASTLLM_COMMIT, which gpu.sh sets where prepare.py knows these sources again; or None.
    """
    # gpu.sh makes a package of links to the checkout's folders.
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get("FASTLLM_COMMIT") or None
    found = _run("git", "rev-parse", "HEAD", cwd=root)
    changed = _run("git", "status", "--porcelain", "--untracked-files=no", cwd=root)
    return found and found + ("+changes" if changed else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its level and the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {cpu.level()}, {torch.get_num_threads()} threads"


def environment(device: torch.device) -> dict:
    """Device, driver, clocks, versions, commit and date, as JSON takes them."""
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fastllm": fastllm.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": device_name(device),
        "cpu": cpu.summary(),
        # Processes that ran or waited for a core in the last minute; beyond the cores, times are noise.
        "load": round(os.getloadavg()[0], 1),
        "packages": {name: version for name in PACKAGES if (version := version_of(name)) is not None},
    }
    if device.type == "cuda":
        fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
        query = ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
        # nvidia-smi numbers the GPUs of the machine, torch those that CUDA_VISIBLE_DEVICES names.
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        values = uuid and _run(*query, f"--id=GPU-{uuid}")
        values = values or _run(*query, f"--id={device.index or 0}")
        found["cuda"] = torch.version.cuda
        found["gpu"] = dict(zip(fields, map(str.strip, values.split(",")), strict=False)) if values else None
    return found
