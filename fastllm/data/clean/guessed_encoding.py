"""The encoding of text that nothing names: which one makes the likeliest letters of some language out of its bytes.

A model of a language is the order of its letters by frequency. A rank's probability falls as 1 / (rank + 2). All other
numbers here are guesses, which tests check with sentences in 13 languages.
"""

from __future__ import annotations

import codecs
import math
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import NamedTuple

# Natural logarithms of probabilities: of any ASCII character, of signs that all languages use, of what a language does
# not use, and of what is no text.
_ASCII, _SIGN, _FOREIGN, _NO_TEXT = -3.5, -3.5, -9.0, -12.0
# Added for a capital that follows none, for one inside a word, for a letter of another script beside a Latin one, for a
# sign inside a word or a letter after a digit, and for two letters with accents in a row.
_CAPITAL, _INSIDE, _MIXED, _SIGN_INSIDE, _ACCENTS = -2.0, -4.0, -4.0, -4.0, -2.0
# Letters share this much with signs.
_LETTERS = 0.8
# By how much the guess must be likelier than Windows-1252, and than an encoding that something names.
_BETTER, _CLEARLY_BETTER = 5.0, 40.0
# A guess must find so many different letters that the other encoding does not: of a Latin alphabet, of others.
_FEW, _MORE = 2, 5
# As many bytes as decide.
_SAMPLE = 3000
_SIGNS = (
    "\u2018\u2019\u201c\u201d\u201e\u2013\u2014\u2026\u00ab\u00bb\u00a0\u00a9\u00ae\u2122\u20ac\u00b7\u2022\u00a7\u2116ºª\u00ad\u00d7"
    "\u00a1\u00bf\u00a2\u00a3\u00a5\u00a6\u00ac\u00b0\u00b1\u00b5\u00b6\u00bc\u00bd\u00be\u2020¹²³"
)
# Signs that stand between words, numbers and units, not between letters.
_SIGN_IN_WORD = re.compile(
    r"(?<=[^\W\d_])[\u00a1\u00bf\u00a2\u00a3\u00a5\u00a6\u00ac\u00b0\u00b1\u00b5\u00b6\u00bc\u00bd\u00be\u2020¹²³](?=[^\W\d_])"
)
_SEGMENT = re.compile(rb"[\x00-\x7f]?[\x80-\xff]+(?:[\x00-\x7f]{1,2}[\x80-\xff]+)*[\x00-\x7f]?")

