"""The attention kernels' launch tables, entry by entry: each compiled for each architecture, and what ptxas made of it.

    python -m fastllm.bench.attention_tables [--arch 80 90 100] [--dtype bfloat16 float16 float32] [--dim 64 128 256]
                                             [--feature TEXT...] [--budget SECONDS] [--results FILE] [--page FILE]
    python -m fastllm.bench.attention_tables --spot

prints registers, bytes of stack (spills), shared memory, bulk tensor copies and matrix instructions of every kernel,
and exits with 1 where one spills or does not fit, or a call is left; ``--feature hopper`` are the calls that the Gluon
kernels serve on sm_90, which must also have warpgroup products and bulk copies. All of it takes about half an hour of
one core. ``--results`` keeps what was compiled, by a hash of the kernels' sources: several runs share it, and the next
goes on where the last stopped. ``--page`` writes what it holds as docs/attention-tables.md; ``--spot`` compiles two
calls.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, product
from pathlib import Path

import torch
import triton

from .. import kernels
from ..kernels.attention.problem import bulk_copies
from ..kernels.device import GPUS
from ..parser import first_paragraph
from ..registry import OPS
from .attention import decoding, dense, packed, parameter, slopes
from .budget import Budget
from .capture import CUDA, launches, short_name
from .cases import code_hash
from .sass import Resources, read_resources

DTYPES = ("bfloat16", "float16", "float32")
DIMS = (64, 128, 256)


def _everything(rows: int, cols: int, heads: int) -> dict:
    return dict(
        window=(cols - 100, 64),
        softcap=20.0,
        alibi_slopes=slopes(heads),
        sinks=parameter(heads),
        bias=parameter(1, heads, rows, cols),
        dropout_p=0.1,
        return_lse=True,
    )


_LENGTHS = dict(max_seqlen_q=512, max_seqlen_k=512)
# Feature -> what makes the call for a head dim: for each register pressure the commonest call, and the one that needs
# most registers.
FEATURES = {
    "full": lambda dim: dense(2, 4, 512, dim),
    "everything": lambda dim: dense(2, 4, 512, dim, **_everything(512, 512, 4)),
    "window soft cap": lambda dim: dense(2, 4, 512, dim, causal=True, window=(100, 0), softcap=50.0),
    "packed grouped": lambda dim: packed(4, 512, 4, dim - 8, 2, causal=True),
    "packed window": lambda dim: packed(4, 512, 4, dim - 8, 2, window=(100, 64)),
    "soft cap": lambda dim: packed(4, 512, 4, dim - 8, 2, causal=True, softcap=50.0),
    "scalar loads": lambda dim: packed(4, 512, 4, dim - 4, 2, causal=True),
    "packed everything": lambda dim: packed(4, 512, 4, dim - 8, 2, **_everything(512, 512, 4), **_LENGTHS),
    "decode everything": lambda dim: decoding(2, 8, 2, 1024, dim, **_everything(1, 1024, 8)),
}
# The calls that the Hopper kernels have a variant for.
HOPPER = {
    "hopper causal": lambda dim: dense(2, 4, 512, dim, 2, causal=True),
    "hopper full": lambda dim: dense(2, 4, 512, dim),
    "hopper packed causal": lambda dim: packed(4, 512, 4, dim, 2, causal=True),
    "hopper packed full": lambda dim: packed(4, 512, 4, dim),
}
GLUON = ("attention_hopper_fwd", "attention_hopper_bwd")
# Bytes of shared memory that a block can have. sm_86, sm_89 and sm_120 take sm_80's tiles and have less of it.
SHARED = {**{arch: gpu.shared_per_block for arch, gpu in GPUS.items()}, 80: 99 << 10}
# float16 has bfloat16's tiles and instructions: the heaviest of each register pressure stand for it.
OF_FLOAT16 = ("packed grouped", "packed window", "scalar loads", "packed everything")


@dataclass(frozen=True)
class Entry:
    """One kernel of one call, its hash and its resources."""

    feature: str
    dim: int
    dtype: str
    arch: int
    direction: str
    kernel: str
    key: str
    resources: Resources

    @property
    def fits(self) -> bool:
        """No spills, a processor can hold it, and a Hopper kernel has what it is for."""
        if self.feature in HOPPER and not (self.matrix == "HGMMA" and self.copies):
            return False
        return self.resources.spills == 0 and self.resources.shared <= SHARED[self.arch]

    @property
    def copies(self) -> int:
        """How many instructions copy tiles in bulk."""
        return self.resources.count("UTMALDG")

    @property
    def matrix(self) -> str:
        """The matrix instructions that it has."""
        r = self.resources
        return "HGMMA" if r.count("HGMMA") else "HMMA" if r.count("HMMA") else "UTCHMMA" if r.tensor_core else "-"


def fingerprint(calls: Iterable[str] = FEATURES) -> str:
    """A hash of the code that the kernels of ``calls`` come from, and of the names of the calls."""
    folder = Path(kernels.__path__[0])
    ours = [*folder.glob("attention/*.py"), folder / "launch.py", folder / "math.py"]
    if calls is FEATURES:
        ours = [file for file in ours if not file.name.startswith("hopper")]
    return code_hash(sorted(ours), *calls)


def _sources(feature: str) -> list[str]:
    return [fingerprint(HOPPER if feature in HOPPER else FEATURES), triton.__version__]


Call = tuple[int, str, int, str]


def spot() -> list[Call]:
    """The plain kernels, whose products must be warpgroups', and one call more: another after each change."""
    others = [name for name in FEATURES if name != "full"]
    return [(90, "bfloat16", 128, "full"), (90, "bfloat16", 64, others[int(fingerprint(), 16) % len(others)])]


