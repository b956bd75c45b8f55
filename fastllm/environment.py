"""What ``fastllm info`` prints: versions, hardware, and which backend serves each op here and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from dataclasses import replace

import torch

from . import backends, cpu, extension, registry
from .version import __version__


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> str:
    module = extension.module()
    if module is None:
        return extension.missing() or "not loaded"
    return ", ".join(f"{key.replace('_', ' ')} {_in_words(value)}" for key, value in module.build_info().items())


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) and value else str(value or "none")


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none (torch.cuda.is_available() is False)"
    from .kernels.device import from_properties

    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found = [(from_properties(p).architecture, p) for p in properties]
    return ", ".join(f"{p.name} ({arch}, {p.total_memory / 2**30:.0f} GiB)" for arch, p in found)


def _examples(op: registry.Op, device: torch.device) -> Iterable[registry.Sample]:
    """The op's examples; without any, its first sample in each dtype."""
    if op.examples is not None:
        yield from op.examples(device)
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield replace(next(iter(op.samples(device, dtype))), name=str(dtype).removeprefix("torch."))


def serving(op: registry.Op, device: torch.device) -> dict[tuple[str, str], list[str]]:
    """``(backend, why)`` -> the names of the op's examples that it serves on ``device``, as :func:`pick` decides."""
    found: dict[tuple[str, str], list[str]] = {}
    for sample in _examples(op, device):
        try:
            with backends.untold():
                call = op.call(*sample.args, **sample.kwargs)
                choice = backends.pick(op.name, call)
                form = op.form(call, choice)
            backend, why = choice.backend, choice.why if form is None else f"{form.name}, since {form.why}"
        except backends.BackendError as error:
            backend, why = "none", str(error)
        found.setdefault((backend, why), []).append(sample.name)
    return found


def describe() -> str:
    """The report as plain text, one fact a line."""
    threads = torch.get_num_threads()
    lines = [
        f"fastllm    {__version__}",
        f"python     {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch      {torch.__version__}",
        f"triton     {_installed('triton')}" + (" (interpreter on)" if backends.interpreting() else ""),
        f"extension  {_extension()}",
        f"GPU        {_gpu()}",
        f"CPU        {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}, {cpu.summary()}",
        f"backend    {backends.chosen_backend()} (FASTLLM_BACKEND or fastllm.backend)",
    ]
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for device in devices:
        lines += ["", f"on {device.type} tensors"]
        for name, op in registry.OPS.items():
            for (backend, why), names in serving(op, device).items():
                lines.append(f"  {name:<28} {backend:<8} " + f"{', '.join(names)}: " + why)
                name = ""
    return "\n".join(lines)