# Letters beyond ASCII, the most frequent first: German, French, Spanish, Portuguese, Italian, Swedish and Finnish,
# Danish and Norwegian, Dutch, Icelandic, Catalan, and text that names things in all of them.
_WEST = (
    "üäöß", "éèàêçâôîûùœëï", "óáíñéúü", "ãçáéóíõêâúàô", "èàùòìé", "äåöé", "øåæé", "ëéïèö", "áðíóþæöúéý", "àéóèíçúòïü",
    "éöèüáóäíçàñêåøôúâãëîßæùòûïìõœý",
)  # fmt: skip
# Polish, Czech, Slovak, Hungarian, Romanian, and Croatian and Slovenian.
_CENTRAL = (
    "ęóąłśżćńź", "íáéěřýžčšůúňťďó", "áíéýčžšľťúňôóďäŕĺ", "áéöóőüíúű", "ăîţşâ", "čšžćđ",
)  # fmt: skip
_TURKISH = ("ıüşçğöİâîû",)
# Lithuanian, Latvian and Estonian.
_BALTIC = ("ėšųūįąžčę", "āīēšūņģļķžč", "äõüöšž")
# Russian, Ukrainian, Bulgarian and Serbian.
_CYRILLIC = (
    "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё", "оанивіртеслкмдпуязьбгчйхжшюцїєщфґ",
    "аоиетнрсвлкдпмузягъбчйщжхцшфюь", "аоиеснртјвкмдлупзгбчћшжцхђфљњџ",
)  # fmt: skip
_GREEK = ("αοιετσνηυρπκμλωςγίόάδέήφχβξθύζψώϊϋΐΰ",)
# Points and vowel signs last: few texts have them, and then after every letter.
_HEBREW = ("ויהלאתרמבנשכםדחפקעטגצןסזךףץ\u05b0\u05b7\u05b8\u05b4\u05bc\u05b5\u05b6\u05c1\u05b9\u05c2\u05bb\u05b2",)
# Arabic and Persian.
_ARABIC = (
    "الينمرتوبعدهسفكقحجةشصطخأىذضزءإغثئظآؤ\u060c\u061f\u064e\u0650\u0652\u064f\u0651\u064b\u064d\u064c",
    "ایرندهومتبسشکزلفگخعقجپحچطصآضغظذثژيك\u060c\u061f",
)  # fmt: skip
_THAI = ("านรกอเง่ม้ยัวลีดทตสิปะคืแหไจพขใบชุถูโ็์ซผำศษภณธญฟฮๆฉฐฤ",)
_SINGLE = {
    "cp1252": _WEST, "cp1250": _CENTRAL, "iso-8859-2": _CENTRAL, "cp1254": _TURKISH, "cp1257": _BALTIC,
    "cp1251": _CYRILLIC, "koi8-u": _CYRILLIC, "cp866": _CYRILLIC, "iso-8859-5": _CYRILLIC, "cp1253": _GREEK,
    "iso-8859-7": _GREEK, "cp1255": _HEBREW, "cp1256": _ARABIC, "iso-8859-6": _ARABIC, "cp874": _THAI,
}  # fmt: skip
# Codecs that give letters the same bytes as one of those.
_ALIKE = {"koi8-r": "koi8-u", "iso-8859-8": "cp1255", "iso8859-8": "cp1255", "iso-8859-15": "cp1252"}
_LATIN = {"cp1252", "cp1250", "iso-8859-2", "cp1254", "cp1257"}
# The most frequent characters of Chinese, Japanese and Korean.
_SIMPLIFIED = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种"
    "事成方多经么去法学如"
)
_TRADITIONAL = (
    "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡用道行所然家種"
    "事成方多經麼去法學如"
)
_HIRAGANA = (
    "のにはをたがでてとしれさいるなあかもりっらこうまくきすつよそけめだどんわせえみじやおちばょびげべゃひむへほゅふ"
)
_HANGUL = "이다는의에을가고하지은로를한사기도어니리자대서시나인아것그해있수정일부상장"
# Katakana of half the width, which are one byte in Shift_JIS, and any of them beside a Latin letter.
_HALF_WIDTH, _HALF = re.compile("[\uff61-\uff9f]"), -4.5
_HALF_MIXED = re.compile("(?<=[A-Za-z])[\uff61-\uff9f]|[\uff61-\uff9f](?=[A-Za-z])")
_WIDE_SIGNS = (
    "、。「」・《》ー【】\uff0c\uff1a\uff1b\uff01\uff1f\uff08\uff09\uff0e\u3000\u2026\u2014\u201c\u201d\u2018\u2019"
)


def _ranked(letters: str, mass: float) -> dict[str, float]:
    shares = {letter: 1 / (rank + 2) for rank, letter in enumerate(letters)}
    total = sum(shares.values())
    return {letter: math.log(mass * share / total) for letter, share in shares.items()}


@cache
def _letters(codec: str) -> list[dict[str, float]]:
    """Of each language that ``codec`` writes the logarithm of each letter's probability, capitals and signs too."""
    models = []
    for letters in _SINGLE[codec]:
        small = _ranked(letters, _LETTERS)
        capitals = {
            letter.upper(): value + _CAPITAL
            for letter, value in small.items()
            if letter.upper() not in small and len(letter.upper()) == 1
        }
        models.append({**dict.fromkeys(_SIGNS, _SIGN), **capitals, **small})
    return models


def _of_single(content: bytes, codec: str) -> float:
    """The log likelihood of ``content``, in the language that fits best."""
    text = content.decode(codec, "replace")
    counts = Counter(text)
    wrong = _SIGN_INSIDE * len(_SIGN_IN_WORD.findall(text))
    for before, after in pairwise(text):
        if before.isascii() and after.isascii():
            continue
        if before.isupper() and after.isupper():
            wrong -= _CAPITAL
        elif before.islower() and after.isupper():
            wrong += _INSIDE
        elif before.isdecimal() and after.isalpha() and after not in _SIGNS:
            wrong += _SIGN_INSIDE
        elif codec in _LATIN and before.isalpha() and after.isalpha() and not before.isascii() and not after.isascii():
            wrong += _ACCENTS
        elif codec not in _LATIN and before.isalpha() and after.isalpha() and before.isascii() != after.isascii():
            wrong += _MIXED
    return wrong + max(
        sum(
            number * (_ASCII if character < "\x80" else model.get(character, _unlisted(character)))
            for character, number in counts.items()
        )
        for model in _letters(codec)
    )


