"""Bytes of a page as text, in the encodings that browsers take their labels for (WHATWG, Encoding Standard)."""

from __future__ import annotations

import codecs
import re

from .guessed_encoding import guess

# Python's codec for each of the standard's encodings, and the labels that name it. A label names the superset that
# pages use: gb2312 is GB 18030, shift_jis Windows-31J, iso-8859-1 Windows-1252. The standard gives up on hz-gb-2312 and
# iso-2022-kr, because scripts could hide in them; their text is read here. x-user-defined is no text.
_LABELS = {
    "utf-8": "unicode-1-1-utf-8 unicode11utf8 unicode20utf8 utf-8 utf8 x-unicode20utf8",
    "cp866": "866 cp866 csibm866 ibm866",
    "iso-8859-2": "csisolatin2 iso-8859-2 iso-ir-101 iso8859-2 iso88592 iso_8859-2 iso_8859-2:1987 l2 latin2",
    "iso-8859-3": "csisolatin3 iso-8859-3 iso-ir-109 iso8859-3 iso88593 iso_8859-3 iso_8859-3:1988 l3 latin3",
    "iso-8859-4": "csisolatin4 iso-8859-4 iso-ir-110 iso8859-4 iso88594 iso_8859-4 iso_8859-4:1988 l4 latin4",
    "iso-8859-5": "csisolatincyrillic cyrillic iso-8859-5 iso-ir-144 iso8859-5 iso88595 iso_8859-5 iso_8859-5:1988",
    "iso-8859-6": (
        "arabic asmo-708 csiso88596e csiso88596i csisolatinarabic ecma-114 iso-8859-6 iso-8859-6-e "
        "iso-8859-6-i iso-ir-127 iso8859-6 iso88596 iso_8859-6 iso_8859-6:1987"
    ),
    "iso-8859-7": (
        "csisolatingreek ecma-118 elot_928 greek greek8 iso-8859-7 iso-ir-126 iso8859-7 iso88597 iso_8859-7 "
        "iso_8859-7:1987 sun_eu_greek"
    ),
    "iso-8859-8": (
        "csiso88598e csisolatinhebrew hebrew iso-8859-8 iso-8859-8-e iso-ir-138 iso8859-8 iso88598 iso_8859-8 "
        "iso_8859-8:1988 visual"
    ),
    "iso8859-8": "csiso88598i iso-8859-8-i logical",
    "iso-8859-10": "csisolatin6 iso-8859-10 iso-ir-157 iso8859-10 iso885910 l6 latin6",
    "iso-8859-13": "iso-8859-13 iso8859-13 iso885913",
    "iso-8859-14": "iso-8859-14 iso8859-14 iso885914",
    "iso-8859-15": "csisolatin9 iso-8859-15 iso8859-15 iso885915 iso_8859-15 l9",
    "iso-8859-16": "iso-8859-16",
    "koi8-r": "cskoi8r koi koi8 koi8-r koi8_r",
    "koi8-u": "koi8-ru koi8-u",
    "mac-roman": "csmacintosh mac macintosh x-mac-roman",
    "cp874": "dos-874 iso-8859-11 iso8859-11 iso885911 tis-620 windows-874",
    "cp1250": "cp1250 windows-1250 x-cp1250",
    "cp1251": "cp1251 windows-1251 x-cp1251",
    "cp1252": (
        "ansi_x3.4-1968 ascii cp1252 cp819 csisolatin1 ibm819 iso-8859-1 iso-ir-100 iso8859-1 iso88591 "
        "iso_8859-1 iso_8859-1:1987 l1 latin1 us-ascii windows-1252 x-cp1252"
    ),
    "cp1253": "cp1253 windows-1253 x-cp1253",
    "cp1254": (
        "cp1254 csisolatin5 iso-8859-9 iso-ir-148 iso8859-9 iso88599 iso_8859-9 iso_8859-9:1989 l5 latin5 "
        "windows-1254 x-cp1254"
    ),
    "cp1255": "cp1255 windows-1255 x-cp1255",
    "cp1256": "cp1256 windows-1256 x-cp1256",
    "cp1257": "cp1257 windows-1257 x-cp1257",
    "cp1258": "cp1258 windows-1258 x-cp1258",
    "mac-cyrillic": "x-mac-cyrillic x-mac-ukrainian",
    "gb18030": "chinese csgb2312 csiso58gb231280 gb18030 gb2312 gb_2312 gb_2312-80 gbk iso-ir-58 x-gbk",
    "big5hkscs": "big5 big5-hkscs cn-big5 csbig5 x-x-big5",
    "euc-jp": "cseucpkdfmtjapanese euc-jp x-euc-jp",
    "iso2022-jp-ext": "csiso2022jp iso-2022-jp",
    "cp932": "csshiftjis ms932 ms_kanji shift-jis shift_jis sjis windows-31j x-sjis",
    "cp949": (
        "cseuckr csksc56011987 euc-kr iso-ir-149 korean ks_c_5601-1987 ks_c_5601-1989 ksc5601 ksc_5601 windows-949"
    ),
    "utf-16-be": "unicodefffe utf-16be",
    "utf-16-le": "csunicode iso-10646-ucs-2 ucs-2 unicode unicodefeff utf-16 utf-16le",
    "hz": "hz-gb-2312",
    "iso2022-kr": "csiso2022kr iso-2022-kr",
}
_CODECS = {label: codec for codec, labels in _LABELS.items() for label in labels.split()}
_SIGNS = re.compile(r"[^a-z0-9]")
_PLAIN = {_SIGNS.sub("", label): codec for label, codec in _CODECS.items()}
# An encoding that the page declares for itself counts only in its first bytes, as in browsers.
_META = re.compile(rb"<meta(?=[\s/])([^>]*)", re.IGNORECASE)
_CHARSET = re.compile(rb"""charset\s*=\s*["']?\s*([-\w.:]+)""", re.IGNORECASE)
# What a keyword or a description says of charsets declares nothing, nor does what a script or a comment holds.
_CONTENT = re.compile(rb"""content\s*=\s*(?:"[^"]*"?|'[^']*'?)""", re.IGNORECASE)
_NAMED = re.compile(rb"(?:^|[\s\"'/])(?:name|property|itemprop)\s*=", re.IGNORECASE)
_XML = re.compile(rb"""^\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([-\w.:]+)""", re.IGNORECASE)
_COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)|<(script|style|title|noscript)\b.*?(?:</\1|\Z)", re.DOTALL | re.IGNORECASE)
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# The first bracket of a page in UTF-16 without a mark.
_WIDE = ((b"<\0", "utf-16-le"), (b"\0<", "utf-16-be"))
# In so many first bytes of UTF-16 without a mark nearly every second one is 0, as in markup and Western text.
_BEGINNING, _NEARLY = 256, 0.7
_MULTIBYTE = re.compile(rb"[\xc2-\xf4][\x80-\xbf]+")
# Content with this many characters beyond ASCII that is UTF-8 throughout is UTF-8, whatever is declared. About one in
# seven of GBK's two-byte characters is UTF-8 too, so that eight in a row are by chance once in 6 million texts.
_PLAINLY_UTF_8 = 8
# What people call encodings by numbers that the standard has no label for.
_NUMBERED = re.compile(r"^(?:cp|ms|win|windows|ibm|codepage)(\d+)$")
_NUMBERS = {
    "874": "cp874", "932": "cp932", "936": "gb18030", "949": "cp949", "950": "big5hkscs", "65001": "utf-8",
    "1200": "utf-16-le", "1201": "utf-16-be", **{str(number): f"cp{number}" for number in (866, *range(1250, 1259))},
}  # fmt: skip
# These encode everything in ASCII bytes, so that their content is UTF-8 by form.
_SEVEN_BITS = {"iso2022-jp-ext", "hz", "iso2022-kr"}


