"""Transfer and content codings of HTTP (RFC 9110, 9112) undone, within bounds."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from ...config import InputError
from ..optional import require
from .limits import Limits, Unreadable, one_line

# Names that servers send of content that nothing was done to; some send a charset's (see ``codings``).
_NONE = frozenset(["", "identity", "none", "binary", "7bit", "8bit"])
# Bytes of input that are decompressed at once. They bound what a bomb gives before its size is looked at: 1,032 times
# as much in deflate, and 128 KB from each block of 4 bytes in Zstandard. Brotli's output is bounded itself.
_PIECE = 4096
_PIECE_ZSTD = 64
_PART_BROTLI = 1 << 20
# What files of other kinds begin with, and bytes that text does not have. A tenth of what is compressed is such bytes.
_MEDIA = re.compile(
    rb"%PDF-\d|\x89PNG|\xff\xd8\xff|GIF8[79]a(?![ -~\s]{4})|PK\x03\x04|wOF[F2][\0OTt]|RIFF.{4}(?:WEBP|WAVE|AVI )",
    re.DOTALL,
)
_CONTROLS = bytes(code for code in range(32) if code not in b"\t\n\v\f\r\x1b\x0e\x0f")
_MOST_CONTROLS = 0.04
_CHUNK = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]{0,4096})?\r?\n")


def _charset(name: str | None) -> str | None:
    """The codec of a charset that is called ``name``, or None."""
    # The package that cleans is larger than what readers of token files need.
    from ..clean.encodings import codec_of

    return codec_of(name)


def _is_wide(content: bytes, charset: str | None) -> bool:
    """Whether ``content`` is UTF-16: a byte order mark, ``charset`` or its zeros say so."""
    from ..clean.encodings import utf_16

    marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    return marked or _charset(charset) in ("utf-16-le", "utf-16-be") or utf_16(content) is not None


def codings(values: list[str]) -> list[str]:
    """The codings that header values list, in the order in which they were applied."""
    names = [name.strip(" \t\"'").lower() for value in values for name in value.split(",")]
    return [name for name in names if name not in _NONE and _charset(name) is None]


def undo(content: bytes, applied: list[str], limits: Limits) -> bytes:
    """``content`` without the codings ``applied``, the last of them first.

    Archives often hold content that was decoded while its headers stayed: what does not begin as its coding does is
    taken as it is, if nothing says that it is binary.

    Raises:
        Unreadable: ``coding`` for an unknown one or content that is not in it, ``truncated``, ``bomb``, ``too_large``.
    """
    for name in reversed(applied):
        if name not in _DECODERS:
            raise Unreadable("coding", f"unknown coding {name!r}")
        if not content:
            continue
        decoded = _DECODERS[name](content, limits)
        content = content if decoded is None else decoded
    return content


def text_of(content: bytes, charset: str | None, limits: Limits) -> bytes:
    """``content``, which should be text in ``charset``, without a compression that no header told of.

    Raises:
        Unreadable: ``coding`` for what is binary, and what :func:`undo` raises.
    """
    for name, magic in (("gzip", b"\x1f\x8b\x08"), ("zstd", b"\x28\xb5\x2f\xfd")):
        if content.startswith(magic):
            content = undo(content, [name], limits)
    begin = content[:1024]
    controls = len(begin) - len(begin.translate(None, _CONTROLS))
    binary = controls > _MOST_CONTROLS * len(begin) and not _is_wide(content, charset)
    if binary or _MEDIA.match(content):
        raise Unreadable("coding", "content is binary")
    return content


class _Coding(NamedTuple):
    """A compression. ``start()`` makes what decompresses one member, with the methods and attributes of zlib's.

    ``errors`` is what it raises on damaged content. ``pending`` says of such an object whether output is left of its
    input so far, which has to be taken first.
    """

    name: str
    start: Callable[[], Any]
    errors: type[Exception]
    piece_size: int = _PIECE
    pending: Callable[[Any], bool] = lambda stream: False


def _bounded(content: bytes, coding: _Coding, limits: Limits) -> bytes:
    """``content`` decompressed, all members that follow one another."""
    name = coding.name
    parts: list[bytes] = []
    size, rest, stream = 0, memoryview(content), coding.start()
    while True:
        taken = 0 if coding.pending(stream) else coding.piece_size
        piece, rest = bytes(rest[:taken]), rest[taken:]
        try:
            part = stream.decompress(piece)
        except coding.errors as error:
            if parts and size:
                raise Unreadable("damaged", f"{name}: {one_line(error)}") from error
            raise Unreadable("coding", f"content is not {name}: {one_line(error)}") from error
        parts.append(part)
        size += len(part)
        if size > limits.document:
            ratio = size / max(1, len(content) - len(rest))
            raise Unreadable(
                "bomb" if ratio > limits.ratio else "too_large", f"{name} content of more than {size:,} bytes"
            )
        if stream.eof:
            unused = stream.unused_data + bytes(rest)
            if not unused.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
                return b"".join(parts)
            rest, stream = memoryview(unused), coding.start()
        elif not len(rest) and not coding.pending(stream):
            break
    raise Unreadable("truncated", f"{name} content ends too early, after {size:,} bytes")


def _gzip(content: bytes, limits: Limits) -> bytes | None:
    if not content.startswith(b"\x1f\x8b"):
        return _as_it_is(content, "gzip")
    return _bounded(content, _Coding("gzip", lambda: zlib.decompressobj(31), zlib.error), limits)


def _deflate(content: bytes, limits: Limits) -> bytes | None:
    if content[:1] and content[0] & 15 == 8 and int.from_bytes(content[:2], "big") % 31 == 0:
        return _bounded(content, _Coding("deflate", zlib.decompressobj, zlib.error), limits)
    # Some servers leave out zlib's frame; markup is no such stream, but its beginning may look like one.
    if content.lstrip()[:1] == b"<":
        return None
    return _bounded(content, _Coding("deflate", lambda: zlib.decompressobj(-15), zlib.error), limits)


def _zstandard(content: bytes, limits: Limits) -> bytes | None:
    if not content.startswith((b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16)))):
        return _as_it_is(content, "zstd")
    library = require("zstandard", "zstandard", "the content coding zstd")
    # RFC 9659: no more than a window of 8 MB.
    start = library.ZstdDecompressor(max_window_size=1 << 23).decompressobj
    return _bounded(content, _Coding("zstd", start, library.ZstdError, _PIECE_ZSTD), limits)


class _Brotli:
    """brotli's decompressor with the names that the others have."""

    def __init__(self, library):
        self._stream = library.Decompressor()
        self.unused_data = b""

    @property
    def eof(self) -> bool:
        return self._stream.is_finished()

    def pending(self) -> bool:
        return not (self.eof or self._stream.can_accept_more_data())

    def decompress(self, content: bytes) -> bytes:
        return self._stream.process(content, output_buffer_limit=_PART_BROTLI)


