"""Running the compilations that are due, several at once, with ninja where it is installed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from pathlib import Path

from .sources import CannotBuild
from .steps import BuildStep, write_if_changed
from .toolchain import first_error, run


def _jobs() -> int:
    wish = os.environ.get("MAX_JOBS", "")
    if wish and (not wish.isdigit() or int(wish) < 1):
        raise ValueError(f"MAX_JOBS: expected a positive number, got {wish!r}")
    if wish:
        return int(wish)
    # As fastllm.other_work.cores, which this file cannot import: a container may allow fewer cores than there are.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _find_ninja() -> str | None:
    found = shutil.which("ninja")
    if found is None:
        spec = PathFinder.find_spec("ninja")
        if spec is not None and spec.origin:
            candidate = Path(spec.origin).parent / "data/bin/ninja"
            found = str(candidate) if candidate.is_file() else None
    return found


def execute(steps: list[BuildStep], work: Path) -> None:
    """Run the steps, the last one (the link) after the others; skip what is newer than its inputs."""
    ninja = _find_ninja()
    if ninja:

        def path(p: Path) -> str:
            return str(p).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

        lines = ["rule run", "  command = $cmd"]
        for step in steps:
            lines.append(f"build {path(step.output)}: run {' '.join(path(p) for p in step.inputs)}")
            lines.append("  cmd = " + shlex.join(step.command).replace("$", "$$"))
        write_if_changed(work / "build.ninja", "\n".join([*lines, ""]))
        result = run([ninja, "-C", str(work), "-j", str(_jobs())])
        (work / "build.log").write_text(result.stdout + result.stderr, "utf-8")
        if result.returncode != 0:
            raise CannotBuild(f"{first_error(result.stdout)} (all of it in {work / 'build.log'})")
        return

    def compiled(step: BuildStep) -> subprocess.CompletedProcess | None:
        newest = max(p.stat().st_mtime for p in step.inputs)
        # What made the output, as ninja notes it: the same sources may be compiled for other GPUs.
        note, command = work / f"{step.output.name}.command", os.fsencode(shlex.join(step.command))
        same = note.is_file() and note.read_bytes() == command
        if same and step.output.is_file() and step.output.stat().st_mtime > newest:
            return None
        note.unlink(missing_ok=True)
        result = run(step.command)
        if result.returncode == 0:
            note.write_bytes(command)
        return result

    with ThreadPoolExecutor(_jobs()) as pool:
        results = list(pool.map(compiled, steps[:-1]))
    if all(result is None or result.returncode == 0 for result in results):
        results.append(compiled(steps[-1]))
    results = [result for result in results if result is not None]
    (work / "build.log").write_text("".join(result.stdout + result.stderr for result in results), "utf-8")
    for result in results:
        if result.returncode != 0:
            raise CannotBuild(f"{first_error(result.stderr)} (all of it in {work / 'build.log'})")
