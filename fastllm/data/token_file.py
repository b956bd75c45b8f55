"""Token files: a fixed header, the ids, and where documents and sentences begin; ``numpy.memmap`` alone reads them.

Layout, little-endian::

    ids = numpy.memmap(path, "<u2", "r", offset=256, shape=tokens)      # "<u4" where itemsize is 4

=========  ======  ===================================================================
bytes      type    content
=========  ======  ===================================================================
0-7        ASCII   magic, ``fastllmT``
8-11       uint32  version of this layout, 2
12-15      uint32  itemsize: 2 for uint16 ids, 4 for uint32 ids
16-23      uint64  vocabulary size: every id is below it
24-31      uint64  number of ids
32-39      uint64  number of documents; each is followed by an end-of-text id
40-47      uint64  UTF-8 bytes of the text that the ids stand for; end-of-text has none
48-79      bytes   SHA-256 of the tokenizer's definition (``Tokenizer.fingerprint``)
80-111     bytes   SHA-256 of the ids as stored
112-119    uint64  byte at which the document starts begin: that many uint64 as there are documents
120-127    uint64  byte at which the sentence starts begin
128-135    uint64  number of sentence starts, uint64 each
136-167    bytes   SHA-256 of the document starts and the sentence starts as stored
168-171    uint32  number of this shard, from 0
172-203    bytes   SHA-256 of bytes 0-171; zeros in files of version 0.2.0 and earlier
204-255    zeros
=========  ======  ===================================================================

A start is the position of an id in this file, ascending. A document's ids reach from its start to the end-of-text
before the next one's. Only shard 0 has one end-of-text more, before its first document, so that the shards' ids one
after another are what a single file would hold.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import InputError
from ..files import whole_file
from .concatenated import Concatenated
from .digest import arrays_sha256
from .tokenizer import Tokenizer

MAGIC = b"fastllmT"
VERSION = 2
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
        ("document_offset", "<u8"),
        ("sentence_offset", "<u8"),
        ("sentences", "<u8"),
        ("starts_sha256", "V32"),
        ("shard", "<u4"),
        ("header_sha256", "V32"),
        ("reserved", "V52"),
    ]
)
# Bytes of the header that its own SHA-256 is of.
DESCRIBED = 172
# Text that is encoded at once, on all cores, in characters.
BATCH = 1 << 20


@dataclass(frozen=True)
class TokenFile:
    """An open token file, or several that follow each other: arrays that stay on disk, and their header.

    ``tokens`` holds the ids; ``document_starts`` and ``sentence_starts`` hold positions in it, ascending.
    ``sha256`` is that of all ids as stored, in hexadecimal.
    """

    path: Path
    tokens: np.ndarray | Concatenated
    vocab_size: int
    documents: int
    bytes: int
    tokenizer: str
    sha256: str
    document_starts: np.ndarray | Concatenated
    sentence_starts: np.ndarray | Concatenated

    def __len__(self) -> int:
        return len(self.tokens)


class TokenWriter:
    """Writes one token file, whole or not at all: a context manager that takes encoded documents.

    Ids go to the disk as they come; of each document and each sentence it keeps 8 bytes.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer, shard: int = 0):
        self.path = Path(path)
        self._end = tokenizer.end_of_text
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._header = header = np.zeros((), HEADER)
        header["magic"], header["version"], header["itemsize"] = MAGIC, VERSION, self._dtype.itemsize
        header["vocab_size"], header["shard"] = tokenizer.vocab_size, shard
        header["tokenizer"] = np.void(bytes.fromhex(tokenizer.fingerprint))
        self._digest = hashlib.sha256()
        self._starts = {"document": array("Q"), "sentence": array("Q")}
        self._stack = ExitStack()
        self._file: Any = None  # a binary file from __enter__ to __exit__

    def __enter__(self) -> TokenWriter:
        self._file = self._stack.enter_context(whole_file(self.path))
        self._file.write(bytes(OFFSET))
        if self._header["shard"] == 0:
            self._put(np.asarray([self._end]))
        return self

    def add(self, ids: np.ndarray, sentences: np.ndarray, size: int) -> None:
        """One document: its ids, the positions among them at which sentences begin, its text's UTF-8 bytes."""
        begin = int(self._header["tokens"])
        self._starts["document"].append(begin)
        self._starts["sentence"].extend((np.asarray(sentences, np.uint64) + np.uint64(begin)).tolist())
        self._put(ids)
        self._put(np.asarray([self._end]))
        self._header["documents"] += 1
        self._header["bytes"] += size

    def _put(self, ids: np.ndarray) -> None:
        stored = np.asarray(ids, self._dtype).tobytes()
        self._digest.update(stored)
        self._file.write(stored)
        self._header["tokens"] += len(ids)

    @property
    def tokens(self) -> int:
        return int(self._header["tokens"])

    def __exit__(self, *exc) -> bool | None:
        if exc[0] is None:
            try:
                self._finish()
            except BaseException as error:  # the disk is full: what was written goes, and the error names the file
                self._stack.__exit__(type(error), error, error.__traceback__)
                raise
        return self._stack.__exit__(*exc)

    def _finish(self) -> None:
        """Write the starts, and the header that makes the file one."""
        header, digest = self._header, hashlib.sha256()
        # Starts are aligned, so that they can be mapped too.
        self._file.write(bytes(-self._file.tell() % 8))
        for name, starts in self._starts.items():
            header[f"{name}_offset"] = self._file.tell()
            stored = np.asarray(starts, "<u8").tobytes()
            digest.update(stored)
            self._file.write(stored)
        header["sentences"] = len(self._starts["sentence"])
        header["sha256"] = np.void(self._digest.digest())
        header["starts_sha256"] = np.void(digest.digest())
        header["header_sha256"] = np.void(_header_digest(header.tobytes()))
        self._file.seek(0)
        self._file.write(header.tobytes())