def _brotli(content: bytes, limits: Limits) -> bytes | None:
    # The format has no mark of its own, but no stream of it begins like markup in ASCII does.
    if content.lstrip()[:1] == b"<":
        return None
    try:
        library = require("brotli", "brotli", "the content coding br")
    except InputError as error:
        raise Unreadable("coding", str(error)) from error
    return _bounded(content, _Coding("br", lambda: _Brotli(library), library.error, pending=_Brotli.pending), limits)


def _chunked(content: bytes, limits: Limits) -> bytes | None:
    found = _CHUNK.match(content)
    if not found:
        return _as_it_is(content, "chunked")
    parts: list[bytes] = []
    while found:
        size, begin = int(found[1], 16), found.end()
        if not size:
            return b"".join(parts)
        parts.append(content[begin : begin + size])
        end = begin + size
        if end > len(content):
            break
        line = content[end : end + 2]
        end += 2 if line == b"\r\n" else 1 if line[:1] == b"\n" else 0
        found = _CHUNK.match(content, end)
        if not found and b"\n" in content[end : end + 4096]:
            if len(parts) == 1:
                # A first line that looks like a chunk's by accident.
                return _as_it_is(content, "chunked")
            raise Unreadable("damaged", f"no chunk begins at byte {end:,}")
    raise Unreadable("truncated", "chunked content ends too early")


def _as_it_is(content: bytes, name: str) -> None:
    """Content that does not begin as ``name`` does is taken for text, unless it cannot be."""
    if b"\0" in content[:1024] and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Unreadable("coding", f"content is not {name}, and is binary")


_DECODERS: dict[str, Callable[[bytes, Limits], bytes | None]] = {
    "gzip": _gzip, "x-gzip": _gzip, "deflate": _deflate, "zstd": _zstandard, "br": _brotli, "chunked": _chunked,
}  # fmt: skip
