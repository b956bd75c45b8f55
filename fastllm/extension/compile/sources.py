"""What the extension is compiled from: csrc/, and the fingerprint of what is there."""

from __future__ import annotations

import hashlib
from pathlib import Path

# The package fastllm, and what stands beside it in a checkout.
PACKAGE = Path(__file__).resolve().parents[2]


class CannotBuild(Exception):
    """Why the extension, or its CUDA part, cannot be built here; one line."""


def sources() -> Path:
    """csrc/: beside the package in a checkout, inside it once installed."""
    for folder in (PACKAGE.parent / "csrc", PACKAGE / "csrc"):
        if (folder / "ops.cpp").is_file():
            return folder
    raise CannotBuild("the sources (csrc/) are missing")


def fingerprint() -> str:
    """16 hexadecimal digits that change with any file of :func:`sources`."""
    folder = sources()
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
