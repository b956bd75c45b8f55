"""The attention kernels' launch tables, entry by entry: each compiled for each architecture, and what ptxas made of it.

    python -m fastllm.bench.attention_tables [--arch 80 90 100] [--dtype float16 bfloat16 float32] [--dim 64 128 256]
                                             [--feature TEXT...] [--json FILE]

prints registers, bytes of stack (spills), shared memory and matrix instructions of every kernel, and exits with 1 where
one spills or does not fit. All of it takes about 40 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from ..registry import OPS
from .attention import decoding, dense, packed, parameter, slopes
from .capture import CUDA, GPUS, launches
from .static import Resources, read_resources

DTYPES = ("bfloat16", "float16", "float32")
DIMS = (64, 128, 256)
_EVERYTHING = dict(
    window=(100, 64),
    softcap=20.0,
    alibi_slopes=slopes(4),
    sinks=parameter(4),
    bias=parameter(1, 4, 512, 512),
    dropout_p=0.1,
    return_lse=True,
)
_LENGTHS = dict(max_seqlen_q=512, max_seqlen_k=512)
# Feature -> what makes the call for a head dim, by load: one of each kind, where it needs most.
FEATURES = {
    "full": lambda dim: dense(2, 4, 512, dim),
    "grouped causal": lambda dim: dense(2, 4, 512, dim, 2, causal=True),
    "packed grouped": lambda dim: packed(4, 512, 4, dim - 8, 2, causal=True),
    "packed window": lambda dim: packed(4, 512, 4, dim - 8, 2, window=(100, 64)),
    "soft cap": lambda dim: packed(4, 512, 4, dim - 8, 2, causal=True, softcap=50.0),
    "alibi": lambda dim: packed(4, 512, 4, dim - 8, 2, causal=True, alibi_slopes=slopes(4)),
    "bias": lambda dim: packed(4, 512, 4, dim - 8, 2, causal=True, bias=parameter(1, 4, 512, 512), **_LENGTHS),
    "dropout": lambda dim: packed(4, 512, 4, dim - 8, 2, causal=True, dropout_p=0.1),
    "dense everything": lambda dim: dense(2, 4, 512, dim, 2, **_EVERYTHING),
    "packed everything": lambda dim: packed(4, 512, 4, dim - 8, 2, **_EVERYTHING, **_LENGTHS),
    "scalar loads": lambda dim: packed(4, 512, 4, dim - 4, 2, causal=True),
    "decode": lambda dim: decoding(2, 8, 2, 1024, dim, window=(900, 0), softcap=20.0),
}


@dataclass(frozen=True)
class Entry:
    """One kernel of one call: its tile and resources."""

    feature: str
    dim: int
    dtype: str
    arch: int
    kernel: str
    resources: Resources

    @property
    def fits(self) -> bool:
        """No spills, and a processor can hold it."""
        return self.resources.spills == 0 and self.resources.shared <= GPUS[self.arch].shared_per_block


def entries(
    arches: Iterable[int] = tuple(GPUS),
    dtypes: Iterable[str] = DTYPES,
    dims: Iterable[int] = DIMS,
    features: Iterable[str] = ("",),
) -> Iterator[Entry]:
    """Compiles the launches of every feature whose name contains one of ``features``.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    known: dict[str, Resources] = {}
    for arch in arches:
        for dtype in dtypes:
            for dim in dims:
                for name, make in FEATURES.items():
                    if not any(text in name for text in features):
                        continue
                    sample = partial(make(dim), CUDA, getattr(torch, dtype))
                    for launch in {x.compiled.hash: x for x in launches(OPS["attention"], sample, GPUS[arch])}.values():
                        key = launch.compiled.hash
                        if key not in known:
                            known[key] = read_resources(launch.compiled)
                        kernel = launch.kernel.strip("_").removesuffix("_kernel")
                        yield Entry(name, dim, dtype, arch, kernel, known[key])


def _line(entry: Entry) -> str:
    r = entry.resources
    matrix = "HGMMA" if r.count("HGMMA") else "HMMA" if r.count("HMMA") else "UTCHMMA" if r.tensor_core else "-"
    return (
        f"sm_{entry.arch:<4}{entry.dtype:<9} d{entry.dim:<4}{entry.feature:<19}{entry.kernel:<20}"
        f"warps {r.num_warps:<3}stages {r.num_stages:<3}registers {r.registers:<4}stack {r.stack:<5}"
        f"local {r.count('LDL', 'STL'):<4}shared {r.shared:<7}{matrix:<8}{'' if entry.fits else 'DOES NOT FIT'}"
    ).rstrip()


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring. 1 where an entry spills or does not fit."""
    parser = argparse.ArgumentParser("python -m fastllm.bench.attention_tables", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=list(GPUS), default=list(GPUS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--dim", type=int, nargs="+", choices=DIMS, default=DIMS)
    parser.add_argument("--feature", nargs="+", default=[""], help="only features whose name contains one of these")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every entry with its opcodes there")
    options = parser.parse_args(argv)
    found = []
    for entry in entries(options.arch, options.dtype, options.dim, options.feature):
        found.append(entry)
        print(_line(entry), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(entry) for entry in found]))
    bad = sum(not entry.fits for entry in found)
    print(f"{len(found)} kernels, {bad} that spill or do not fit")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