def planned(arches=tuple(GPUS), dtypes=DTYPES, dims=DIMS, features=(*FEATURES, *HOPPER)) -> list[Call]:
    """Every call of these."""

    def tells(arch, dtype, dim, feature):
        if feature in HOPPER:
            return arch == 90 and dtype != "float32" and dim <= 128
        # With all features at once dense tiles differ from packed ones where bulk copies bring them.
        if feature == "everything" and not bulk_copies(arch, getattr(torch, dtype)):
            return False
        return dtype != "float16" or feature in OF_FLOAT16

    return [call for call in product(arches, dtypes, dims, features) if tells(*call)]


def compiled(call: Call) -> list[Entry]:
    """What the call (architecture, dtype, head dim, feature) launches, each kernel once.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    arch, dtype, dim, feature = call
    if feature in HOPPER:
        return compiled_hopper(dtype, dim, feature)
    found = {}
    for launch in launches(OPS["attention"], partial(FEATURES[feature](dim), CUDA, getattr(torch, dtype)), GPUS[arch]):
        kernel = short_name(launch.kernel)
        key = launch.compiled.hash
        if key not in found:
            resources = read_resources(launch.compiled)
            found[key] = Entry(feature, dim, dtype, arch, launch.direction, kernel, key, resources)
    return list(found.values())


def compiled_hopper(dtype: str, dim: int, feature: str) -> list[Entry]:
    """The Gluon kernels of a call of :data:`HOPPER`: the forward and, of a dense call, the backward.

    Raises:
        RuntimeError: Triton's interpreter is on, or other kernels served the call.
    """
    found = {}
    for launch in launches(
        OPS["attention"], partial(HOPPER[feature](dim), CUDA, getattr(torch, dtype)), GPUS[90], "hopper"
    ):
        kernel = short_name(launch.kernel)
        if kernel in GLUON:
            resources = read_resources(launch.compiled)
            found[kernel] = Entry(feature, dim, dtype, 90, launch.direction, kernel, launch.compiled.hash, resources)
    expected = GLUON[:1] if "packed" in feature else GLUON
    if tuple(found) != expected:
        raise RuntimeError(f"{feature}, {dtype}, head dim {dim}: served by {', '.join(found) or 'other kernels'}")
    return list(found.values())


def read(file: Path | None) -> dict[Call, list[Entry]]:
    """The calls that the file holds of these kernels."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file and file.exists() else ():
        record = json.loads(line)
        if record["sources"] == _sources(record["call"][3]):
            entries = [Entry(**{**e, "resources": Resources(**e["resources"])}) for e in record["entries"]]
            found[tuple(record["call"])] = entries
    return found


def _keep(file: Path, call: Call, entries: list[Entry]) -> None:
    record = dict(sources=_sources(call[3]), call=call, entries=[asdict(e) for e in entries])
    # One write, so that several runs may share the file.
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")


def _line(entry: Entry) -> str:
    r = entry.resources
    return (
        f"sm_{entry.arch:<4}{entry.dtype:<9} d{entry.dim:<4}{entry.feature:<21}{entry.kernel:<21}"
        f"warps {r.num_warps:<3}stages {r.num_stages:<3}registers {r.registers:<4}stack {r.stack:<5}"
        f"local {r.count('LDL', 'STL'):<4}shared {r.shared:<7}copies {entry.copies:<4}{entry.matrix:<8}"
        f"{'' if entry.fits else 'DOES NOT FIT'}"
    ).rstrip()


