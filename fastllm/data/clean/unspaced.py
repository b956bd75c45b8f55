"""Chinese and Japanese pages as the model of main text sees them: in words, as pages in Latin letters are."""

from __future__ import annotations

import re
from dataclasses import replace

from .elements import Markup

# Chinese characters and Japanese ones, which stand in runs without spaces.
_RUN = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_PAIR = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]{1,2}")
# How many characters are as much as a word: Chinese words have 1.5 to 2, Japanese ones have more. A guess.
_A_WORD = 2
# How often the first and the second one stand in a word that is as long as one in Latin letters, with the space after
# it: English ones have 5.7 characters on average.
_LETTERS = (3, 2)


def in_words(page: str, markup: Markup) -> tuple[str, Markup]:
    """``page`` and its ``markup`` with words in place of the runs of a page that is mostly in such characters.

    Two characters are a word, whose letters are these characters. A few of them in a page, as in a menu of languages,
    stay as they are.
    """
    unspaced = sum(map(len, _RUN.findall("".join(markup.texts)))) / _A_WORD
    if 2 * unspaced <= sum(map(_words, markup.texts)):
        return page, markup
    texts = list(map(words_of_runs, markup.texts))
    linked = [
        round(count * len(text) / max(1, len(before)))
        for count, text, before in zip(markup.linked, texts, markup.texts, strict=True)
    ]
    return words_of_runs(page), replace(markup, texts=texts, linked=linked)


def words_of_runs(text: str) -> str:
    """``text`` with words in place of runs of Chinese and Japanese characters."""
    return _RUN.sub(_spaced, text)


def _words(text: str) -> int:
    return len(_RUN.sub(" ", text).split())


def _spaced(run: re.Match[str]) -> str:
    return " ".join(
        "".join(letter * count for letter, count in zip(pair, _LETTERS, strict=False)) for pair in _PAIR.findall(run[0])
    )