def codec_of(label: str | None) -> str | None:
    """Python's codec for what a header or a page calls its encoding; None for what names none.

    Beyond the standard's labels those count that differ from one in signs alone, lack its "iso", or give a code page's
    number: latin-1, 8859-9, cp936.
    """
    if not label:
        return None
    label = label.strip("\t\n\f\r \"'").lower()
    plain = _SIGNS.sub("", label)
    numbered = _NUMBERED.match(plain)
    number = _NUMBERS.get(numbered[1]) if numbered else None
    return _CODECS.get(label) or _PLAIN.get(plain) or _PLAIN.get(f"iso{plain}") or number


def _euro(error: UnicodeError) -> tuple[str | bytes, int]:
    """The byte 0x80, which GB 18030 leaves out, is a Euro sign in Windows' GBK."""
    if isinstance(error, UnicodeDecodeError) and error.object[error.start] == 0x80:
        return "\u20ac", error.start + 1
    return codecs.replace_errors(error)


codecs.register_error("fastllm-gb18030", _euro)


def _own_declaration(content: bytes) -> str | None:
    """The encoding that a page names in its first bytes."""
    found = _XML.search(content[:1024])
    if found:
        return found[1].decode("ascii", "replace")
    for meta in _META.finditer(_COMMENT.sub(b" ", content[:4096])):
        attributes = _CONTENT.sub(b" ", meta[1])
        found = _CHARSET.search(attributes) or (not _NAMED.search(attributes) and _CHARSET.search(meta[1]))
        if found:
            return found[1].decode("ascii", "replace")
    return None


