"""Compare what Triton kernels take (registers, spills, memory, bytes) with a committed file, without a GPU.

A file of calls, anybody's, is measured twice in processes of their own: its kernels are compiled for each architecture
(registers, spills, shared memory, launch limits), and run in Triton's interpreter (bytes loaded and stored). Each
figure that is worse than the committed one fails. See docs/regress.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..kernels.device import GPUS
from ..parser import Parser, first_paragraph
from .interpreter import with_interpreter, without_interpreter

FORMAT = "fastllm-regress/1"
# Figure -> what more of it, or less of it, means. Those of ALLOWED may be exceeded by what the committed file allows.
WORSE_IF_MORE = {
    "launches": "more launches",
    "registers": "more registers a thread",
    "spills": "spills: loads and stores of thread-local memory",
    "shared": "more shared memory a block",
    "fp64": "fp64 instructions",
    "loaded": "more bytes loaded",
    "stored": "more bytes stored",
}
WORSE_IF_LESS = {
    "occupancy": "fewer resident warps",
    "widest_load": "narrower loads",
    "widest_store": "narrower stores",
}
# Registers and bytes of shared memory; share of the bytes.
ALLOWED = {"registers": 0, "shared": 0, "bytes": 0.0}


@dataclass
class Figures:
    """What a file's calls take. ``kernels`` and ``bytes`` are the rows of :mod:`.regress_measure`."""

    triton: str
    kernels: list[dict]
    bytes: list[dict]
    failures: dict[str, str] = field(default_factory=dict)
    allow: dict[str, float] = field(default_factory=lambda: dict(ALLOWED))

    @property
    def arches(self) -> list[int]:
        return sorted({row["arch"] for row in self.kernels})

    def by_place(self) -> dict[str, dict]:
        """ "call, kernel, sm_90" -> its figures; "call, kernel, bytes" for those that were counted."""
        rows = {f"{row['call']}, {row['kernel']}, sm_{row['arch']}": row for row in self.kernels}
        return rows | {f"{row['call']}, {row['kernel']}, bytes": row for row in self.bytes}

    def write(self, file: Path) -> None:
        """One row a line, so that a change shows as such in a diff."""

        def lines(rows: Iterable[dict]) -> str:
            kept = ({name: value for name, value in row.items() if name != "over"} for row in rows)
            return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in kept) + "\n ]"

        parts = {"format": json.dumps(FORMAT), "triton": json.dumps(self.triton), "allow": json.dumps(self.allow)}
        parts |= {"kernels": lines(self.kernels), "bytes": lines(self.bytes)}
        text = ",\n".join(f' "{name}": {value}' for name, value in parts.items())
        file.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")