_COLUMNS = (
    "dtype",
    "head dim",
    "call",
    "kernel",
    "warps",
    "stages",
    "registers",
    "spills",
    "shared KB",
    "bulk copies",
    "matrix instructions",
)


def _place(entry: Entry) -> tuple:
    e = entry
    return DTYPES.index(e.dtype), e.dim, [*FEATURES, *HOPPER].index(e.feature), e.direction != "forward", e.kernel


def page(results: dict[Call, list[Entry]]) -> str:
    """The register table of all calls as Markdown."""
    found, seen = [], set()
    for call in planned():
        found += [e for e in results.get(call, ()) if e.key not in seen]
        seen |= {e.key for e in found}
    missing = Counter(call[:2] for call in planned() if call not in results)
    left = ", ".join(f"{n} of sm_{arch} {dtype}" for (arch, dtype), n in missing.items())
    arches = " / ".join(f"sm_{arch}" for arch in GPUS)
    text = [
        "# Attention's launch tables, compiled\n",
        f"Generated by `python -m fastllm.bench.attention_tables --results FILE --page docs/attention-tables.md` with "
        f"Triton {triton.__version__}. Sources: {fingerprint()}, of the Gluon kernels {fingerprint(HOPPER)}.\n",
        f"For {arches}: registers a thread, spills (loads and stores of thread-local memory), shared memory of a "
        "block. A kernel that several calls share stands under the first of them. Head dims up to 64, 128 and 256 have "
        "a tile each; packed calls have a head dim of 8 less, scalar loads 4 less. Products of float32 are the scalar "
        "units'. Bulk copies are instructions that bring tiles by TMA; calls named hopper are the Gluon kernels'.\n",
        f"{len(planned()) - missing.total()} of {len(planned())} calls are compiled"
        + (f"; missing: {left}." if left else "."),
    ]
    text += ["\n| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    for _, same in groupby(sorted(found, key=_place), key=_place):
        by_arch = {e.arch: e for e in same}
        first = next(iter(by_arch.values()))
        cells = [
            " / ".join(str(value(by_arch[arch])) if arch in by_arch else "" for arch in GPUS)
            for value in (
                lambda e: e.resources.num_warps,
                lambda e: e.resources.num_stages,
                lambda e: e.resources.registers,
                lambda e: e.resources.spills,
                lambda e: f"{e.resources.shared / 1024:.1f}",
                lambda e: e.copies,
                lambda e: e.matrix,
            )
        ]
        text.append(f"| {first.dtype} | {first.dim} | {first.feature} | {first.kernel} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def stale(file: Path) -> str | None:
    """Why the page is out of date, or None."""
    written = re.search(r"Sources: (\w+), of the Gluon kernels (\w+)\.", file.read_text(encoding="utf-8"))
    if written is None or written.groups() != (fingerprint(), fingerprint(HOPPER)):
        return f"{file} is stale: run python -m fastllm.bench.attention_tables --results FILE --page {file}"
    return None


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring. 1 where an entry spills or does not fit."""
    parser = argparse.ArgumentParser("python -m fastllm.bench.attention_tables", description=first_paragraph(__doc__))
    parser.add_argument("--arch", type=int, nargs="+", choices=list(GPUS), default=list(GPUS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--dim", type=int, nargs="+", choices=DIMS, default=DIMS)
    parser.add_argument("--feature", nargs="+", default=[""], help="only calls whose name contains one of these")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no call after it")
    parser.add_argument("--results", metavar="FILE", type=Path, help="take from it what it has, add what it lacks")
    parser.add_argument("--page", metavar="FILE", type=Path, help="write the table of the results there")
    parser.add_argument("--spot", action="store_true", help="compile two calls for sm_90 and no others")
    options = parser.parse_args(argv)
    features = [name for name in (*FEATURES, *HOPPER) if any(text in name for text in options.feature)]
    calls = spot() if options.spot else planned(options.arch, options.dtype, options.dim, features)
    results, budget = read(options.results), Budget(options.budget)
    done = []
    for call in calls:
        if call not in results:
            if not budget.allows(str(call)):
                continue
            results[call] = compiled(call)
            if options.results:
                _keep(options.results, call, results[call])
        done += results[call]
        print(*map(_line, results[call]), sep="\n", flush=True)
    bad = sum(not entry.fits for entry in done)
    if budget.left_out:
        print(f"{len(budget.left_out)} calls were not begun in {options.budget:g} s")
    if options.page:
        options.page.write_text(page(results), encoding="utf-8")
    print(f"{len(done)} kernels, {bad} that spill or do not fit")
    return int(bad > 0 or bool(budget.left_out))


if __name__ == "__main__":
    sys.exit(main())
