"""A data set of FlashInfer-Bench: definitions, workloads, solutions and, from a run of ours, traces.

Each call is a definition of its own, whose axes are all constant. Its reference and its solution are short programs
that call this package. Floating-point inputs are random there; ids, lengths and masks are kept in safetensors files.
"""

from __future__ import annotations

import inspect
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .. import __version__
from . import cases
from .exported import Exported
from .results import EAGER, OURS, Case, Run, in_cases


class _Arguments:
    """A call's tensors by name, and the expression that makes its arguments of those names."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict[str, Any]):
        self.tensors: dict[str, torch.Tensor] = {}
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
        names = list(bound)[: len(args)]
        positional = [self._expression(name, value) for name, value in zip(names, args, strict=True)]
        named = [f"{name}={self._expression(name, value)}" for name, value in kwargs.items()]
        self.text = ", ".join([*positional, *named])

    def _expression(self, name: str, value: object) -> str:
        if isinstance(value, torch.Tensor):
            self.tensors[name] = value
            return name
        if isinstance(value, tuple | list):
            parts = [self._expression(f"{name}_{i}", part) for i, part in enumerate(value)]
            return f"({', '.join(parts)},)"
        return repr(value)


def _name_of(call: Exported) -> str:
    return f"{call.op.name}_{call.identifier}_{call.dtype}"


def _specs(tensors: dict[str, torch.Tensor], axes: dict[str, dict]) -> dict[str, dict]:
    """Each tensor's shape and dtype; its axes are added to ``axes``."""
    found = {}
    for name, tensor in tensors.items():
        for i, size in enumerate(tensor.shape):
            axes[f"{name}_{i}"] = {"type": "const", "value": size}
        shape = [f"{name}_{i}" for i in range(tensor.dim())]
        found[name] = {"shape": shape, "dtype": str(tensor.dtype).removeprefix("torch.")}
    return found


def _program(call: Exported, arguments: _Arguments, which: str) -> str:
    return (
        f"from fastllm.registry import OPS\n\n\ndef run({', '.join(arguments.tensors)}):\n"
        f"    return OPS[{call.op.name!r}].{which}({arguments.text})\n"
    )


def _definition(call: Exported) -> tuple[dict, dict, list[str]]:
    """The call's definition and solution, and the names of the inputs whose values are kept."""
    with torch.no_grad():
        sample = call.sample(torch.device("meta"))
        arguments = _Arguments(call.op.function, sample.args, dict(sample.kwargs))
        results = cases.forward(call.op.function, sample)
    outputs = {"output" if len(results) == 1 else f"output_{i}": t for i, t in enumerate(results)}
    axes: dict[str, dict] = {}
    definition = {
        "name": _name_of(call), "op_type": call.op.name, "description": f"{call.op.summary}: {call.shape}",
        "tags": [f"fastllm:{__version__}"], "axes": axes, "inputs": _specs(arguments.tensors, axes),
        "outputs": _specs(outputs, axes), "reference": _program(call, arguments, "reference"),
    }  # fmt: skip
    solution = {
        "name": f"fastllm_{_name_of(call)}", "definition": _name_of(call), "author": "fastllm",
        "spec": {
            "language": "python", "target_hardware": ["cpu", "cuda"], "entry_point": "main.py::run",
            "dependencies": ["fastllm"], "destination_passing_style": False,
        },
        "sources": [{"path": "main.py", "content": _program(call, arguments, "function")}],
    }  # fmt: skip
    return definition, solution, [name for name, t in arguments.tensors.items() if not t.is_floating_point()]


def _workload(call: Exported, inputs: dict[str, dict], kept: list[str], folder: Path) -> dict:
    """The call's inputs. Those in ``kept`` are written to a file."""
    name = _name_of(call)
    identity = str(uuid.uuid5(uuid.NAMESPACE_OID, f"fastllm {__version__} {name}"))
    found: dict[str, dict] = {tensor: {"type": "random"} for tensor in inputs}
    if kept:
        sample = call.sample(torch.device("cpu"))
        tensors = _Arguments(call.op.function, sample.args, dict(sample.kwargs)).tensors
        file = Path("blob") / "workloads" / call.op.name / name / f"{name}_{identity}.safetensors"
        (folder / file).parent.mkdir(parents=True)
        safetensors.torch.save_file({k: tensors[k].contiguous() for k in kept}, folder / file)
        for k in kept:
            found[k] = {"type": "safetensors", "path": file.as_posix(), "tensor_key": k}
    return {"uuid": identity, "axes": {}, "inputs": found}


def _errors(call: Exported, device: torch.device) -> dict[str, float]:
    """The largest errors of the op against its reference, in FlashInfer-Bench's measures."""
    sample = call.sample(device)
    with torch.no_grad():
        pairs = zip(cases.forward(call.op.function, sample), cases.forward(call.op.reference, sample), strict=True)
        found = []
        for ours, theirs in pairs:
            difference = (ours.float() - theirs.float()).abs()
            found.append((float((difference / (theirs.float().abs() + 1e-8)).max()), float(difference.max())))
    return {"max_relative_error": max(r for r, _ in found), "max_absolute_error": max(a for _, a in found)}


def _trace(call: Exported, workload: dict, case: Case, run: Run, errors: dict[str, float]) -> dict:
    latency, reference = (1e3 * row.seconds.median for row in (case.of(OURS), case.of(EAGER)) if row)
    evaluation = {
        "status": "PASSED", "timestamp": run.environment["date"], "correctness": errors,
        "environment": {"hardware": run.environment["device"], "libs": run.environment["packages"]},
        "performance": {
            "latency_ms": latency, "reference_latency_ms": reference, "speedup_factor": reference / latency,
        },
    }  # fmt: skip
    name = _name_of(call)
    return {"definition": name, "workload": workload, "solution": f"fastllm_{name}", "evaluation": evaluation}


def _json(value: object, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _line(value: object, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value) + "\n", encoding="utf-8")


def write(calls: list[Exported], folder: Path, device: torch.device, run: Run | None) -> str:
    """Writes the data set. Returns what there is."""
    timed = {c.rows[0].case: c for c in in_cases(run.rows if run else []) if c.of(OURS) and c.of(EAGER)}
    traces = 0
    for call in calls:
        definition, solution, kept = _definition(call)
        name, op = definition["name"], call.op.name
        workload = _workload(call, definition["inputs"], kept, folder)
        _json(definition, folder / "definitions" / op / f"{name}.json")
        _json(solution, folder / "solutions" / op / f"{name}.json")
        _line({"definition": name, "workload": workload}, folder / "workloads" / op / f"{name}.jsonl")
        keys = [(op, call.shape, call.dtype, "forward", cache) for cache in ("cold", "hot")]
        case = next((timed[key] for key in keys if key in timed), None)
        if run and case:
            traces += 1
            _line(_trace(call, workload, case, run, _errors(call, device)), folder / "traces" / op / f"{name}.jsonl")
    return f"{len(calls)} definitions, {traces} traces"
