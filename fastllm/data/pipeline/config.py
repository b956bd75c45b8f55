"""Settings of a preparation run."""

from __future__ import annotations

from dataclasses import dataclass

from ...config import check_fields, option
from ..sources import NAMES, Limits
from ..sources.limits import MIB


@dataclass(frozen=True)
class PipelineConfig:
    """How sources are read and what is written; nothing here but ``workers`` may change a byte of the output's rule."""

    format: str | None = option(None, "what the files are, whatever their names say", choices=NAMES)
    text_field: str = option(
        "text",
        "the field of a JSON line or the column of a Parquet file that holds the text; one called html holds a page",
        metavar="NAME",
    )
    near_duplicates: bool = option(True, "remove near duplicates (MinHash)")
    similarity: float = option(
        0.75, "least share of common runs of five words in near duplicates", minimum=0.5, maximum=1.0
    )
    sentence_dedup: bool = option(False, "remove three sentences in a row that occurred before, in any document")
    exact_substrings: int | None = option(
        None, "remove passages of at least N characters that occurred before, in any document",
        minimum=50, maximum=1 << 16,
    )  # fmt: skip
    min_doc_words: int = option(
        50, "refuse documents that have fewer words once passages are removed", minimum=1, maximum=1 << 20
    )
    max_document_mb: int = option(64, "refuse larger documents", minimum=1, maximum=1 << 12)
    document_seconds: float = option(60.0, "refuse a document that takes longer to clean", above=0.0)
    shard_mb: int = option(128, "MB of text in one output file, before compression", minimum=1, maximum=1 << 14)

    def __post_init__(self):
        check_fields(self)

    def unused(self) -> dict[str, str]:
        """The settings that have no effect beside the others, and why."""
        found = {}
        if not self.near_duplicates:
            found["similarity"] = "near duplicates are kept"
        if not (self.sentence_dedup or self.exact_substrings):
            found["min_doc_words"] = "no passages are removed (sentence_dedup, exact_substrings)"
        if self.format not in (None, "jsonl", "parquet", "tar", "zip"):
            found["text_field"] = f"the files are {self.format}, not JSON lines or Parquet"
        return found

    @property
    def limits(self) -> Limits:
        return Limits(document=self.max_document_mb * MIB)
