"""Where sentences begin, by punctuation: enough for next-sentence pairs, in any script that ends its sentences."""

from __future__ import annotations

import re

# Words that end in a full stop without ending a sentence, in lower case.
_SHORT = (
    "mr mrs ms dr prof st jr sr vs etc e.g i.e eg ie cf al fig figs eq eqs sec ch vol no nr pp ed eds inc ltd co corp "
    "dept approx est a.m p.m u.s u.k jan feb mar apr jun jul aug sep sept oct nov dec bzw z.b d.h usw ca"
)
_ABBREVIATIONS = frozenset(_SHORT.split())
# A blank line; an end mark, closing quotes or brackets, and white space; or a mark of the scripts that use no spaces.
_END = re.compile(
    r"\n[ \t]*\n\s*"
    r"|[.!?\u2026\u0589\u061f\u06d4\u0964\u0965\u1362\u1367\u1368\u166e]+[\"'\u00bb\u2019\u201d)\]]*\s+"
    r"|[\u0f0d\u0f0e\u104b\u17d4\u17d5\u3002\uff01\uff1f]+[\u300d\u300f\u201d]*\s*"
)
_WORD = re.compile(r"[^\s(\[\"']+$")


def sentence_starts(text: str) -> list[int]:
    """The positions in ``text``, in characters and ascending, at which a sentence or a paragraph begins.

    A full stop after a known abbreviation, an initial or inside a number ends none, nor does an end mark that a
    lower-case letter follows. White space alone has none.
    """
    stripped = text.lstrip()
    if not stripped:
        return []
    starts = [len(text) - len(stripped)]
    for match in _END.finditer(text, starts[0]):
        if match.end() == len(text):
            break
        if match[0][0] == "." and "\n" not in match[0][:1] and not _ends_sentence(text, match):
            continue
        if match[0][0] in ".!?\u2026" and text[match.end()].islower() and not re.search(r"\n\s*\n", match[0]):
            continue
        starts.append(match.end())
    return starts


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    if re.search(r"\n\s*\n", match[0]):
        return True
    word = _WORD.search(text, max(0, match.start() - 20), match.start())
    if word is None:
        return True
    # "A." and "J." are initials; "I." may well end a sentence.
    return not (word[0].lower() in _ABBREVIATIONS or (len(word[0]) == 1 and word[0].isupper() and word[0] != "I"))
