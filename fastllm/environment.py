"""What ``fastllm info`` prints: versions, hardware, and which backend serves each op here and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from . import cpu, extension, registry
from .version import __version__


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> str:
    if extension.module() is None:
        return extension.missing()
    return ", ".join(f"{key} {value}" for key, value in extension.module().build_info().items())


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none (torch.cuda.is_available() is False)"
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)" for p in properties)


def serving(op: str, device_type: str) -> tuple[str, str]:
    """``(backend, why)`` for ``op`` on plain float32 tensors of ``device_type``."""
    has = registry.OPS[op].backends
    asked = registry.chosen_backend()
    if asked != "auto" and asked in has:
        reason = registry.why_not(asked, device_type, op=registry.OPS[op])
        return (asked, "asked for") if reason is None else (f"{asked}: cannot run", reason)
    reasons = []
    for name in registry.PREFERENCE.get(device_type, ()):
        if name in has:
            reason = registry.why_not(name, device_type, op=registry.OPS[op])
            if reason is None:
                return name, f"first choice on {device_type}"
            reasons.append(f"{name}: {reason}")
    return "eager", "; ".join(reasons) or f"PyTorch's own operators are the choice on {device_type}"


def describe() -> str:
    """The report as plain text, one fact a line."""
    lines = [
        f"fastllm    {__version__}",
        f"python     {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch      {torch.__version__}",
        f"triton     {_installed('triton')}" + (" (interpreter on)" if registry.interpreting() else ""),
        f"extension  {_extension()}",
        f"GPU        {_gpu()}",
        f"CPU        {os.cpu_count()} cores, {torch.get_num_threads()} threads, {cpu.describe()}",
        f"backend    {registry.chosen_backend()} (FASTLLM_BACKEND or fastllm.backend)",
    ]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device_type in devices:
        lines += ["", f"on {device_type} tensors"]
        for op in registry.OPS:
            name, why = serving(op, device_type)
            exception = registry.OPS[op].exception(device_type)
            lines.append(f"  {op:<28} {name:<8} {why}" + (f"; {exception}" if exception else ""))
    return "\n".join(lines)
