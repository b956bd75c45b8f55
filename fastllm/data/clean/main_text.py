"""The fast extractor: a page's blocks, how likely each is main text, and the blocks that are best taken together."""

from __future__ import annotations

import re

import numpy as np

from .block_model import block_model
from .body import HEADINGS, nearest
from .code_rows import table_of
from .elements import Markup
from .markup import read_markup
from .page_words import WORD, PageWords
from .rendering import data_rows, render
from .small_pages import blend, log_odds, rule_odds, shows_nothing
from .unspaced import in_words

# Taken off the model's log-odds. On the 511 pages, cross-validated, 0.15 gives a mean F1 that is 0.001 higher; pages of
# sites that look different from all of them gain from more, in precision.
_CAUTION = 0.3
# The standard deviation, in log-odds, of a page's common error. On the 511 pages, cross-validated, mean F1 is 0.001
# higher at 1 than at 0, 0.003 at 1.5, 0.002 at 2.
_PAGE_SPREAD = 1.5
# The normal distribution at five points.
_SHIFTS = np.asarray([-2.0, -1.0, 0.0, 1.0, 2.0])
_SHIFT_WEIGHTS = np.exp(-(_SHIFTS**2) / 2) / np.exp(-(_SHIFTS**2) / 2).sum()
# Of texts with at least so many words a page's copies go, as of layouts for narrow and wide screens. On the 511 pages,
# cross-validated, mean F1 is 0.002 higher, for 8, 12 and 20.
_COPY = 12
# A text of at least so many words goes that the block before it has too, as a title or a lead for another screen. Of
# such blocks with 4 to 11 words a share of 0.11 is main text on the 511 pages, cross-validated. Mean F1 is 0.0003
# higher without them.
_DOUBLED = 4
# The least share of a hidden element's words in copies: a guess.
_COPIED = 0.5
# A page whose likeliest block is less likely than this has no main text.
_LEAST = 0.1
# The model's features take 2.5 KB of memory for each block.
_MOST_BLOCKS = 50_000
# The title belongs to a text that begins at most this many blocks of other text after it, unless it is less likely
# than this. On the 511 pages, cross-validated, mean F1 is the same at 0.05, 0.1 and 0.2.
_BEFORE, _TITLE = 6, 0.1
# The fewest blocks of code and definitions in a reference, the fewest words in its part, their share of the blocks, and
# the least probability of its words on average. Guesses, as for smaller parts; :func:`decide` says what they bring.
_REFERENCE, _LARGE, _CODES, _PROBABLE = 15, 1000, 0.1, 0.6
# Smaller parts count as references for what their text says of the rest: if so much of it is kept, the blocks that are
# likelier than this and mostly outside links are kept too.
_SMALL_REFERENCE, _SMALL, _FEW_CODES = 5, 200, 0.05
_MOSTLY, _LIKELY, _HALF_LINK = 0.8, 0.1, 0.5
# The most characters of line numbers beside code, those of 10,000 lines: a guess.
_LINE_NUMBERS = 60_000
# Links that jump over what comes before the text; they are among a page's first blocks, and short, in characters:
# guesses, as the limits of what stands around advertisements and of tables of contents.
_SKIP = re.compile(
    r"^(?:skip|jump) (?:directly )?(?:to|over)\b|^(?:direkt )?zum? (?:haupt)?(?:inhalt|navigation)\b"
    r"|^(?:aller|passer|acc\u00e9der) (?:directement )?au (?:contenu|menu)\b"
    r"|^(?:ir|saltar|pular) (?:directamente )?(?:al|para o) (?:contenido|conte\u00fado)\b"
    r"|^(?:vai|salta) al (?:contenuto|menu)\b",
    re.IGNORECASE,
)
_FIRST_BLOCKS, _SHORT = 12, 60
# What stands above an advertisement, in eight languages, and below it.
_ADVERTISEMENT = re.compile(
    r"^\W*(?:advertisements?|advertising|anzeige|werbung|publicit\u00e9|publicidad|publicidade|pubblicit\u00e0"
    r"|advertentie|reklama|(?:story|article) continues below)(?:\W+(?:story|article) continues below)?"
    r"(?: advertisement)?\W*$",
    re.IGNORECASE,
)
# The fewest items of a table of contents that are links alone, and the least share of their characters in links.
_CONTENTS, _ALL_LINK = 3, 0.9