def _header_digest(header: bytes) -> bytes:
    return hashlib.sha256(header[:DESCRIBED]).digest()


def encoded(documents: Iterable[str], tokenizer: Tokenizer) -> Iterable[tuple[np.ndarray, np.ndarray, int]]:
    """For each document what :meth:`TokenWriter.add` takes; about :data:`BATCH` characters are held at a time."""
    texts: list[str] = []
    size = 0

    def flush():
        for text, (ids, sentences) in zip(texts, tokenizer.encode_batch(texts), strict=True):
            yield ids, sentences, len(text.encode())
        texts.clear()

    for document in documents:
        texts.append(document)
        size += len(document)
        if size >= BATCH:
            yield from flush()
            size = 0
    yield from flush()


def write_token_file(path: str | Path, documents: Iterable[str], tokenizer: Tokenizer) -> None:
    """Encode ``documents`` into ``path``, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with TokenWriter(path, tokenizer) as writer:
        for document in encoded(documents, tokenizer):
            writer.add(*document)


def open_token_file(path: str | Path, tokenizer: Tokenizer | None = None, shard: int = 0) -> TokenFile:
    """Map ``path`` and check its length, its SHA-256 and, if ``tokenizer`` is given, that it was made with it.

    Raises:
        InputError: the file is missing, is not a token file, is cut short or changed, or belongs to another tokenizer
            or shard. The message names the file.
    """
    path = Path(path)
    header = _read_header(path)
    count, itemsize, documents, sentences = (
        int(header[name]) for name in ("tokens", "itemsize", "documents", "sentences")
    )
    made_with = header["tokenizer"].tobytes().hex()
    if tokenizer is not None and made_with != tokenizer.fingerprint:
        raise InputError(
            f"{path}: made with another tokenizer (fingerprint {made_with[:12]}, this one has "
            f"{tokenizer.fingerprint[:12]})"
        )
    if header["shard"] != shard:
        raise InputError(f"{path}: shard {header['shard']}, expected shard {shard}")
    tokens = np.memmap(path, f"<u{itemsize}", mode="r", offset=OFFSET, shape=(count,))
    starts = [
        np.memmap(path, "<u8", mode="r", offset=int(header[f"{kind}_offset"]), shape=(number,))
        if number
        else np.zeros(0, "<u8")
        for kind, number in (("document", documents), ("sentence", sentences))
    ]
    if header["header_sha256"].tobytes() not in (bytes(32), _header_digest(header.tobytes())):
        raise InputError(f"{path}: damaged token file: its header does not match its own SHA-256")
    digests = [arrays_sha256([tokens]), arrays_sha256(starts)]
    if digests != [header[name].tobytes().hex() for name in ("sha256", "starts_sha256")]:
        raise InputError(f"{path}: damaged token file: its SHA-256 does not match its header")
    return TokenFile(
        path=path,
        tokens=tokens,
        vocab_size=int(header["vocab_size"]),
        documents=documents,
        bytes=int(header["bytes"]),
        tokenizer=made_with,
        sha256=digests[0],
        document_starts=starts[0],
        sentence_starts=starts[1],
    )


def _read_header(path: Path) -> np.void:
    """The header of a token file whose parts lie where this version puts them, and which ends with the last of them.

    Raises:
        InputError: the file is missing, is not a token file of this version, or has another length.
    """
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
    count, itemsize, documents, sentences = (
        int(header[name]) for name in ("tokens", "itemsize", "documents", "sentences")
    )
    document_offset, sentence_offset = (OFFSET + count * itemsize + 7) // 8 * 8, int(header["sentence_offset"])
    expected = sentence_offset + 8 * sentences
    placed = int(header["document_offset"]) == document_offset and sentence_offset == document_offset + 8 * documents
    if size != expected or not count or not placed:
        raise InputError(f"{path}: damaged token file: {expected} bytes expected, {size} found")
    return header
