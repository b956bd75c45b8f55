"""Which words of a page are looked at, in its texts and in the names of its elements, and what they weigh."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .elements import Markup
from .page_types import PageTypes
from .page_words import FIRST_WORDS, WORD

_ATTRIBUTE = re.compile(
    r"""(?:^|[\s"'])(class|id|role|itemprop|itemtype|aria-label|data-testid|data-component)\s*=\s*"""
    r"""(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""",
    re.IGNORECASE,
)
_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def name_tokens(tag: str, attributes: str) -> tuple[str, ...]:
    """What an element's names say: the words in its class, id, role and schema.org attributes, and its tag."""
    found = [f"<{tag}"]
    if len(attributes) > 4:
        for match in _ATTRIBUTE.finditer(attributes[:2000]):
            value = (match[2] or match[3] or match[4] or "")[:300]
            kind = match[1].lower()
            if kind in ("role", "itemprop", "itemtype"):
                found.append(f"{kind}={value.strip().rpartition('/')[2].lower()}")
                continue
            found += [part.lower() for part in _PART.findall(value)]
            if kind in ("class", "id"):
                found += [f".{name.lower()}" for name in value.split() if "-" in name or "_" in name]
    return tuple(dict.fromkeys(found))


def text_tokens(text: str) -> list[str]:
    """The words of a block that may tell what it is: its first ones."""
    return WORD.findall(text.lower())[:FIRST_WORDS]


@dataclass(frozen=True)
class Lexicon:
    """What single words weigh, as log-odds of being main text.

    Attributes:
        names: in the names of the elements around a block.
        words: among a block's first words.
        headings: in the last heading before a block.
        types: of pages.
    """

    names: Mapping[str, float]
    words: Mapping[str, float]
    headings: Mapping[str, float]
    types: PageTypes


def element_names(markup: Markup) -> tuple[list[tuple[str, ...]], list[int]]:
    """What the names of elements say, each once, and which of them are each element's own."""
    numbers: dict[tuple[str, str], int] = {}
    own = [numbers.setdefault(key, len(numbers)) for key in zip(markup.tags, markup.attributes, strict=True)]
    return [name_tokens(*key) for key in numbers], own