def word_list(text: str) -> list[str]:
    """The words that extraction is measured by: lower case, runs of letters, digits and underscores."""
    return WORD.findall(text.lower())


def best_set(probabilities: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Which blocks to take, so that the expected F1 of their words is highest.

    For each number of blocks, the likeliest first, F1 is taken as 2 E[words that are right] / (words taken + E[words of
    main text]). A model errs on a page as a whole: all log-odds may be too low or too high by the same number, whose
    distribution is normal, and F1 is the mean over it.
    """
    order = np.argsort(-probabilities, kind="stable")
    sizes = words[order]
    taken = np.cumsum(sizes)
    odds = log_odds(probabilities[order])
    expected = np.zeros(len(order))
    for shift, weight in zip(_SHIFTS, _SHIFT_WEIGHTS, strict=True):
        right = np.cumsum(sizes / (1 + np.exp(-odds - _PAGE_SPREAD * shift)))
        expected += weight * 2 * right / (taken + right[-1] + 1e-9)
    return probabilities >= probabilities[order[int(np.argmax(expected))]]


def _line_numbers(markup: Markup) -> list[int]:
    """The blocks of preformatted line numbers beside preformatted text, in the same row of a table."""
    rows: dict[int, list[int]] = {}
    for block, place in enumerate(markup.places):
        if markup.rows[place] >= 0 and markup.preformatted[place]:
            rows.setdefault(markup.rows[place], []).append(block)
    return [
        block
        for blocks in rows.values()
        if len(blocks) > 1
        for block in blocks
        if len(markup.texts[block]) <= _LINE_NUMBERS and _counts_up(markup.texts[block].split())
    ]


def _counts_up(words: list[str]) -> bool:
    if not words or not all(word.isdecimal() and len(word) < 10 for word in words):
        return False
    first = int(words[0])
    return [int(word) for word in words] == list(range(first, first + len(words)))


def _lists(markup: Markup) -> list[list[int]]:
    """The blocks of each list whose items are single blocks."""
    items: dict[int, list[int]] = {}
    for block, place in enumerate(markup.places):
        if markup.items[place] >= 0:
            items.setdefault(markup.items[place], []).append(block)
    lists: dict[int, list[int]] = {}
    for item, blocks in items.items():
        if len(blocks) == 1:
            lists.setdefault(markup.parents[item], []).extend(blocks)
    return list(lists.values())


def _tables(markup: Markup) -> list[list[int]]:
    """The blocks of each table's rows of data and of its caption."""
    tables: dict[int, list[int]] = {}
    for row, blocks in data_rows(markup).items():
        tables.setdefault(table_of(markup, row), []).extend(blocks)
    for block, place in enumerate(markup.places):
        if markup.tags[place] == "caption" and (table := markup.parents[place]) in tables:
            tables[table].append(block)
    return list(tables.values())


def _tables_of_contents(markup: Markup) -> list[int]:
    """The blocks of runs of items and terms that are links alone, some of them inside others, if a list has no more."""
    items: list[int] = []
    for number, (tag, parent) in enumerate(zip(markup.tags, markup.parents, strict=True)):
        items.append(number if tag in ("li", "dt", "dd") else items[parent] if parent >= 0 else -1)
    found: list[int] = []
    run: list[int] = []
    nested = False
    for block, place in enumerate([*markup.places, -1]):
        item = items[place] if place >= 0 else -1
        if item >= 0 and markup.linked[block] >= _ALL_LINK * len(markup.texts[block]):
            run.append(block)
            nested = nested or items[markup.parents[item]] >= 0
            continue
        if nested and len(run) >= _CONTENTS:
            for of_run in run:
                whole = _outermost_list(markup, items, items[markup.places[of_run]])
                if markup.starts[whole] >= run[0] and markup.ends[whole] <= run[-1] + 1:
                    found.append(of_run)
        run, nested = [], False
    return found


def _outermost_list(markup: Markup, items: list[int], item: int) -> int:
    """The element around the outermost item or term around ``item``; ``items`` has that of each element, or -1."""
    while items[markup.parents[item]] >= 0:
        item = items[markup.parents[item]]
    return markup.parents[item]


def _skip_links(markup: Markup) -> list[int]:
    """The blocks of links that jump to the text."""
    first = enumerate(zip(markup.texts[:_FIRST_BLOCKS], markup.linked, strict=False))
    return [
        block
        for block, (text, linked) in first
        if linked >= _ALL_LINK * len(text) and len(text) < _SHORT and _SKIP.search(text)
    ]


def _advertisements(markup: Markup) -> list[int]:
    """The blocks that only say that an advertisement stands there; in tables, lists and headings it is the subject."""
    return [
        block
        for block, (text, place) in enumerate(zip(markup.texts, markup.places, strict=True))
        if len(text) < _SHORT
        and _ADVERTISEMENT.search(text)
        and markup.rows[place] < 0
        and markup.items[place] < 0
        and markup.tags[place] not in HEADINGS
    ]


def _title(markup: Markup, first: int) -> int | None:
    """The block of the page's only ``h1``, if it comes shortly before block ``first``: links alone are not counted."""
    found = [block for block, place in enumerate(markup.places) if markup.tags[place] == "h1"]
    if len(found) != 1 or found[0] >= first:
        return None
    between = range(found[0] + 1, first)
    text = sum(markup.linked[block] < _ALL_LINK * len(markup.texts[block]) for block in between)
    return found[0] if text < _BEFORE else None


def _sums(markup: Markup, words: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each element the sums of ``weights`` and ``words``, and its blocks of code, terms and definitions of all."""
    parents, places = np.asarray(markup.parents), np.asarray(markup.places)
    tags = np.asarray([tag in ("dt", "dd", "pre") for tag in markup.tags])
    technical = tags | tags[np.maximum(parents, 0)] | np.asarray(markup.preformatted)
    columns = [weights, words, technical[places], np.ones(len(words))]
    sums = np.concatenate([np.zeros((1, 4)), np.cumsum(np.stack(columns, 1), 0)])
    return tuple((sums[markup.ends] - sums[markup.starts]).T)


def _reference_odds(markup: Markup, probabilities: np.ndarray, words: np.ndarray) -> np.ndarray:
    """What is added to the log-odds of blocks in a reference: a part of the page with code, terms and definitions.

    There a signature, a version or a row of constants is judged by the whole that it lies in.
    """
    likely, size, codes, count = _sums(markup, words, probabilities * words)
    mean = np.clip(likely / np.maximum(size, 1e-9), 0.02, 0.98)
    reference = (mean > _PROBABLE) & (size >= _LARGE) & (codes >= _REFERENCE) & (codes >= _CODES * count)
    around = nearest(np.asarray(markup.parents), reference)[np.asarray(markup.places)]
    return np.where(reference[around], np.log(mean / (1 - mean))[around], 0.0)


def _rest_of_references(markup: Markup, probabilities: np.ndarray, words: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Which blocks to keep because nearly all of the reference around them is kept."""
    kept, size, codes, count = _sums(markup, words, words * keep)
    reference = (
        (kept >= _MOSTLY * size) & (size >= _SMALL) & (codes >= _SMALL_REFERENCE) & (codes >= _FEW_CODES * count)
    )
    around = nearest(np.asarray(markup.parents), reference)[np.asarray(markup.places)]
    linked = np.asarray(markup.linked) / np.fromiter(map(len, markup.texts), np.float64)
    return reference[around] & (probabilities >= _LIKELY) & (linked <= _HALF_LINK)


def _copies(markup: Markup, words: np.ndarray, keep: np.ndarray) -> list[int]:
    """The blocks whose text an earlier block of those to ``keep`` has, or for shorter ones the block before.

    Two definitions may say the same. On every fourth page of Python's documentation mean F1 is 0.003 higher for it.
    What an element says twice in the same way is its own repetition, not a copy for another screen.
    """
    defined: list[bool] = []
    for tag, parent in zip(markup.tags, markup.parents, strict=True):
        defined.append(tag == "dl" or (parent >= 0 and defined[parent]))
    first: dict[str, tuple[int, str]] = {}
    found: list[int] = []
    kept = np.flatnonzero(keep).tolist()
    for before, block in zip([-1, *kept], kept, strict=False):
        place, text = markup.places[block], markup.texts[block]
        if words[block] < _DOUBLED or markup.preformatted[place] or defined[place]:
            continue
        kind = markup.parents[place], markup.attributes[place]
        if words[block] >= _COPY:
            copied = first.setdefault(text, kind)
        elif before >= 0 and markup.texts[before] == text and not _in_one_row(markup, before, block):
            copied = markup.parents[markup.places[before]], markup.attributes[markup.places[before]]
        else:
            continue
        if copied != kind:
            found.append(block)
    return found


def _in_one_row(markup: Markup, block: int, other: int) -> bool:
    row = markup.rows[markup.places[block]]
    return row >= 0 and row == markup.rows[markup.places[other]]


def _beside_copies(markup: Markup, words: np.ndarray, keep: np.ndarray, copies: list[int]) -> list[int]:
    """The blocks to ``keep`` of hidden elements that are mostly ``copies``: the rest is about the copy, as metadata."""
    if not copies:
        return []
    outermost: list[int] = []
    for number, (hidden, parent) in enumerate(zip(markup.unshown, markup.parents, strict=True)):
        above = outermost[parent] if parent >= 0 else -1
        outermost.append(above if above >= 0 else number if hidden else -1)
    # Number 0 stands for what is shown.
    of_blocks = np.asarray(outermost)[np.asarray(markup.places)] + 1
    copied = np.zeros(len(words), bool)
    copied[copies] = True
    inside = np.bincount(of_blocks, words * keep)
    mostly = (np.bincount(of_blocks, words * copied) >= _COPIED * inside) & (inside > 0)
    mostly[0] = False
    return np.flatnonzero(keep & mostly[of_blocks]).tolist()


def decide(markup: Markup, probabilities: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Whether each block is kept. A table of data and a list of short items are kept whole or not at all, a text once.

    Tables of contents go, and references are kept whole: made for Python's documentation, where the model alone has a
    mean F1 of 0.887 on every fifth page. On the pages of the benchmark, cross-validated, they change it by less than
    0.001.
    """
    odds = log_odds(probabilities) - _CAUTION + _reference_odds(markup, probabilities, words + 0.5)
    probabilities = blend(1 / (1 + np.exp(-odds)), markup, words)
    # Mean F1 on the 511 pages, cross-validated, is 0.0003 higher than with each row for itself.
    for blocks in [*_tables(markup), *_lists(markup)]:
        probabilities[blocks] = np.average(probabilities[blocks], weights=words[blocks] + 0.5)
    probabilities[[*_tables_of_contents(markup), *_skip_links(markup), *_advertisements(markup)]] = 0
    if probabilities.max() < _LEAST or shows_nothing(markup):
        return np.zeros(len(words), bool)
    keep = best_set(probabilities, words)
    keep |= _rest_of_references(markup, probabilities, words, keep)
    copies = _copies(markup, words, keep)
    keep[[*copies, *_beside_copies(markup, words, keep, copies)]] = False
    keep[_line_numbers(markup)] = False
    title = _title(markup, int(np.argmax(keep)))
    if title is not None and probabilities[title] >= _TITLE:
        keep[title] = True
    return keep


def extract_fast(page: str) -> str:
    """The main text of ``page``: the blocks that a learned model takes for it, in the page's order.

    Simple rules decide on a page with more than 50,000 blocks, for which the model would need too much memory.
    """
    markup = read_markup(page)
    if not markup.texts:
        return ""
    page, seen = in_words(page, markup)
    words = PageWords.of(seen.texts)
    if len(seen.texts) <= _MOST_BLOCKS:
        probabilities = block_model().probabilities(page, seen, words)
    else:
        probabilities = 1 / (1 + np.exp(-np.nan_to_num(rule_odds(seen))))
    keep = decide(seen, probabilities, words.counts)
    return render(markup, np.flatnonzero(keep).tolist())


def visible_text(page: str) -> str:
    """Every text of ``page`` that is shown, blocks on lines of their own."""
    markup = read_markup(page, with_carried=False)
    return render(markup, [block for block, place in enumerate(markup.places) if not markup.unshown[place]])
