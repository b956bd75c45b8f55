"""Token files: a fixed header and then the ids, so that ``numpy.memmap`` alone can read them.

Layout, little-endian; the ids start at byte 256: ``numpy.memmap(path, "<u2", offset=256)`` (``"<u4"`` by ``itemsize``).

=========  ======  ===================================================================
bytes      type    content
=========  ======  ===================================================================
0-7        ASCII   magic, ``fastllmT``
8-11       uint32  version of this layout, 1
12-15      uint32  itemsize: 2 for uint16 ids, 4 for uint32 ids
16-23      uint64  vocabulary size: every id is below it
24-31      uint64  number of ids
32-39      uint64  number of documents; each is followed by an end-of-text id, one more stands at the start
40-47      uint64  UTF-8 bytes of the text that the ids stand for; end-of-text counts none
48-79      bytes   SHA-256 of the tokenizer's definition (``Tokenizer.fingerprint``)
80-111     bytes   SHA-256 of the ids as stored
112-255    zeros
=========  ======  ===================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import InputError
from ..files import whole_file
from .tokenizer import Tokenizer

MAGIC = b"fastllmT"
VERSION = 1
OFFSET = 256
HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("itemsize", "<u4"),
        ("vocab_size", "<u8"),
        ("tokens", "<u8"),
        ("documents", "<u8"),
        ("bytes", "<u8"),
        ("tokenizer", "V32"),
        ("sha256", "V32"),
        ("reserved", "V144"),
    ]
)


@dataclass(frozen=True)
class TokenFile:
    """An open token file: ``tokens`` is the memory-mapped array, the rest its header."""

    path: Path
    tokens: np.ndarray
    vocab_size: int
    documents: int
    bytes: int
    tokenizer: str
    sha256: str

    def __len__(self) -> int:
        return len(self.tokens)


def write_token_file(path: str | Path, documents: Iterable[str], tokenizer: Tokenizer) -> None:
    """Encode ``documents`` into ``path``, whole or not at all; one document is held in memory at a time.

    Raises:
        OSError: it cannot be written.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    header = np.zeros((), HEADER)
    digest = hashlib.sha256()
    with whole_file(path) as file:
        file.write(bytes(OFFSET))

        def put(ids: list[int]) -> None:
            stored = np.asarray(ids, dtype).tobytes()
            digest.update(stored)
            file.write(stored)
            header["tokens"] += len(ids)

        put([tokenizer.end_of_text])
        for document in documents:
            put([*tokenizer.encode(document), tokenizer.end_of_text])
            header["documents"] += 1
            header["bytes"] += len(document.encode())
        header["magic"], header["version"], header["itemsize"] = MAGIC, VERSION, dtype.itemsize
        header["vocab_size"] = tokenizer.vocab_size
        header["tokenizer"] = np.void(bytes.fromhex(tokenizer.fingerprint))
        header["sha256"] = np.void(digest.digest())
        file.seek(0)
        file.write(header.tobytes())


def open_token_file(path: str | Path, tokenizer: Tokenizer | None = None) -> TokenFile:
    """Map ``path`` and check it: length, SHA-256 and, where ``tokenizer`` is given, that it was made with it.

    Raises:
        InputError: missing, not a token file, cut short, changed, or of another tokenizer. Names the file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(OFFSET)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if len(start) < OFFSET or not start.startswith(MAGIC):
        raise InputError(f"{path}: not a token file")
    header = np.frombuffer(start, HEADER)[0]
    if header["version"] != VERSION or header["itemsize"] not in (2, 4):
        raise InputError(f"{path}: token file version {header['version']}, this program reads version {VERSION}")
    count, itemsize = int(header["tokens"]), int(header["itemsize"])
    expected = OFFSET + count * itemsize
    if size != expected or not count:
        raise InputError(f"{path}: damaged token file: {expected} bytes expected, {size} found")
    made_with = header["tokenizer"].tobytes().hex()
    if tokenizer is not None and made_with != tokenizer.fingerprint:
        raise InputError(
            f"{path}: made with another tokenizer (fingerprint {made_with[:12]}, this one has "
            f"{tokenizer.fingerprint[:12]})"
        )
    tokens = np.memmap(path, f"<u{itemsize}", mode="r", offset=OFFSET, shape=(count,))
    digest = hashlib.sha256()
    for begin in range(0, count, 1 << 22):
        digest.update(tokens[begin : begin + (1 << 22)])
    if digest.digest() != header["sha256"].tobytes():
        raise InputError(f"{path}: damaged token file: its SHA-256 does not match its header")
    return TokenFile(
        path=path,
        tokens=tokens,
        vocab_size=int(header["vocab_size"]),
        documents=int(header["documents"]),
        bytes=int(header["bytes"]),
        tokenizer=made_with,
        sha256=digest.hexdigest(),
    )
