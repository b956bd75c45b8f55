"""What each block of a page looks like, in numbers: its text, the elements around it, repetition, neighbours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import unescape

import numpy as np

from .body import Running, body_columns, last_headings, nearest
from .cards import card_columns
from .elements import Markup
from .markup import LINKED, LONG
from .page_data import states_article
from .page_types import TYPES, PageTypes, page_tokens
from .page_words import FIRST_WORDS, WORD, PageWords, repeated

_ATTRIBUTE = re.compile(
    r"""(?:^|[\s"'])(class|id|role|itemprop|itemtype|aria-label|data-testid|data-component)\s*=\s*"""
    r"""(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""",
    re.IGNORECASE,
)
_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_TITLE = re.compile(r"<title[^>]*>([^<]{0,1000})", re.IGNORECASE)
_OPEN_GRAPH = re.compile(
    r"""<meta\b(?=[^>]{0,500}?property\s*=\s*["']?og:type["'\s])[^>]{0,500}?content\s*=\s*["']?([\w.:]+)""",
    re.IGNORECASE,
)
_TYPES = re.compile(r'"@type"\s*:\s*\[?\s*"(\w+)"')
# Kinds of page that schema.org's types and OpenGraph's name.
_PAGE_KINDS = (
    frozenset(["Article", "NewsArticle", "BlogPosting", "TechArticle", "ReportageNewsArticle", "article", "Recipe"]),
    frozenset(["Product", "ProductGroup", "product", "product.item", "og:product", "IndividualProduct"]),
    frozenset(["DiscussionForumPosting", "QAPage", "Question", "Answer", "Comment"]),
    frozenset(["ItemList", "CollectionPage", "product.group", "OfferCatalog"]),
    frozenset(["Service", "LocalBusiness", "ProfessionalService", "FAQPage", "WebApplication", "SoftwareApplication"]),
    frozenset(["website"]),
)  # fmt: skip
# The columns of the features that tell whether a page declares the first kind, and whether its data state that it is
# one article; the page's types come last.
DECLARED_ARTICLE = -len(TYPES) - len(_PAGE_KINDS)
STATED_ARTICLE = DECLARED_ARTICLE - 1

# Elements that are told apart: a bit for each, set for all that lies inside.
LANDMARKS = (
    "main", "article", "nav", "header", "footer", "aside", "form", "table", "ul", "ol", "section", "blockquote",
    "noscript", "details", "dialog", "figure", "dl", "button", "select", "carried-posts", "carried-schema",
    "carried-description", "a", "p", "pre", "li", "h1", "h2", "h3", "h4", "h5", "h6", "td", "th", "label", "menu",
)  # fmt: skip
_BITS = {tag: 1 << number for number, tag in enumerate(LANDMARKS)}
_PLACES = (
    "p", "div", "li", "td", "th", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "button", "option", "section", "dd", "dt",
    "figcaption", "footer", "header", "article", "body", "span", "blockquote",
)  # fmt: skip
_PLACE = {tag: number for number, tag in enumerate(_PLACES)}

# Classes of characters, for counting them in all blocks at once.
_CLASSES = 8
_TABLE = np.zeros(1 << 16, np.uint8)
for _code in range(1 << 16):
    _c = chr(_code)
    if _c in " \n\t":
        _TABLE[_code] = 1
    elif _c in ".!?\u3002\uff01\uff1f\u2026":
        _TABLE[_code] = 2
    elif _c in ",;:\uff0c\u3001":
        _TABLE[_code] = 3
    elif _c.isdigit():
        _TABLE[_code] = 4
    elif _c.isupper():
        _TABLE[_code] = 5
    elif _c in "|/\u00bb\u203a>\u2192\u2022\u00b7+*#@\u00a9":
        _TABLE[_code] = 6
    elif _c in "$\u20ac\u00a3\u00a5%":
        _TABLE[_code] = 7

# Levels of ancestors whose sums a block sees.
_LEVELS = 6
_NEIGHBOURS = (-3, -2, -1, 1, 2, 3)
_LONGEST = 1 << 14


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


class _Sums:
    """Sums over runs of blocks."""

    def __init__(self, values: np.ndarray):
        self._total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, 0, dtype=np.float64)])

    def between(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        return self._total[ends] - self._total[starts]


def element_names(markup: Markup) -> tuple[list[tuple[str, ...]], list[int]]:
    """What the names of elements say, each once, and which of them are each element's own."""
    numbers: dict[tuple[str, str], int] = {}
    own = [numbers.setdefault(key, len(numbers)) for key in zip(markup.tags, markup.attributes, strict=True)]
    return [name_tokens(*key) for key in numbers], own


def _element_columns(markup: Markup, weights: list[float]):
    """For each element, whose names have ``weights``: landmarks' bits, depth, and the chain's sum, least and most."""
    bits, depth, total, least, most = [], [], [], [], []
    for tag, weight, parent in zip(markup.tags, weights, markup.parents, strict=True):
        bit = _BITS.get(tag, 0)
        if parent < 0:
            bits.append(bit)
            depth.append(0)
            total.append(weight)
            least.append(0.0)
            most.append(0.0)
            continue
        bits.append(bits[parent] | bit)
        depth.append(depth[parent] + 1)
        total.append(total[parent] + weight)
        least.append(min(least[parent], weight))
        most.append(max(most[parent], weight))
    return bits, depth, total, least, most


def _shares(counts: np.ndarray) -> list[np.ndarray]:
    """What sums of (chars, linked, sentences, blocks, links) look like, whatever their size."""
    chars, linked, marks, blocks, links = counts.T
    return [
        np.log1p(chars), np.log1p(blocks), linked / np.maximum(chars, 1), chars / np.maximum(blocks, 1),
        marks / np.maximum(chars, 1) * 100, links / np.maximum(blocks, 1),
    ]  # fmt: skip


def character_classes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many characters of each class each block has, (blocks, classes), and its first and last character's class."""
    cut = [text[:_LONGEST] for text in texts]
    codes = np.frombuffer("".join(cut).encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = np.fromiter(map(len, cut), np.int64, len(cut))
    ends = np.cumsum(sizes)
    classes = _TABLE[np.minimum(codes, (1 << 16) - 1)]
    # One count for each pair of block and class.
    owner = np.repeat(np.arange(len(cut)), sizes)
    counted = np.bincount(owner * _CLASSES + classes, minlength=len(cut) * _CLASSES).reshape(len(cut), _CLASSES)
    return counted.astype(np.float64), classes[ends - sizes], classes[ends - 1]


def features(page: str, markup: Markup, page_words: PageWords, lexicon: Lexicon) -> np.ndarray:
    """(blocks, :data:`COUNT`) float32."""
    texts = markup.texts
    count = len(texts)
    place = np.asarray(markup.places)
    length = np.fromiter(map(len, texts), np.float64, count)
    cut_length = np.minimum(length, _LONGEST)
    counted, first, last = character_classes(texts)
    words = counted[:, 1] + 1
    linked = np.asarray(markup.linked, np.float64)
    links = np.asarray(markup.links, np.float64)
    link_share = linked / length
    # The card, row or post that it lies in.
    of_cards = np.stack([length, linked, counted[:, 4], counted[:, 7] > 0], 1)
    own = card_columns(markup, of_cards, Running.of(markup).characters)
    # Its own text.
    own += [
        np.log1p(length), np.log1p(words), length / words, link_share, links, counted[:, 2] / words,
        counted[:, 3] / words, counted[:, 4] / cut_length, counted[:, 5] / words, counted[:, 6], counted[:, 7],
        last == 2, last == 3, first == 5, first == 4, (counted[:, 2] + counted[:, 3]) > 1,
    ]  # fmt: skip

    names, which = element_names(markup)
    weights = [sum(lexicon.names.get(token, 0.0) for token in tokens) for tokens in names]
    name = [weights[number] for number in which]
    bits, depth, chain, least, most = _element_columns(markup, name)
    bits = np.asarray(bits, np.int64)
    parents = np.asarray(markup.parents)
    columns = np.asarray([name, chain, least, most, depth], np.float64).T
    own += list(columns[place].T)
    own += [(bits[place] >> number) & 1 for number in range(len(LANDMARKS))]
    own.append(np.asarray([_PLACE.get(markup.tags[at], -1) for at in markup.places]))
    own.append(np.asarray([markup.unshown[at] for at in markup.places]))

    # Words, repetition of the same text, and the title.
    scores = page_words.first_sums(lexicon.words)
    own += [scores, scores / np.sqrt(np.clip(page_words.counts, 1, FIRST_WORDS))]
    numbers: dict[str, int] = {}
    which = np.asarray([numbers.setdefault(text, len(numbers)) for text in texts])
    times = np.bincount(which)[which]
    seen_first = np.zeros(count)
    seen_first[np.unique(which, return_index=True)[1]] = 1
    own += [np.log(times), seen_first]
    title = _TITLE.search(page)
    title_text = " ".join(unescape(title[1]).lower().split()) if title else ""
    title_words = [page_words.known[word] for word in set(WORD.findall(title_text)) if word in page_words.known]
    own.append(page_words.shares(np.isin(page_words.numbers, title_words)) * (length < 300))
    own.append(np.asarray([5 < len(text) < 300 and text.lower() in title_text for text in texts]))
    own += list(repeated(page_words, markup.carried).T)

    # The part of the page: its heading, and where the running text is.
    heading, level = last_headings(markup)
    sections = page_words.first_sums(lexicon.headings)
    own += [
        np.where(heading >= 0, sections[np.maximum(heading, 0)], 0.0), level, np.log1p(np.arange(count) - heading),
        np.where(heading >= 0, link_share[np.maximum(heading, 0)], 0.0), sections,
    ]  # fmt: skip
    own += body_columns(markup, np.asarray(depth))

    # The place in the page, by blocks and by characters.
    position = np.cumsum(length)
    own += [np.arange(count) / max(1, count), position / position[-1], np.arange(count) == count - 1]

    # Sums over ancestors.
    values = np.stack([length, linked, counted[:, 2] + counted[:, 3], np.ones(count), links], 1)
    sums = _Sums(values)
    element_starts, element_ends = np.asarray(markup.starts), np.asarray(markup.ends)
    of_elements = sums.between(element_starts, element_ends)
    whole = of_elements[0]
    at = place
    for _ in range(_LEVELS):
        own += _shares(of_elements[at])
        own += [of_elements[at, 0] / whole[0], columns[at, 0]]
        at = np.where(parents[at] < 0, at, parents[at])
    # The nearest ancestor that holds much, and the nearest that is an article or main.
    much = nearest(parents, of_elements[:, 0] >= 0.25 * whole[0])
    landmark = nearest(parents, np.asarray([tag in ("article", "main") for tag in markup.tags]))
    for above in (much, landmark):
        of = above[place]
        own += _shares(of_elements[of])
        own += [of_elements[of, 0] / whole[0], columns[of, 0], columns[place, 4] - columns[of, 4]]

    # Blocks in the same kind of place, wherever they are in the page.
    element_kinds = _kinds(markup)
    for group in (element_kinds[place], element_kinds[np.maximum(parents[place], 0)]):
        _, group = np.unique(group, return_inverse=True)
        size = group.max() + 1
        of_group = np.stack([np.bincount(group, column, size) for column in values.T], 1)[group]
        own += _shares(of_group)
        mean_position = np.bincount(group, position, size)[group] / of_group[:, 3] / position[-1]
        own += [of_group[:, 0] / whole[0], mean_position]
    kinds_of_children = np.bincount(np.maximum(parents, 0), minlength=len(parents))
    own += [np.log1p(kinds_of_children[place]), np.log1p(kinds_of_children[np.maximum(parents[place], 0)])]

    # Neighbours.
    beside = np.stack([np.log1p(length), link_share, scores, columns[place, 1], last == 2, own[-1]], 1)
    for step in _NEIGHBOURS:
        moved = np.zeros_like(beside)
        if abs(step) < count:
            if step > 0:
                moved[:-step] = beside[step:]
            else:
                moved[-step:] = beside[:step]
        own += list(moved.T)

    counts = page_counts(page, markup, counted)
    types = lexicon.types.scores(page_tokens(names, page_words), counts)
    own += [np.full(count, value) for value in (*counts, *types)]
    return np.stack(own, 1).astype(np.float32)


def page_counts(page: str, markup: Markup, counted: np.ndarray) -> np.ndarray:
    """What the page is as a whole, in numbers; ``counted`` are its blocks' :func:`character_classes`."""
    declared = set(_TYPES.findall(page)) | set(_OPEN_GRAPH.findall(page[:200_000])[:1])
    tags = Counter(markup.tags)
    length, linked = np.fromiter(map(len, markup.texts), np.float64), np.asarray(markup.linked, np.float64)
    long = (length > LONG) & (linked < LINKED * length)
    whole = length.sum()
    numbers = [
        np.log1p(len(length)), np.log1p(whole), linked.sum() / whole, counted[:, 2:4].sum() / whole * 100,
        (length * long).sum() / whole, np.log1p((length * long).sum()), np.log1p(long.sum()), "main" in tags,
        *(np.log1p(tags[tag]) for tag in ("article", "p", "li", "pre", "form")),
        np.log1p(counted[:, 7].sum()), states_article(page), *(bool(declared & some) for some in _PAGE_KINDS),
    ]  # fmt: skip
    return np.asarray(numbers, np.float64)


def _kinds(markup: Markup) -> np.ndarray:
    """A number for each element, the same for those whose tags and classes agree all the way up."""
    numbers: dict[tuple[str, str, int], int] = {}
    kinds: list[int] = []
    for tag, attributes, parent in zip(markup.tags, markup.attributes, markup.parents, strict=True):
        above = kinds[parent] if parent >= 0 else -1
        kinds.append(numbers.setdefault((tag, _class_of(attributes), above), len(numbers)))
    return np.asarray(kinds)


def _class_of(attributes: str) -> str:
    begin = attributes.find("class=")
    return attributes[begin + 6 : begin + 60] if begin >= 0 else ""


def context(first: np.ndarray, words: np.ndarray, markup: Markup) -> np.ndarray:
    """What a first estimate says about a block's surroundings, (blocks, features) float32.

    Args:
        first: the probability that each block is main text.
        words: its size.
    """
    count = len(first)
    place, parents = np.asarray(markup.places), np.asarray(markup.parents)
    weighted = np.stack([first * words, words, first, np.ones(count)], 1)
    sums = _Sums(weighted)
    of_elements = sums.between(np.asarray(markup.starts), np.asarray(markup.ends))
    own: list[np.ndarray] = [first]
    for step in (-3, -2, -1, 1, 2, 3):
        moved = np.zeros(count)
        if abs(step) < count:
            if step > 0:
                moved[:-step] = first[step:]
            else:
                moved[-step:] = first[:step]
        own.append(moved)
    index = np.arange(count)
    for reach in (5, 15):
        begin, end = np.maximum(index - reach, 0), np.minimum(index + reach + 1, count)
        near = sums.between(begin, end)
        own += [near[:, 0] / near[:, 1], near[:, 2] / near[:, 3]]
    at = place
    for _ in range(5):
        of = of_elements[at]
        own += [of[:, 0] / np.maximum(of[:, 1], 1e-9), of[:, 2] / np.maximum(of[:, 3], 1)]
        at = np.where(parents[at] < 0, at, parents[at])
    group = _kinds(markup)[place]
    _, group = np.unique(group, return_inverse=True)
    of_group = np.stack([np.bincount(group, column) for column in weighted.T], 1)[group]
    own += [of_group[:, 0] / of_group[:, 1], of_group[:, 2] / of_group[:, 3]]
    total = weighted.sum(0)
    before = np.cumsum(weighted, 0)
    own += [
        np.full(count, np.log1p(total[0])), np.full(count, total[0] / total[1]), before[:, 0] / total[0],
        np.full(count, (first > 0.5).mean()), np.full(count, first.max()),
    ]  # fmt: skip
    return np.stack(own, 1).astype(np.float32)
