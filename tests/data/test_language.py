"""Documents in a language: which are kept, also where close languages share the probability."""

import pytest
from extras import needed
from pages import article

from fastllm.data.clean import CleanConfig, Document, Rejection, clean

TEXT = article(1)


def test_languages_are_told_apart():
    needed("py3langid", "data")
    german = (
        "Der Leuchtturm steht seit vielen Jahren an der Küste, und die Leute im Dorf kennen seine Geschichte gut. " * 9
    )
    config = CleanConfig(language=("de",), rules=("none",))
    kept, _ = clean(Document("x", german), config)
    assert kept.metadata == {"language": "de"}
    rejected, _ = clean(Document("x", TEXT), config)
    assert (rejected.rule, rejected.details["language"]) == ("language", "en")


RIVERS = {
    "hr": "Rijeka teče s planina i ulijeva se u more koje je daleko.",
    "sr": "Reka teče sa planina i uliva se u more koje je daleko.",
    "bs": "Rijeka teče sa planina i ulijeva se u more koje je daleko, a vode ima uvijek.",
}


@pytest.mark.parametrize("language", RIVERS)
def test_a_short_text_whose_probability_close_languages_share_is_kept(language):
    needed("py3langid", "data")
    config = CleanConfig(language=(language,), rules=("none",))
    kept, _ = clean(Document("x", RIVERS[language]), config)
    assert isinstance(kept, Document)
    assert kept.metadata == {"language": language}


def test_a_close_language_in_other_letters_is_not_kept():
    needed("py3langid", "data")
    cyrillic = "Река тече од планина и улива се у море које је далеко."  # noqa: RUF001
    rejected, _ = clean(Document("x", cyrillic), CleanConfig(language=("hr",), rules=("none",)))
    assert (rejected.rule, rejected.details["language"]) == ("language", "sr")


@pytest.mark.parametrize("languages", [("hr",), ("hr", "sl"), ("sl", "hr")])
def test_another_language_that_is_asked_for_too_rejects_nothing(languages):
    """Slovenian has 0.32 of it, Croatian 0.27, and 0.66 with Serbian and Bosnian."""
    needed("py3langid", "data")
    text = "Voda je hladna, more je daleko in reka teče počasi. Kuća je stara."
    kept, _ = clean(Document("x", text), CleanConfig(language=languages, rules=("none",)))
    assert (type(kept), kept.metadata) == (Document, {"language": "hr"})


def test_a_low_probability_does_not_keep_what_is_likelier_in_another_language():
    """German has 0.72 of it, and English 0.21."""
    needed("py3langid", "data")
    text = Document("x", "Der Fluss ist sehr long and winding")
    for language, probability, kind in (("en", 0.1, Rejection), ("de", 0.1, Document), ("de", 0.0, Document)):
        config = CleanConfig(language=(language,), language_probability=probability, rules=("none",))
        assert isinstance(clean(text, config)[0], kind)
