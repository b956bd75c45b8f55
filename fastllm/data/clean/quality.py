"""Rules that tell prose from the rest, each a pure function: Document -> Document or Rejection.

Thresholds are those of the papers and of FineWeb's recipe: Gopher (Rae et al. 2021, appendix A), C4 (Raffel et al.
2020), FineWeb (Penedo et al. 2024). A rejection carries the number and the bound that it broke.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from ..sentences import sentence_starts
from .document import Document, Rejection
from .words import WORD, repeated_parts, repeated_share, top_share, words_of

# The most frequent function words; a text must have two of one language's, and not letters alone, as an index from A to
# Z has them. No list but the first has two words that are frequent in English too: a list of English words must not
# pass by another language's.
_STOP_WORDS = {
    "en": "the be to of and that have with",
    "de": "der die das und ist nicht mit ein von den",
    "fr": "le la les et des est une dans que pour",
    "es": "el la los que de y en una por con",
    "it": "il di che la e un per non sono del",
    "pt": "o que de e do da em um para com",
    "nl": "de het een van en is dat niet op te",
    "pl": "w się nie że jest na z jak są przez od po",
    "cs": "je v na se že jako které byl z při jsou ale",
    "sk": "je v na sa že ako ktoré bol z pri sú ale",
    "sl": "je v na se da ki za so z pa ni bi",
    "hr": "je u na se da su za od što kao koji nije",
    "ro": "și şi în de la cu nu este din pe care să",
    "hu": "az és hogy nem egy van meg ez csak mint el volt",
    "fi": "ja ei että oli joka mutta ovat myös hän kun sekä ole",
    "et": "ja ei et see oli kui ka mis oma ning aga siis",
    "sv": "och att det som en på är av för med till den",
    "da": "og det som en på er af til med den ikke der",
    "nb": "og å det som en på er av til med ikke",
    "is": "og að er sem til við um ekki það en",
    "tr": "ve bir bu için ile çok olarak daha olan gibi ne kadar",
    "lt": "ir yra kad su tai ne iš bet kaip jau buvo apie",
    "lv": "un ir ka ar par tas uz bet kā bija arī",
    "sq": "dhe në të që për një është nga",
    "eu": "eta da ez bat zen du ere dira zuen izan",
    "id": "yang dan di itu dengan untuk ini dari tidak pada dalam akan",
    "tl": "ang ng sa na mga ay hindi para ito",
    "sw": "na ya wa kwa ni katika za kuwa hii",
    "mt": "li u ta tal il fil għal kull ma dan għandu minn jew hija",
    "jv": "lan ing kang sing karo ora saka utawa kanggo marang iku kabeh",
    "su": "jeung anu nu di ka ku téh dina pikeun sareng atawa",
    "zu": "futhi ukuthi noma kanye umuntu wonke uma ngoba ukuba lokhu yilowo kodwa",
    "sn": "uye kana kuti zvakare nokuti asi iyi munhu wese pamusoro",
    "om": "fi kan akka irraa keessatti hin waan yookaan ni",
    "so": "oo iyo ku ka waa uu ama inuu qof waxa",
    "se": "ja lea dahje go ii leat mii dat gii",
    "vi": "và của là có được cho trong không người các một những",
}
_STOPS = {language: frozenset(words.split()) for language, words in _STOP_WORDS.items()}
_NON_LATIN = re.compile("[^\\W\\d_\u0000-\u024f\u1e00-\u1eff]")
_LETTER = re.compile(r"[^\W\d_]")
_BULLETS = ("-", "*", "\u2022", "\u2023", "\u25cf", "\u25e6", "\u25aa", "\u25a0")
# What ends a sentence: Unicode's property Sentence_Terminal for the scripts of living languages, Khmer's and Tibetan's
# marks, the colon, the semicolon and the ellipsis, and quotation marks. Without the scripts' own marks the rule would
# reject any text in Armenian, Amharic, Bengali, Burmese, Khmer, Nepali, Panjabi, Tibetan and Urdu.
_END_MARK = re.compile(
    "[.?!:;\u2026\"'\u201d\u2019\u00bb\u300d\u300f\u0589\u061b\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0964\u0965\u0f0d\u0f0e"
    "\u104a\u104b\u1361\u1362\u1367\u1368\u166e\u1735\u1736\u17d4\u17d5\u1803\u1809\u1944\u1945\u1aa8-\u1aab\u1b5a\u1b5b\u1b5e\u1b5f"
    "\u1c3b\u1c3c\u1c7e\u1c7f\u203c\u203d\u2047-\u2049\u2e2e\u3002\ua4ff\ua60e\ua60f\ua876\ua877\ua8ce\ua8cf\ua92f\ua9c8\ua9c9\uaa5d-\uaa5f"
    "\uaaf0\uaaf1\uabeb\ufe52\ufe56\ufe57\uff01\uff0e\uff1a\uff1b\uff1f\uff61\U00011141-\U00011143]"
)
_WIDE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
# Thai, Lao and Tai Tham end no sentence with a mark.
_UNMARKED = re.compile("[\u0e00-\u0eff\u1a20-\u1aaf]")
_POLICY = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
)  # fmt: skip
# C4 looks for sentences, braces and place-holder text in lines of at least so many words.
_LINE_WORDS = 3
_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")


def _common(present: set[str], stop: frozenset[str]) -> int:
    """How many of ``stop`` are ``present``; single letters alone count as one."""
    found = present & stop
    return len(found) if any(len(word) > 1 for word in found) else min(1, len(found))


def _over(document: Document, rule: str, **bounds: tuple[float, float, float]) -> Rejection | None:
    """The first of ``bounds`` (number, least, most) that is broken, as a rejection by ``rule``."""
    for name, (number, least, most) in bounds.items():
        if not least <= number <= most:
            # JSON has no infinity.
            limits = {"least": least, "most": most if math.isfinite(most) else None}
            return Rejection.of(document, rule, measure=name, value=round(number, 4), **limits)
    return None


def gopher_quality(document: Document) -> Document | Rejection:
    """Words in number and length, symbols, bullets, ellipses, letters, stop words. Books may be longer than pages."""
    text, rule = document.text, "gopher_quality"
    words = words_of(text)
    count = len(words.words)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    hashes, ellipses = text.count("#"), text.count("...") + text.count("\u2026")
    letters = len(_LETTER.findall(text[:100_000]))
    foreign = len(_NON_LATIN.findall(text[:100_000])) > 0.5 * letters
    infinity = math.inf
    rejection = _over(
        document, rule,
        words=(count, 50, infinity if document.kind == "text" else 100_000),
        # Either of them, not both together.
        symbols_per_word=(max(hashes, ellipses) / max(1, count), 0, 0.1),
        bullet_lines=(sum(line.startswith(_BULLETS) for line in lines) / max(1, len(lines)), 0, 0.9),
        ellipsis_lines=(sum(line.endswith(("...", "\u2026")) for line in lines) / max(1, len(lines)), 0, 0.3),
        words_with_a_letter=(sum(_LETTER.search(w) is not None for w in words.words) / max(1, count), 0.8, 1),
    )  # fmt: skip
    # Word lengths and stop words are those of languages in Latin letters.
    if rejection is None and not foreign:
        present = {word.strip(".,;:!?()\"'").lower() for word in words.words}
        stops = {language: _common(present, stop) for language, stop in _STOPS.items()}
        mean, most = float(words.lengths.mean()), max(stops.values())
        # Vietnamese puts a space between syllables.
        shortest = 2.5 if stops["vi"] == most else 3
        rejection = _over(document, rule, mean_word_length=(mean, shortest, 10), stop_words=(most, 2, infinity))
    return rejection or document


def gopher_repetition(document: Document) -> Document | Rejection:
    """Repeated lines, paragraphs and runs of words."""
    text, rule = document.text, "gopher_repetition"
    lines = [line for line in text.split("\n") if line.strip()]
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    line_share, line_characters = repeated_parts(lines)
    paragraph_share, paragraph_characters = repeated_parts(paragraphs)
    rejection = _over(
        document, rule,
        repeated_lines=(line_share, 0, 0.3),
        repeated_paragraphs=(paragraph_share, 0, 0.3),
        characters_in_repeated_lines=(line_characters, 0, 0.2),
        characters_in_repeated_paragraphs=(paragraph_characters, 0, 0.2),
    )  # fmt: skip
    if rejection is not None:
        return rejection
    words = words_of(text)
    # A character is less than a word: runs of so many words of single characters would reject 29 of 201 Chinese
    # articles.
    apart = words.to_a_word
    for n, most in ((2, 0.2), (3, 0.18), (4, 0.16)):
        rejection = _over(document, rule, **{f"top_{n}_words": (top_share(words, n * apart), 0, most)})
        if rejection is not None:
            return rejection
    for n, most in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)):
        rejection = _over(document, rule, **{f"repeated_{n}_words": (repeated_share(words, n * apart), 0, most)})
        if rejection is not None:
            return rejection
    return document


def _is_short(line: str) -> bool:
    """Whether it has at most 30 characters, of which a Chinese or Japanese one is as much as three Latin letters."""
    return len(line) <= 30 and len(line) + 2 * len(_WIDE.findall(line)) <= 30


def fineweb(document: Document) -> Document | Rejection:
    """Lines that end as sentences do, short lines, repeated lines, lines for the number of words."""
    # With their indentation, which tells lines of code apart.
    lines = [line.rstrip() for line in document.text.split("\n") if line.strip()]
    count = max(1, len(lines))
    ended = sum(_END_MARK.match(line[-1]) is not None or _UNMARKED.match(line[-1]) is not None for line in lines)
    words = max(1, len(words_of(document.text).words))
    rejection = _over(
        document, "fineweb",
        lines_with_end_mark=(ended / count, 0.12, 1),
        short_lines=(sum(_is_short(line) for line in lines) / count, 0, 0.67),
        characters_in_repeated_lines=(repeated_parts(lines)[1], 0, 0.1),
        lines_per_word=(len(lines) / words, 0, 0.3),
    )  # fmt: skip
    return rejection or document


def c4(document: Document) -> Document | Rejection:
    """Lines about cookies and scripts go, with citation marks; place-holder text, braces and too few sentences reject.

    Not made for pages with source code: a brace in a line of three words is enough to lose one. Each line of three
    words or more has at least one sentence. Shorter lines have none, and stay.
    """
    kept, sentences = [], 0
    for line in document.text.split("\n"):
        low = line.lower()
        if any(len(word) > 1000 for word in line.split()):
            continue
        counts = len(WORD.findall(line)) >= _LINE_WORDS
        # In C4's order: a line about scripts goes before its braces are seen.
        found = next((p for p in ("lorem ipsum", "javascript", "{", *_POLICY) if p in low), None)
        if counts and found in ("lorem ipsum", "{"):
            return Rejection.of(document, "c4", measure="contains", value=found)
        if found is not None:
            continue
        kept.append(_CITATION.sub("", line))
        sentences += len(sentence_starts(kept[-1])) if counts else 0
    text = re.sub("\n{3,}", "\n\n", "\n".join(kept)).strip()
    changed = Document(document.id, text, document.kind, document.metadata)
    return _over(changed, "c4", sentences=(sentences, 5, math.inf)) or changed


RULES: dict[str, Callable[[Document], Document | Rejection]] = {
    "gopher_repetition": gopher_repetition,
    "gopher_quality": gopher_quality,
    "fineweb": fineweb,
    "c4": c4,
}
