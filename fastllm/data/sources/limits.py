"""How much a source may hold at most, and what is said when it holds more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds on hostile input.

    Attributes:
        document: bytes of one document, after decompression.
        ratio: how many times its compressed size a file may grow, once it is beyond ``free`` bytes.
    """

    document: int = 64 * MIB
    ratio: int = 200
    free: int = 64 * MIB


@dataclass(frozen=True)
class Raw:
    """A document as its source holds it: bytes, and what kind of text they are."""

    id: str
    content: bytes
    kind: str
    metadata: dict[str, str]
    encoding: str | None = None


@dataclass(frozen=True)
class Failure:
    """Something of a source that could not be read: where, a reason in one word, and its particulars."""

    id: str
    reason: str
    details: dict[str, Any]


def too_large(id: str, limits: Limits) -> Failure:
    """A document that has more bytes than it may have."""
    return Failure(id, "too_large", {"limit": limits.document})


class Unreadable(Exception):
    """The rest of a source cannot be read. ``reason`` is one word: truncated, damaged, bomb, too_large, unreadable."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def one_line(error: BaseException) -> str:
    """The error's kind and message in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