def read(file: Path) -> Figures:
    """A committed file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not one.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}, expected {FORMAT!r}")
        allow = {**ALLOWED, **found["allow"]}
        if unknown := set(allow) - set(ALLOWED):
            raise ValueError(f"allow: expected {', '.join(ALLOWED)}, got {', '.join(sorted(unknown))}")
        if not all(isinstance(value, int | float) and value >= 0 for value in allow.values()):
            raise ValueError("allow: expected numbers of at least 0")
        measured = Figures(found["triton"], list(found["kernels"]), list(found["bytes"]), allow=allow)
        measured.by_place()
        return measured
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a file of fastllm bench regress ({type(error).__name__}: {error})") from error


def measure(file: Path, arches: Iterable[int]) -> Figures:
    """Runs both measurements side by side.

    Raises:
        ValueError: the file cannot be imported, or has no call.
    """
    import triton

    started = {
        what: subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.regress_measure", what, str(file), "--arch", *map(str, arches)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for what, environment in (("compile", without_interpreter()), ("bytes", with_interpreter()))
    }  # fmt: skip
    found = {}
    try:
        for what, process in started.items():
            out, err = process.communicate()
            if process.returncode:
                raise ValueError(f"{file} could not be measured:\n{err.strip()}")
            found[what] = json.loads(out)
    finally:
        for process in started.values():
            process.kill()
    if not found["compile"]["calls"]:
        raise ValueError(f"{file}: expected a function whose one argument is 'device', found none")
    failures = dict(found["compile"]["failures"])
    failures |= {f"{call}, bytes": reason for call, reason in found["bytes"]["failures"].items()}
    return Figures(triton.__version__, found["compile"]["rows"], found["bytes"]["rows"], failures)


@dataclass(frozen=True)
class Verdict:
    """What a comparison found, a line each. Anything in ``worse`` fails the gate."""

    worse: list[str]
    better: list[str]


def _allowed(name: str, old: float, allow: Mapping[str, float]) -> float:
    """By how much a figure may exceed the committed one."""
    if name in ("loaded", "stored"):
        return allow["bytes"] * old
    return allow.get(name, 0)


def compare(committed: Figures, now: Figures) -> Verdict:
    """Every figure of ``now`` beside the committed one. What only one of the two has is worse: the file is stale."""
    worse, better = [], []
    old_rows, new_rows = committed.by_place(), now.by_place()
    unmeasured = {place.rpartition(", ")[0::2] for place in now.failures}
    for place, old in old_rows.items():
        new = new_rows.get(place)
        if new is None:
            # Where its call failed, that is said once, by the call.
            if (old["call"], place.rpartition(", ")[2]) not in unmeasured:
                worse.append(f"{place}: is no longer launched")
            continue
        for name, what in {**WORSE_IF_MORE, **WORSE_IF_LESS}.items():
            if name not in old or name not in new or old[name] == new[name]:
                continue
            line = f"{place}: {what}, {old[name]:,} -> {new[name]:,}"
            more = new[name] - old[name]
            if name in WORSE_IF_LESS:
                more = -more
            if more < 0:
                better.append(f"{place}: {name} {old[name]:,} -> {new[name]:,}")
            # Fewer resident warps follow from registers and shared memory, which say it better where they fail.
            elif more > _allowed(name, old[name], committed.allow) and not (name == "occupancy" and _grew(old, new)):
                worse.append(line)
        if old.get("tensor_core") and not new["tensor_core"]:
            worse.append(f"{place}: tensor cores are no longer used ({old['tensor_core']} instructions before)")
    worse += [f"{place}: is not in the file" for place in new_rows if place not in old_rows]
    return Verdict(worse, better)


def _grew(old: dict, new: dict) -> bool:
    return new["registers"] > old["registers"] or new["shared"] > old["shared"]


def broken(now: Figures) -> list[str]:
    """What fails whatever the file says: a launch that a GPU would refuse, a call that cannot be compiled."""
    found = [f"{place}: {reason}" for place, reason in now.failures.items() if not place.endswith(", bytes")]
    for row in now.kernels:
        found += [
            f"{row['call']}, {row['kernel']}, sm_{row['arch']}: cannot be launched: {over}" for over in row["over"]
        ]
    return found


def _show(now: Figures) -> None:
    from rich.table import Table

    from .report import console

    table = Table(title=f"Triton {now.triton}", title_justify="left")
    columns = ("call", "kernel", "sm", "registers", "spills", "shared", "occupancy", "loaded MB", "stored MB")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right", overflow="fold")
    moved = {(row["call"], row["kernel"]): row for row in now.bytes}
    for row in now.kernels:
        bytes_of = moved.get((row["call"], row["kernel"]))
        megabytes = [f"{bytes_of[way] / 1e6:,.2f}" if bytes_of else "" for way in ("loaded", "stored")]
        figures = (row["arch"], row["registers"], row["spills"], row["shared"])
        table.add_row(row["call"], row["kernel"], *map(str, figures), f"{row['occupancy']:.0%}", *megabytes)
    console(160).print(table)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``fastllm bench regress``."""
    parser = Parser(prog="fastllm bench regress", description=first_paragraph(__doc__))
    parser.add_argument("file", type=Path, metavar="FILE", help="Python with functions whose one argument is 'device'")
    parser.add_argument("--update", action="store_true", help="write the present figures to the committed file")
    parser.add_argument("--against", type=Path, metavar="JSON", help="the committed file (FILE with .regress.json)")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=list(GPUS), help="sm versions (those of the committed file, or all)"
    )
    return parser


def main(argv: list[str]) -> int:
    """The command line. 0: nothing is worse; 1: something is; 2: there is nothing to measure or compare to."""
    parser = build_parser()
    options = parser.parse_args(argv)
    against = options.against or options.file.with_suffix(".regress.json")
    try:
        if not options.file.is_file():
            raise ValueError(f"{options.file}: no such file")
        committed = read(against) if against.exists() else None
        if committed is None and not options.update:
            raise ValueError(f"{against}: no such file; --update writes it")
        arches = options.arch or (committed.arches if committed else list(GPUS))
        now = measure(options.file, arches)
    except (OSError, ValueError) as error:
        first, _, rest = str(error).partition("\n")
        if rest:
            print(rest, file=sys.stderr)
        parser.error(first)
    _show(now)
    for place, reason in now.failures.items():
        if place.endswith(", bytes"):
            print(f"{place} were not counted: {reason}")
    if options.update:
        return _updated(against, committed, now)
    assert committed is not None  # only --update does without
    if options.arch:
        committed.kernels = [row for row in committed.kernels if row["arch"] in options.arch]
    if committed.triton != now.triton:
        print(f"{against} is of Triton {committed.triton}, this is {now.triton}: another compiler gives other figures")
    return _judged(committed, now)


def _updated(against: Path, committed: Figures | None, now: Figures) -> int:
    """Writes ``now`` to ``against`` unless a call is broken; what the committed file allows stays allowed."""
    bad = broken(now)
    for line in bad:
        print(line)
    if bad:
        print(f"{len(bad)} failures; {against} stays as it was")
        return 1
    now.allow = committed.allow if committed else now.allow
    now.write(against)
    print(f"written: {against}")
    return 0


def _judged(committed: Figures, now: Figures) -> int:
    """Prints what is better and worse than committed. 1 where anything is worse."""
    verdict = compare(committed, now)
    for line in verdict.better:
        print(f"better: {line}")
    bad = broken(now) + verdict.worse
    for line in bad:
        print(f"worse: {line}")
    if verdict.better and not bad:
        print("--update keeps what is better")
    kernels = {(row["call"], row["kernel"]) for row in now.kernels}
    print(f"kernels: {len(kernels)}, architectures: {len(now.arches)}, failures: {len(bad)}")
    return int(bool(bad))
