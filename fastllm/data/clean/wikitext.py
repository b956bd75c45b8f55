"""Text of a MediaWiki page's source: templates, tables, references and media go, the words of links stay."""

from __future__ import annotations

import re

from ..optional import require

_REMOVED = re.compile(
    r"<!--.*?-->|<(ref|gallery|math|timeline|score|syntaxhighlight|imagemap)\b[^>]*?(?<!/)>.*?</\1\s*>|<ref[^>]*/>",
    re.DOTALL | re.IGNORECASE,
)
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
# A line's end; and -{...}-, which chooses between Chinese scripts: the first of them stays. Flags come before "|".
_BREAK = re.compile(r"<br\s*/?\s*>\n?", re.IGNORECASE)
_VARIANTS = re.compile(r"-\{(?:([^{}|]{0,80})\|)?([^{}]{0,2000})\}-")
_VARIANT = re.compile(r"\s*zh(?:-[a-z]{2,4})?\s*:\s*([^;]*)")
_SWITCH = re.compile(r"__[A-Z]+__")
_HEADING = re.compile(r"^\s*=+\s*(.*?)\s*=+\s*$", re.MULTILINE)
_LIST = re.compile(r"^[*#:;]*[*#][*#:;]*\s*", re.MULTILINE)
_INDENT = re.compile(r"^[ \t]+", re.MULTILINE)
# Links that show no words: files and categories, by the names that every wiki knows (a dump's reader turns its own
# language's names into these), and the same page in another language. A colon in front makes any of them a plain link.
_MEDIA = re.compile(
    r"\[\[[\s_]*(?:file|image|media|category)[\s_]*:[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", re.IGNORECASE
)
_COLON = re.compile(r"\[\[\s*:")
_OTHER_LANGUAGE = re.compile(r"^\[\[[a-z]{2,3}(?:-[a-z]{2,8})*:[^\[\]|]*\]\][ \t]*$", re.MULTILINE)


def _one_variant(found: re.Match[str]) -> str:
    flags = {flag.strip() for flag in (found[1] or "").split(";")}
    # These give a title or a rule for the rest of the page.
    if flags & {"T", "H", "-"}:
        return ""
    first = _VARIANT.match(found[2])
    return first[1].strip() if first else found[2].partition("=>")[0]


def extract_wikitext(source: str) -> str:
    """The text of ``source``; headings are lines of their own.

    Raises:
        InputError: mwparserfromhell is not installed.
    """
    library = require("mwparserfromhell", "mwparserfromhell", "reading MediaWiki dumps")
    source = _REMOVED.sub("", source)
    # From the innermost table outwards; a page with more than this many nested ones keeps the rest.
    for _ in range(8):
        source, count = _TABLE.subn("", source)
        if not count:
            break
    source = _COLON.sub("[[", _OTHER_LANGUAGE.sub("", _MEDIA.sub("", source)))
    source = _VARIANTS.sub(_one_variant, _BREAK.sub("\n", source))
    source = _LIST.sub("- ", source)
    text = library.parse(source, skip_style_tags=False).strip_code(normalize=True, collapse=True)
    text = _HEADING.sub(r"\1", _SWITCH.sub("", text))
    return _INDENT.sub("", text)
