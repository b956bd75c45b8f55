"""Which language a text is in, by py3langid's naive Bayes over byte n-grams (Lui and Baldwin 2012)."""

from __future__ import annotations

from functools import cache

from ..optional import require
from .document import Document, Rejection

# Characters that are enough to tell. A guess.
_SAMPLE = 20_000


@cache
def _identifier():
    module = require("py3langid.langid", "py3langid", "--language")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)


def check_languages(languages: tuple[str, ...]) -> None:
    """Refuse what is no language that can be told.

    Raises:
        ValueError: names those that can.
    """
    known = sorted(set(map(str, _identifier().nb_classes)))
    for name in languages:
        if name not in known:
            raise ValueError(f"language: expected some of {' '.join(known)}; got {name!r}")


def only(document: Document, languages: tuple[str, ...], least: float) -> Document | Rejection:
    """``document`` if it is in one of ``languages`` (ISO 639-1) with a probability of ``least``; notes which."""
    language, probability = _identifier().classify(document.text[:_SAMPLE])
    if language not in languages or probability < least:
        return Rejection.of(document, "language", language=str(language), probability=round(float(probability), 4))
    metadata = {**document.metadata, "language": str(language)}
    return Document(document.id, document.text, document.kind, metadata)
