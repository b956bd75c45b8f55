"""``fastllm bench --cpu avx2,avx512,amx``: the same calls at several levels of one CPU, each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import cpu
from .plots import geometric_mean, leads
from .results import COMPILED, EAGER, Run, in_cases, read_run

# What holds this library, PyTorch, oneDNN and MKL to a level.
HELD = {
    "avx2": ("avx2", "avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "avx512", "AVX512_CORE_BF16", "AVX512"),
    "amx": ("amx", "avx512", "AVX512_CORE_AMX", "AVX512_E4"),
}
VARIABLES = ("FASTLLM_CPU", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
KINDS = (EAGER, COMPILED, "best other")


def levels(text: str) -> list[str]:
    """The levels that ``text`` names, with commas between them.

    Raises:
        ValueError: there is none, or another name among them.
    """
    names = list(dict.fromkeys(filter(None, text.lower().split(","))))
    if not names or not set(names) <= set(HELD):
        raise ValueError(f"--cpu: expected some of {', '.join(HELD)}, with commas between them, got {text!r}")
    return names


def without(arguments: Sequence[str], *options: str) -> list[str]:
    """``arguments`` without these options and their values; each option takes one."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in options:
            kept.append(argument)
        skip = not skip and argument in options
    return kept


def table(runs: dict[str, Run | str]) -> list[str]:
    """Lines: geometric means of forward and backward together, by op and level; after them each level's problem."""
    found = {
        level: leads(in_cases([row for row in run.rows if row.direction == "both"]))
        for level, run in runs.items() if isinstance(run, Run)
    }  # fmt: skip
    lines = [f"{'op':<30}{'level':<9}{'calls':>6}" + "".join(f"{f'over {kind}':>21}" for kind in KINDS)]
    for op in sorted({op for of_level in found.values() for op in of_level}):
        for level, of_level in found.items():
            if op in of_level:
                values = [of_level[op].get(kind) for kind in KINDS]
                cells = ("" if not some else f"{geometric_mean(some):.2f}" for some in values)
                calls = max(len(some) for some in values if some)
                lines.append(f"{op:<30}{level:<9}{calls:>6}" + "".join(f"{cell:>21}" for cell in cells))
    return lines + [f"{level}: {problem}" for level, problem in runs.items() if isinstance(problem, str)]


def outcome(code: int, folder: Path) -> Run | str:
    """What a level's process left in ``folder``; or why there are no times."""
    file = folder / "bench.json"
    run = read_run(file) if file.is_file() else None
    if code == 0 and run is not None:
        return run
    why = f": {run.left_out[0]}" if run is not None and run.left_out else ""
    return f"no times, code {code}{why} (all that it said is in {folder / 'bench.log'})"


def main(names: Sequence[str], arguments: Sequence[str], budget: float, folder: Path) -> int:
    """Runs ``fastllm bench`` with ``arguments`` at each level, and prints one table. Returns the exit code.

    ``budget`` seconds are shared out evenly. A level that this CPU does not reach is named and left out.
    """
    reached = [name for name in names if cpu.LEVELS.index(name) <= cpu.LEVELS.index(cpu.level())]
    runs: dict[str, Run | str] = {}
    for name in names:
        if name not in reached:
            runs[name] = f"skipped, this process reaches {cpu.summary()}"
            continue
        print(f"at {name} ...", file=sys.stderr, flush=True)
        to = folder / name
        command = [sys.executable, "-m", "fastllm", "bench", *without(arguments, "--cpu", "--budget", "--out")]
        command += ["--budget", f"{budget / len(reached):g}", "--out", str(to)]
        held = os.environ | dict(zip(VARIABLES, HELD[name], strict=True))
        done = subprocess.run(
            command, env=held, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        to.mkdir(parents=True, exist_ok=True)
        (to / "bench.log").write_text(done.stdout, "utf-8")
        runs[name] = outcome(done.returncode, to)
    print(*table(runs), f"written: {folder}", sep="\n")
    return 0 if reached and all(isinstance(runs[name], Run) for name in reached) else 1
