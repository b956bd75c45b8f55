"""What flows through cleaning: a document, or the rejection that it became."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Characters of a rejected text that are kept: the source still has the whole. A guess.
EXCERPT = 2000


@dataclass(frozen=True)
class Document:
    """A text and where it comes from.

    ``id`` names the source's file and, inside archives, the record; ``metadata`` holds what the source knows (``url``,
    ``title``, ...), as strings. ``kind`` is what the text still is: ``html``, ``wikitext`` or ``text``.
    """

    id: str
    text: str
    kind: str = "text"
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejection:
    """Why a document is left out: the rule's name, and its numbers or a reason in words."""

    id: str
    rule: str
    details: dict[str, Any]
    excerpt: str = ""

    @classmethod
    def of(cls, document: Document, rule: str, **details: Any) -> Rejection:
        return cls(document.id, rule, details, document.text[:EXCERPT])