def _unlisted(character: str) -> float:
    return _FOREIGN if character.isprintable() and character != "\ufffd" else _NO_TEXT


class _TwoBytes(NamedTuple):
    """What is frequent in an encoding of two bytes for a character, and its share of the text.

    ``common`` other characters have their first byte from ``first`` to ``last``.
    """

    frequent: str
    share: float
    first: int
    last: int
    common: int


_MULTI = {
    "gb18030": _TwoBytes(_SIMPLIFIED, 0.4, 0xB0, 0xD7, 3755),
    "big5hkscs": _TwoBytes(_TRADITIONAL, 0.4, 0xA4, 0xC6, 5401),
    "euc-jp": _TwoBytes(_HIRAGANA, 0.5, 0xA5, 0xCF, 3051),
    "cp932": _TwoBytes(_HIRAGANA, 0.5, 0x83, 0x98, 3051),
    "cp949": _TwoBytes(_HANGUL, 0.4, 0xB0, 0xC8, 2350),
}
# The share of the common characters.
_COMMON = 0.4


@cache
def _frequent(codec: str) -> dict[str, float]:
    encoding = _MULTI[codec]
    return {**dict.fromkeys(_WIDE_SIGNS, _SIGN), **_ranked(encoding.frequent, encoding.share)}


def _of_multi(content: bytes, codec: str) -> float:
    """The log likelihood of ``content`` in an encoding of two bytes for a character."""
    encoding = _MULTI[codec]
    frequent, common = _frequent(codec), math.log(_COMMON / encoding.common)
    text = content.decode(codec, "replace")
    total = _MIXED * len(_HALF_MIXED.findall(text))
    for character, number in Counter(text).items():
        if character < "\x80":
            value = _ASCII
        elif character in frequent:
            value = frequent[character]
        elif character == "\ufffd":
            value = _NO_TEXT
        elif codec in ("cp932", "euc-jp") and _HALF_WIDTH.match(character):
            value = _HALF
        else:
            code = character.encode(codec, "replace")
            row = len(code) == 2 and encoding.first <= code[0] <= encoding.last
            plain = row and (code[1] >= 0xA1 or codec in ("big5hkscs", "cp932"))
            value = common if plain else _NO_TEXT
        total += number * value
    return total


# What no text has, in any encoding: bytes that are no character, and C1 controls, which Windows' encodings have not.
_BROKEN = re.compile("[\ufffd\x80-\x9f]")


def _may_be_wrong(content: bytes, stated: str) -> bool:
    """Whether ``stated`` is what servers name for any page, or makes something of ``content`` that is no text."""
    if _ALIKE.get(stated, stated) == "cp1252":
        return True
    return _BROKEN.search(codecs.getincrementaldecoder(stated)("replace").decode(content[: 50 * _SAMPLE])) is not None


def guess(content: bytes, stated: str | None = None) -> str:
    """Python's codec for what ``content``, which is not UTF-8, seems to be written in.

    Args:
        content: a page or a text.
        stated: the codec that something names for it. The result is another only if this one is Windows-1252, which
            servers name for any page, or makes no text of ``content``, and if much speaks for the other. Codecs that
            are not told apart here stay. Without it ``cp1252`` stands if nothing is better.
    """
    basis = _ALIKE.get(stated, stated) if stated else "cp1252"
    if content.isascii():
        # All that ISO-2022-JP writes lies between these.
        japanese = not stated and b"\x1b$B" in content and (b"\x1b(B" in content or b"\x1b(J" in content)
        return "iso2022-jp-ext" if japanese else stated or "cp1252"
    if basis not in _SINGLE and basis not in _MULTI:
        return stated or basis
    if stated and not _may_be_wrong(content, stated):
        return stated
    sample = b"\n".join(_SEGMENT.findall(content, 0, 50 * _SAMPLE))[:_SAMPLE]
    found = {codec: _of_single(sample, codec) for codec in _SINGLE} | {c: _of_multi(sample, c) for c in _MULTI}
    best = max(found, key=found.__getitem__)
    letters = set(filter(str.isalpha, sample.decode(best, "ignore"))) - set(sample.decode(basis, "ignore"))
    likelier = found[best] > found[basis] + (_CLEARLY_BETTER if stated else _BETTER)
    return best if likelier and len(letters) >= (_FEW if best in _LATIN else _MORE) else stated or basis
