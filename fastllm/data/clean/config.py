"""What is done to each document, and the one function that does it."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from ...config import check_fields, option
from ..digest import file_sha256
from . import language
from .document import Document, Rejection
from .html import EXTRACTORS
from .pii import mask
from .quality import RULES
from .text import repair, tidy
from .unigram import like_reference, reference_files, reference_model
from .urls import blocked, not_blocked
from .wikitext import extract_wikitext

DEFAULT_RULES = ("gopher_repetition", "gopher_quality", "fineweb")


@dataclass(frozen=True)
class CleanConfig:
    """How documents are cleaned."""

    extractor: str = option(
        "fast", "what finds the main text of HTML: fast, a walk over the tags and a small learned model; trafilatura; "
        "baseline, which is trafilatura's too; or all, which keeps all visible text", choices=tuple(EXTRACTORS),
    )  # fmt: skip
    rules: tuple[str, ...] = option(
        DEFAULT_RULES, f"quality rules, applied in the order given: {', '.join(RULES)}; or none", metavar="RULE"
    )
    language: tuple[str, ...] = option(
        (), "keep only documents in these languages (ISO 639-1, such as en de)", metavar="CODE"
    )
    language_probability: float = option(0.65, "least probability of the language", minimum=0.0, maximum=1.0)
    block_urls: str | None = option(
        None, "leave out documents from the hosts that this file names, one host or host/path a line", metavar="FILE"
    )
    quality_reference: str | None = option(
        None,
        "keep only texts whose words are as common as in this file or folder of text or JSON lines (unigram model)",
        metavar="PATH",
    )
    quality_share: float = option(
        0.95, "share of the reference's own passages that --quality-reference would keep", above=0.0, below=1.0
    )
    mask_pii: bool = option(False, "mask mail and IP addresses, telephone, card and bank account numbers")
    repair: bool = option(True, "undo mojibake and normalise Unicode (ftfy, NFC)")

    def __post_init__(self):
        check_fields(self)
        for rule in self.rules:
            if rule not in (*RULES, "none") or (rule == "none" and len(self.rules) > 1):
                raise ValueError(f"rules: expected some of {', '.join(RULES)}, or none alone; got {rule!r}")
        # A new configuration reads its files anew.
        if self.block_urls is not None:
            blocked.cache_clear()
            blocked(self.block_urls)
        if self.quality_reference is not None:
            reference_model.cache_clear()
            reference_model(self.quality_reference, self.quality_share)
        if self.language:
            language.check_languages(self.language)

    def unused(self) -> dict[str, str]:
        """The settings that have no effect beside the others, and why."""
        found = {}
        if not self.language:
            found["language_probability"] = "no language is asked for"
        if self.quality_reference is None:
            found["quality_share"] = "there is no quality_reference"
        return found

    def contents(self) -> dict[str, str]:
        """The SHA-256 of what each setting's files hold: with other contents it is another run.

        For several files it is the SHA-256 of their own, one on each line.
        """
        named = {
            "block_urls": [] if self.block_urls is None else [self.block_urls],
            "quality_reference": [] if self.quality_reference is None else reference_files(self.quality_reference),
        }
        digests = {name: [file_sha256(path) for path in paths] for name, paths in named.items() if paths}
        return {
            f"{name}_sha256": found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()
            for name, found in digests.items()
        }


def clean(document: Document, config: CleanConfig) -> tuple[Document | Rejection, Counter[str]]:
    """``document`` as plain text, or why it is left out; and how much personal data was masked in it."""
    masked: Counter[str] = Counter()
    if config.block_urls is not None and isinstance(found := not_blocked(document, config.block_urls), Rejection):
        return found, masked
    text = document.text
    if document.kind == "html":
        text = EXTRACTORS[config.extractor](text)
    elif document.kind == "wikitext":
        text = extract_wikitext(text)
    if config.repair:
        text = repair(text, entities=document.kind == "text")
    result = Document(document.id, tidy(text), document.kind, document.metadata)
    if not result.text:
        return Rejection.of(document, "empty", characters=len(document.text)), masked
    if config.language:
        result = language.only(result, config.language, config.language_probability)
    for rule in config.rules:
        if isinstance(result, Rejection):
            return result, masked
        if rule != "none":
            result = RULES[rule](result)
    if isinstance(result, Document) and config.quality_reference is not None:
        result = like_reference(result, config.quality_reference, config.quality_share)
    if isinstance(result, Document) and config.mask_pii:
        text, masked = mask(result.text)
        result = Document(result.id, text, result.kind, result.metadata)
    return result, masked