def _decode(content: bytes, codec: str) -> str:
    if codec == "gb18030":
        return content.decode(codec, "fastllm-gb18030")
    if codec == "euc-jp":
        # NEC's characters, such as circled numbers, are in the wider table alone.
        return min((content.decode(name, "replace") for name in ("euc-jp", "euc_jis_2004")), key=undecodable)
    return content.decode(codec, "replace")


def undecodable(text: str) -> int:
    """How many characters stand for bytes that could not be decoded."""
    return text.count("\ufffd")


def decode_page(content: bytes, declared: str | None = None) -> tuple[str, str]:
    """The text of ``content``, and the codec that it was read in.

    In this order: a byte order mark; what the transport declared; what the page declares; UTF-8, if the content is; a
    guess. As in browsers a page that can be searched for its declaration is not UTF-16. Unlike in browsers, content
    that is plainly UTF-8 is read as that whatever it declares, and letters that clearly speak against a declared
    encoding count more than it. Bytes that mean nothing become U+FFFD.

    Args:
        content: the bytes as they were served, transfer and content codings undone.
        declared: the ``charset`` of the Content-Type header.
    """
    for mark, codec in _MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(codec, "replace"), codec
    if wide := utf_16(content):
        return content.decode(wide, "replace"), wide
    try:
        text = content.decode()
        characters = 0 if content.isascii() else len(_MULTIBYTE.findall(content))
    except UnicodeDecodeError as error:
        text, characters = None, 0
        if len(content) - error.start < 4 and error.reason == "unexpected end of data":
            # The content was cut off inside a character.
            text, characters = content.decode(errors="replace"), len(_MULTIBYTE.findall(content))
    header = codec_of(declared)
    if text is not None and characters >= _PLAINLY_UTF_8 and header not in ("utf-16-le", "utf-16-be"):
        return text, "utf-8"
    own = codec_of(_own_declaration(content))
    if own in ("utf-16-le", "utf-16-be"):
        own = "utf-8"
    for codec in (header, own):
        if codec is None or (codec == "utf-8" and text is None and not _mostly_utf_8(content)):
            continue
        if text is not None and content.isascii() and codec not in _SEVEN_BITS and not codec.startswith("utf-16"):
            return text, "utf-8"
        # Servers declare one encoding for all pages, whoever wrote them.
        codec = codec if codec == "utf-8" else guess(content, codec)
        return _decode(content, codec), codec
    if text is not None and guess(content) not in _SEVEN_BITS:
        return text, "utf-8"
    codec = "utf-8" if text is None and _mostly_utf_8(content) else guess(content)
    return _decode(content, codec), codec


def utf_16(content: bytes) -> str | None:
    """The codec of content that is plainly UTF-16 without a byte order mark, else None."""
    for begin, codec in _WIDE:
        if content.startswith(begin):
            return codec
    even, odd = content[:_BEGINNING:2], content[1:_BEGINNING:2]
    for zeros, others, codec in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        if zeros.count(0) > _NEARLY * len(zeros) and others.count(0) < (1 - _NEARLY) * len(others):
            return codec
    return None


def _mostly_utf_8(content: bytes) -> bool:
    """Whether ``content`` is UTF-8 with a few broken bytes: legacy text fails at almost every byte beyond ASCII."""
    multibyte = len(_MULTIBYTE.findall(content))
    lone = len(re.findall(rb"[\x80-\xff]", _MULTIBYTE.sub(b"", content)))
    return multibyte > 10 * lone  # a guess
