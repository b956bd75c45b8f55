"""Triton's cache, filled on a machine without a GPU, to carry to one that has it.

``python -m fastllm.bench.prepare pack FOLDER`` compiles what the bench's shapes and the tests' samples launch, as
capture.py does it, and writes kernels.tar.gz and prepared.json there. Triton's whole cache, 20 times as large, stays
beside it in FOLDER.cache, where a second call finds what has not changed. ``... unpack FOLDER CACHE`` puts the kernels
where Triton looks for them (TRITON_CACHE_DIR=CACHE). Triton finds a kernel by its source, the options, the arguments'
types, and a hash of Triton itself with its shared library, so that the wheel and Python's minor version must be the
same on both machines.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import triton
from torch.utils._pytree import tree_map_only
from triton.runtime.cache import triton_key

from ..backends import KERNEL_DTYPES
from ..kernels.device import GPUS, DeviceInfo
from ..other_work import cores
from ..parser import first_paragraph
from ..registry import OPS, Op, Sample
from . import cases
from .capture import CUDA, check_compiles, launches
from .environment import commit
from .run import plan

ARCHIVE, RECORD = "kernels.tar.gz", "prepared.json"
# What a CompiledKernel reads: the machine code and its metadata. The other stages are for people.
KEPT = (".cubin", ".json")
SOURCES = ("fastllm", "kernels", "bench", "csrc")


def source_digest() -> str:
    """A hash of the source tree's files, by which a tree without its .git is known again."""
    root = Path(__file__).resolve().parent.parent
    found = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((root / folder).rglob("*.*")):
            if file.suffix in (".py", ".sh", ".cpp", ".cu", ".h", ".cuh"):
                found.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return found.hexdigest()


