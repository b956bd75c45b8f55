"""Text to train on: documents, their split into training and validation, and what xz makes of them."""

from __future__ import annotations

import hashlib
import lzma
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..config import InputError, read_plain
from .held_out import HELD_OUT, is_held_out
from .sources.compressed import SUFFIXES, open_stream
from .sources.limits import Limits, Unreadable

if TYPE_CHECKING:
    from .prepared import PreparedCorpus

# xz -9 remembers 64 MiB and compresses a few MB/s. A text of more characters, or of more bytes, is left out.
XZ_LIMIT = 16 << 20


@dataclass(frozen=True)
class Corpus:
    """Documents, split into training and validation. ``notes`` says what was left out and how the split was made."""

    name: str
    train: list[str]
    validation: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def characters(self) -> int:
        """The characters of all documents."""
        return sum(map(len, (*self.train, *self.validation)))

    @property
    def sha256(self) -> str:
        """SHA-256 of all documents and of the split, in hexadecimal."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(len(part).to_bytes(8, "little"))
            for document in part:
                encoded = document.encode()
                digest.update(len(encoded).to_bytes(8, "little"))
                digest.update(encoded)
        return digest.hexdigest()


def deduplicate(documents: Iterable[str]) -> tuple[list[str], int]:
    """Remove every paragraph that occurred before, in this document or an earlier one.

    Paragraphs are what blank lines ("\\n\\n") separate; they are compared without surrounding white space, and empty
    ones go too.

    Returns:
        The documents in their order (one may be left empty), and the number of repeated paragraphs removed.
    """
    seen: set[str] = set()
    result, removed = [], 0
    for document in documents:
        kept = []
        for paragraph in document.split("\n\n"):
            key = paragraph.strip()
            if not key:
                continue
            if key in seen:
                removed += 1
                continue
            seen.add(key)
            kept.append(paragraph)
        result.append("\n\n".join(kept))
    return result, removed


def split_documents(documents: Sequence[str]) -> tuple[list[str], list[str], str]:
    """Training documents, validation documents, and the rule that was used, in words.

    From ten documents on, every tenth is validation (number i, from 0, when i % 10 == 9); a document left empty by
    :func:`deduplicate` counts and is then dropped. With fewer, the last tenth of each document is.
    """
    if len(documents) >= HELD_OUT:
        train = [d for i, d in enumerate(documents) if d and not is_held_out(i)]
        validation = [d for i, d in enumerate(documents) if d and is_held_out(i)]
        return train, validation, "every tenth document is held out"
    pairs = [_split_tail(d) for d in documents if d]
    train = [head for head, _ in pairs if head]
    return train, [tail for _, tail in pairs if tail], "the last tenth of each document is held out"


def _split_tail(document: str) -> tuple[str, str]:
    """Cut at the paragraph, else the line, else the character where nine tenths of ``document`` are over."""
    target = len(document) * (HELD_OUT - 1) // HELD_OUT
    for separator in ("\n\n", "\n"):
        cuts = [match.end() for match in re.finditer(separator, document[:-1])]
        # Without enough places to cut, the held-out part would be far from a tenth.
        if len(cuts) >= HELD_OUT:
            cut = min(cuts, key=lambda position: abs(position - target))
            return document[: cut - len(separator)], document[cut:]
    return document[:target], document[target:]


def default_corpus(remove_repeated: bool = True) -> Corpus:
    """The language reference that every Python carries (``pydoc_data.topics``), one document for each topic."""
    from pydoc_data.topics import topics

    return _corpus("pydoc_data.topics", [topics[name] for name in sorted(topics)], None, remove_repeated, [])


def read_corpus(
    paths: Sequence[str | Path], remove_repeated: bool = True, held_out: Sequence[str | Path] = ()
) -> Corpus:
    """Text files and folders of them; each file is one document.

    Folders are read with all files in them, in the order of the paths, without hidden files. Files in folders that are
    empty or are not UTF-8 text are skipped, and ``notes`` says so. A file in ``paths`` itself must be text.

    Args:
        held_out: what is validation, while all of ``paths`` is trained on. Without it :func:`split_documents` decides.

    Raises:
        InputError: a path is missing, a named file is empty or not text, or nothing is left. Names the path.
    """
    documents, notes = _read_documents(paths)
    name = ", ".join(map(str, paths))
    if not held_out:
        return _corpus(name, documents, None, remove_repeated, notes)
    validation, more = _read_documents(held_out)
    return _corpus(name, [*documents, *validation], len(documents), remove_repeated, [*notes, *more])


def _read_documents(paths: Sequence[str | Path]) -> tuple[list[str], list[str]]:
    """The documents that ``paths`` hold, and a sentence about the files that were skipped."""
    documents: list[str] = []
    skipped: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if not file.is_file() or any(part.startswith(".") for part in file.relative_to(path).parts):
                    continue
                try:
                    documents.append(read_text(file))
                except InputError as error:
                    skipped.append(str(error))
        else:
            documents.append(read_text(path))
    if not documents:
        raise InputError(f"no text file in {', '.join(map(str, paths))}" + (f" ({skipped[0]})" if skipped else ""))
    return documents, [f"{len(skipped)} files skipped, the first: {skipped[0]}"] if skipped else []


def _corpus(name: str, documents: list[str], trained_on: int | None, remove_repeated: bool, notes: list[str]) -> Corpus:
    """``trained_on``: how many first documents are; None: as :func:`split_documents` has it."""
    if remove_repeated:
        documents, removed = deduplicate(documents)
        if removed:
            notes = [*notes, f"{removed:,} repeated paragraphs removed"]
    if trained_on is None:
        train, validation, rule = split_documents(documents)
    else:
        train, validation = ([d for d in part if d] for part in (documents[:trained_on], documents[trained_on:]))
        rule = "the text to score on is given"
        if train and not validation:
            raise InputError("held_out: each of its paragraphs is in the training text as well, and repeated ones are "
                             "removed (deduplicate)")  # fmt: skip
    if not train or not validation:
        raise InputError(f"{name}: too little text to split into training and validation")
    return Corpus(name, train, validation, [*notes, rule])


def read_text(path: Path, *, legacy: Mapping[re.Pattern[str], float] = MappingProxyType({})) -> str:
    """A text file's content, UTF-8 with or without a mark, its lines ended by a newline alone.

    A file is decompressed as its name says.

    Args:
        legacy: beginnings of files that are read as Latin-1 where they are not UTF-8 -> the largest part of their bytes
            that may be Latin-1's own.

    Raises:
        InputError: no such file, a folder or device, unreadable, damaged, binary, not UTF-8, or empty.
    """
    content = _decompressed(path)
    if b"\0" in content:
        raise InputError(f"{path}: a binary file, not text (byte 0 at offset {content.index(0)})")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = content.decode("latin-1")
        part = sum(byte > 127 for byte in content) / len(content)
        if not any(beginning.match(text) and part <= most for beginning, most in legacy.items()):
            raise InputError(f"{path}: not UTF-8 text (offset {error.start})") from error
    text = text.replace("\r\n", "\n")
    if not text.strip():
        raise InputError(f"{path}: an empty file")
    return text


def _decompressed(path: Path) -> bytes:
    if path.suffix.lower() not in SUFFIXES:
        return read_plain(path)
    # A folder or a device is refused as it is for a plain file.
    if not path.is_file():
        return read_plain(path)
    try:
        with open_stream(path, Limits()) as stream:
            return stream.read()
    except Unreadable as error:
        raise InputError(f"{path}: {error.reason}: {error}") from error


def lines_of(text: str) -> list[str]:
    """The lines of a text; they end at newlines, before which a carriage return is none of theirs, and nowhere else.

    ``str.splitlines`` also cuts at ten characters that texts hold: U+0085 and U+2028 among them.
    """
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def xz_bits_per_byte(corpus: Corpus | PreparedCorpus) -> float | None:
    """The bits per byte that ``xz -9`` needs for the validation text after the training text.

    8 * (size(train + validation) - size(train)) / bytes(validation), documents joined by a newline.
    None where the text has more characters or bytes than :data:`XZ_LIMIT`.
    """
    if corpus.characters > XZ_LIMIT:
        return None
    train = "\n".join([*corpus.train, ""]).encode()
    validation = "\n".join(corpus.validation).encode()
    if len(train) + len(validation) > XZ_LIMIT:
        return None
    extra = len(lzma.compress(train + validation, preset=9)) - len(lzma.compress(train, preset=9))
    return 8 * extra / len(validation)