def _triton() -> dict[str, str]:
    """What must be the same on both machines."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"triton": triton.__version__, "python": python, "key": hashlib.sha256(triton_key().encode()).hexdigest()}


def _on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, strides and offset on the pretended GPU."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = torch.empty(max(1, count), dtype=tensor.dtype, device=CUDA)
    placed = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return placed.detach().requires_grad_(tensor.requires_grad)


def _moved(sample: Sample) -> Sample:
    args, kwargs = tree_map_only(torch.Tensor, _on_gpu, (sample.args, dict(sample.kwargs)))
    return replace(sample, args=args, kwargs=kwargs)


def every_call(op: Op, gpu: DeviceInfo) -> Iterator[tuple[str, Callable[[], Sample], str, torch.dtype]]:
    """The bench's calls, in bfloat16, and the samples: name, what makes it on :data:`.capture.CUDA`, backend, dtype.

    A GPU without bfloat16 has the bench's calls in float16 and no sample in bfloat16.
    """
    backends = [name for name in ("triton", "hopper") if name in op.backends]
    for backend in backends if gpu.arch == 90 else backends[:1]:
        dtypes = [dtype for dtype in KERNEL_DTYPES if dtype != torch.bfloat16 or gpu.has_bfloat16]
        half = torch.bfloat16 if gpu.has_bfloat16 else torch.float16
        for planned in plan([op], [""], device="cuda") if cases.shapes_of(op.name) else []:
            yield planned.name, partial(planned.make, CUDA, half), backend, half
        for dtype in dtypes:
            for sample in op.samples(torch.device("cpu"), dtype):
                yield sample.name, partial(_moved, sample), backend, dtype


def compile_op(name: str, arch: int) -> tuple[set[str], list[str]]:
    """Compiles what the op launches in the bench's shapes (bfloat16) and the tests' samples (every dtype).

    Returns:
        The kernels' hashes, and each call that could not be run without a device, with its error.
    """
    op, gpu, found, problems = OPS[name], GPUS[arch], set(), []
    for call, make, backend, dtype in every_call(op, gpu):
        try:
            found.update(launch.compiled.hash for launch in launches(op, make, gpu, backend))
        except Exception as error:  # one call that cannot be pretended must not lose the others
            what = f"{name}, {call}, {dtype}, {backend}"
            problems.append(f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return found, problems


def compile_all(names: list[str], arch: int, budget: float, workers: int, used: set[str]) -> Iterator[str]:
    """Compile each op's kernels in a process of its own, and yield what it reports. What began in time is finished.

    The kernels' hashes are added to ``used``.
    """
    end = time.monotonic() + budget
    # A process that has run PyTorch's threads must not be forked.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(compile_op, name, arch): name for name in names}
        for done in as_completed(running):
            if done.cancelled():
                yield f"{running[done]}: not compiled, the budget of {budget:g} s was spent"
                continue
            found, problems = done.result()
            used |= found
            yield f"{running[done]}: {len(found)} kernels, {len(problems)} calls not compiled"
            yield from (f"  {problem}" for problem in problems)
            if time.monotonic() > end:
                for other in running:
                    other.cancel()


def pack(cache: Path, folder: Path, used: set[str] | None = None) -> dict:
    """Writes the kernels that Triton's cache folder ``cache`` has, and what compiled them, into ``folder``.

    ``used``: hashes of the kernels that are wanted, None for all. A cache that is used again has older sources' too.

    Returns:
        The record: versions, commit, a hash of the sources, the number of kernels and the archive's bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kernels = 0
    with tarfile.open(folder / ARCHIVE, "w:gz", compresslevel=6) as archive:
        for group in sorted(cache.glob("*/__grp__*.json")):
            children = {
                name: Path(path) for name, path in json.loads(group.read_text())["child_paths"].items()
                if name.endswith(KEPT)
            }  # fmt: skip
            if not all(path.exists() for path in children.values()) or len(children) != len(KEPT):
                continue
            (metadata,) = (path for path in children.values() if path.suffix == ".json")
            if used is not None and json.loads(metadata.read_text())["hash"] not in used:
                continue
            for path in children.values():
                archive.add(path, f"{group.parent.name}/{path.name}")
            # Names without folders; unpack() puts the new folder before them.
            text = json.dumps({"child_paths": {name: path.name for name, path in children.items()}}).encode()
            entry = tarfile.TarInfo(f"{group.parent.name}/{group.name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
            kernels += 1
    record = {
        **_triton(), "commit": commit(), "sources": source_digest(), "kernels": kernels,
        "bytes": (folder / ARCHIVE).stat().st_size,
    }  # fmt: skip
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def unpack(folder: Path, cache: Path) -> dict:
    """Puts the kernels of ``folder`` into Triton's cache folder ``cache``; returns their record.

    Raises:
        ValueError: another Triton or Python compiled them, so that Triton would not find them.
        FileNotFoundError: ``folder`` has no record or no kernels.
    """
    record = json.loads((folder / RECORD).read_text())
    for name, here in _triton().items():
        if record[name] != here:
            raise ValueError(f"{folder}: its {name} is {record[name]}, here it is {here}: Triton would find no kernel")
    with tarfile.open(folder / ARCHIVE) as archive:
        # Python 3.11.4 and 3.10.12 are the first that have the filter, which keeps every member inside the folder.
        if hasattr(tarfile, "data_filter"):
            archive.extractall(cache, filter="data")
        else:
            archive.extractall(cache)
        groups = [cache / name for name in archive.getnames() if "/__grp__" in name]
    for group in groups:
        children = json.loads(group.read_text())["child_paths"]
        group.write_text(
            json.dumps({"child_paths": {name: str(group.parent / Path(path).name) for name, path in children.items()}})
        )
    return record


def commit_of(record: dict) -> str | None:
    """The commit that the record names, where the sources here are those that it was made from; else None."""
    return record["commit"] if record["sources"] == source_digest() else None


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m fastllm.bench.prepare", description=first_paragraph(__doc__))
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="compile and pack")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--arch", type=int, default=90, choices=list(GPUS), help="sm version (%(default)s)")
    packing.add_argument("--op", nargs="+", choices=sorted(OPS), help="only these ops (all)")
    packing.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no op after it")
    packing.add_argument("--workers", type=int, default=cores(), help="processes (%(default)s)")
    unpacking = commands.add_parser("unpack", help="put the kernels where Triton looks for them")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("cache", type=Path)
    telling = commands.add_parser("commit", help="print the commit, if the kernels are of these sources")
    telling.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    if options.command == "commit":
        print(commit_of(json.loads((options.folder / RECORD).read_text())) or "")
        return 0
    if options.command == "unpack":
        try:
            record = unpack(options.folder, options.cache)
        except (OSError, ValueError, KeyError) as error:
            print(f"prepare: {error}", file=sys.stderr)
            return 1
        same = "of these sources" if commit_of(record) else "of other sources: what has changed is compiled again"
        print(f"{record['kernels']} kernels of commit {record['commit']}, {same}")
        return 0
    check_compiles()
    cache = options.folder.with_name(f"{options.folder.name}.cache")
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    names = options.op or [op.name for op in OPS.values() if "triton" in op.backends]
    used: set[str] = set()
    for line in compile_all(names, options.arch, options.budget, options.workers, used):
        print(line, flush=True)
    record = pack(cache, options.folder, used)
    print(f"{record['kernels']} kernels, {record['bytes'] / 2**20:.1f} MB: {options.folder / ARCHIVE}")
    return 0 if record["kernels"] else 1


if __name__ == "__main__":
    sys.exit(main())
