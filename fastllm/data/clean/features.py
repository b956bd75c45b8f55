"""What each block of a page looks like, in numbers: its text, the elements around it, repetition, neighbours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from html import unescape

import numpy as np

from .body import Running, body_columns, last_headings, nearest
from .cards import card_columns
from .elements import Markup
from .lexicon import Lexicon, element_names
from .markup import LINKED, LONG
from .page_data import states_article
from .page_types import TYPES, page_tokens
from .page_words import FIRST_WORDS, WORD, PageWords, repeated

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


class Character(IntEnum):
    """Classes of characters, for counting them in all blocks at once."""

    OTHER = 0
    SPACE = 1
    STOP = 2
    COMMA = 3
    DIGIT = 4
    CAPITAL = 5
    ORNAMENT = 6
    AMOUNT = 7


_LISTED = {
    Character.SPACE: " \n\t",
    Character.STOP: ".!?\u3002\uff01\uff1f\u2026",
    Character.COMMA: ",;:\uff0c\u3001",
    Character.ORNAMENT: "|/\u00bb\u203a>\u2192\u2022\u00b7+*#@\u00a9",
    Character.AMOUNT: "$\u20ac\u00a3\u00a5%",
}


def _classes() -> np.ndarray:
    """The class of each of the first 2^16 characters."""
    found = np.zeros(1 << 16, np.uint8)
    for code in range(len(found)):
        character = chr(code)
        if character.isdigit():
            found[code] = Character.DIGIT
        elif character.isupper():
            found[code] = Character.CAPITAL
    for kind, listed in _LISTED.items():
        found[list(map(ord, listed))] = kind
    return found


_CLASS_OF = _classes()

# Levels of ancestors whose sums a block sees, the blocks beside it that it sees too, and the characters of a block that
# are counted. Guesses.
_LEVELS = 6
_NEIGHBOURS = (-3, -2, -1, 1, 2, 3)
_LONGEST = 1 << 14
# The least share of the page's text in an element that has much of it. A guess.
_MUCH = 0.25


class Sums:
    """Sums over runs of blocks."""

    def __init__(self, values: np.ndarray):
        self._total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, 0, dtype=np.float64)])

    def between(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        return self._total[ends] - self._total[starts]


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
    """How many characters of each :class:`Character` a block has, (blocks, classes); its first and last one's class."""
    cut = [text[:_LONGEST] for text in texts]
    codes = np.frombuffer("".join(cut).encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = np.fromiter(map(len, cut), np.int64, len(cut))
    ends = np.cumsum(sizes)
    classes = _CLASS_OF[np.minimum(codes, len(_CLASS_OF) - 1)]
    # One count for each pair of block and class.
    owner = np.repeat(np.arange(len(cut)), sizes)
    counted = np.bincount(owner * len(Character) + classes, minlength=len(cut) * len(Character))
    counted = counted.reshape(len(cut), len(Character))
    return counted.astype(np.float64), classes[ends - sizes], classes[ends - 1]


# Columns of :attr:`_Blocks.columns`.
_NAME, _AROUND, _DEPTH = 0, 1, 4


@dataclass(frozen=True)
class _Blocks:
    """What the groups of columns share.

    Attributes:
        place: the element that each block lies in.
        length, linked, links: characters, characters in links and links of each block.
        counted: characters of each class, (blocks, classes); ``first`` and ``last`` are the first and last one's class.
        columns: of each element what its name weighs, the sum, least and most of all names around it, and its depth.
        scores: what the first words of each block weigh.
    """

    place: np.ndarray
    length: np.ndarray
    linked: np.ndarray
    links: np.ndarray
    counted: np.ndarray
    first: np.ndarray
    last: np.ndarray
    columns: np.ndarray
    scores: np.ndarray

    @property
    def link_share(self) -> np.ndarray:
        return self.linked / self.length

    @property
    def values(self) -> np.ndarray:
        """Characters, characters in links, marks between words, 1 and links, (blocks, 5)."""
        marks = self.counted[:, Character.STOP] + self.counted[:, Character.COMMA]
        return np.stack([self.length, self.linked, marks, np.ones(len(self.length)), self.links], 1)

    @property
    def position(self) -> np.ndarray:
        """The characters up to the end of each block."""
        return np.cumsum(self.length)


def features(page: str, markup: Markup, page_words: PageWords, lexicon: Lexicon) -> np.ndarray:
    """What each block looks like, (blocks, features) float32."""
    count = len(markup.texts)
    length = np.fromiter(map(len, markup.texts), np.float64, count)
    names, which = element_names(markup)
    weights = [sum(lexicon.names.get(token, 0.0) for token in tokens) for tokens in names]
    name = [weights[number] for number in which]
    bits, depth, chain, least, most = _element_columns(markup, name)
    blocks = _Blocks(
        np.asarray(markup.places), length, np.asarray(markup.linked, np.float64), np.asarray(markup.links, np.float64),
        *character_classes(markup.texts), np.asarray([name, chain, least, most, depth], np.float64).T,
        page_words.first_sums(lexicon.words),
    )  # fmt: skip
    # The card, row or post that it lies in.
    digits, amounts = blocks.counted[:, Character.DIGIT], blocks.counted[:, Character.AMOUNT]
    of_cards = np.stack([length, blocks.linked, digits, amounts > 0], 1)
    own = card_columns(markup, of_cards, Running.of(markup).characters)
    own += _text_columns(blocks)
    own += list(blocks.columns[blocks.place].T)
    bits = np.asarray(bits, np.int64)[blocks.place]
    own += [(bits >> number) & 1 for number in range(len(LANDMARKS))]
    own.append(np.asarray([_PLACE.get(markup.tags[at], -1) for at in markup.places]))
    own.append(np.asarray([markup.unshown[at] for at in markup.places]))
    own += _word_columns(page, markup, page_words, blocks)
    own += _section_columns(markup, page_words.first_sums(lexicon.headings), blocks)
    own += body_columns(markup, np.asarray(depth))
    # The place in the page, by blocks and by characters.
    position = blocks.position
    own += [np.arange(count) / max(1, count), position / position[-1], np.arange(count) == count - 1]
    own += _ancestor_columns(markup, blocks)
    own += _group_columns(markup, blocks)
    own += _neighbour_columns(blocks, own[-1])
    counts = page_counts(page, markup, blocks.counted)
    types = lexicon.types.scores(page_tokens(names, page_words), counts)
    own += [np.full(count, value) for value in (*counts, *types)]
    return np.stack(own, 1).astype(np.float32)


def _text_columns(blocks: _Blocks) -> list[np.ndarray]:
    """A block's own text."""
    length, first, last = blocks.length, blocks.first, blocks.last
    _, spaces, stops, commas, digits, capitals, ornaments, amounts = blocks.counted.T
    words = spaces + 1
    return [
        np.log1p(length), np.log1p(words), length / words, blocks.link_share, blocks.links, stops / words,
        commas / words, digits / np.minimum(length, _LONGEST), capitals / words, ornaments, amounts,
        last == Character.STOP, last == Character.COMMA, first == Character.CAPITAL, first == Character.DIGIT,
        (stops + commas) > 1,
    ]  # fmt: skip


def _word_columns(page: str, markup: Markup, page_words: PageWords, blocks: _Blocks) -> list[np.ndarray]:
    """A block's words, repetition of the same text, and the title."""
    texts, scores = markup.texts, blocks.scores
    numbers: dict[str, int] = {}
    which = np.asarray([numbers.setdefault(text, len(numbers)) for text in texts])
    seen_first = np.zeros(len(texts))
    seen_first[np.unique(which, return_index=True)[1]] = 1
    title = _TITLE.search(page)
    title_text = " ".join(unescape(title[1]).lower().split()) if title else ""
    title_words = [page_words.known[word] for word in set(WORD.findall(title_text)) if word in page_words.known]
    return [
        scores, scores / np.sqrt(np.clip(page_words.counts, 1, FIRST_WORDS)),
        np.log(np.bincount(which)[which]), seen_first,
        page_words.shares(np.isin(page_words.numbers, title_words)) * (blocks.length < 300),
        np.asarray([5 < len(text) < 300 and text.lower() in title_text for text in texts]),
        *repeated(page_words, markup.carried).T,
    ]  # fmt: skip


def _section_columns(markup: Markup, sections: np.ndarray, blocks: _Blocks) -> list[np.ndarray]:
    """The heading above a block; ``sections`` is what each block weighs as a heading."""
    heading, level = last_headings(markup)
    above = np.maximum(heading, 0)
    return [
        np.where(heading >= 0, sections[above], 0.0), level, np.log1p(np.arange(len(heading)) - heading),
        np.where(heading >= 0, blocks.link_share[above], 0.0), sections,
    ]  # fmt: skip


def _ancestor_columns(markup: Markup, blocks: _Blocks) -> list[np.ndarray]:
    """Sums over what is around a block: the nearest elements, the one that holds much, and the article or main."""
    place, columns, parents = blocks.place, blocks.columns, np.asarray(markup.parents)
    of_elements = Sums(blocks.values).between(np.asarray(markup.starts), np.asarray(markup.ends))
    whole = of_elements[0, 0]
    own: list[np.ndarray] = []
    at = place
    for _ in range(_LEVELS):
        own += _shares(of_elements[at])
        own += [of_elements[at, 0] / whole, columns[at, _NAME]]
        at = np.where(parents[at] < 0, at, parents[at])
    much = nearest(parents, of_elements[:, 0] >= _MUCH * whole)
    landmark = nearest(parents, np.asarray([tag in ("article", "main") for tag in markup.tags]))
    for above in (much, landmark):
        of = above[place]
        own += _shares(of_elements[of])
        deeper = columns[place, _DEPTH] - columns[of, _DEPTH]
        own += [of_elements[of, 0] / whole, columns[of, _NAME], deeper]
    return own


def _group_columns(markup: Markup, blocks: _Blocks) -> list[np.ndarray]:
    """Blocks in the same kind of place, wherever they are in the page; last how many children the elements have."""
    place, parents, position = blocks.place, np.asarray(markup.parents), blocks.position
    above, whole = np.maximum(parents[place], 0), blocks.length.sum()
    kinds = element_kinds(markup)
    own: list[np.ndarray] = []
    for group in (kinds[place], kinds[above]):
        _, group = np.unique(group, return_inverse=True)
        size = group.max() + 1
        of_group = np.stack([np.bincount(group, column, size) for column in blocks.values.T], 1)[group]
        own += _shares(of_group)
        mean_position = np.bincount(group, position, size)[group] / of_group[:, 3] / position[-1]
        own += [of_group[:, 0] / whole, mean_position]
    children = np.bincount(np.maximum(parents, 0), minlength=len(parents))
    return [*own, np.log1p(children[place]), np.log1p(children[above])]


def _neighbour_columns(blocks: _Blocks, children: np.ndarray) -> list[np.ndarray]:
    """What the blocks before and after look like; ``children`` is the last of :func:`_group_columns`."""
    around = blocks.columns[blocks.place, _AROUND]
    ends = blocks.last == Character.STOP
    seen = [np.log1p(blocks.length), blocks.link_share, blocks.scores, around, ends, children]
    beside = np.stack(seen, 1)
    own: list[np.ndarray] = []
    for step in _NEIGHBOURS:
        moved = np.zeros_like(beside)
        if abs(step) < len(beside):
            if step > 0:
                moved[:-step] = beside[step:]
            else:
                moved[-step:] = beside[:step]
        own += list(moved.T)
    return own


def page_counts(page: str, markup: Markup, counted: np.ndarray) -> np.ndarray:
    """What the page is as a whole, in numbers; ``counted`` are its blocks' :func:`character_classes`."""
    declared = set(_TYPES.findall(page)) | set(_OPEN_GRAPH.findall(page[:200_000])[:1])
    tags = Counter(markup.tags)
    length, linked = np.fromiter(map(len, markup.texts), np.float64), np.asarray(markup.linked, np.float64)
    long = (length > LONG) & (linked < LINKED * length)
    whole, marks = length.sum(), counted[:, [Character.STOP, Character.COMMA]].sum()
    numbers = [
        np.log1p(len(length)), np.log1p(whole), linked.sum() / whole, marks / whole * 100,
        (length * long).sum() / whole, np.log1p((length * long).sum()), np.log1p(long.sum()), "main" in tags,
        *(np.log1p(tags[tag]) for tag in ("article", "p", "li", "pre", "form")),
        np.log1p(counted[:, Character.AMOUNT].sum()), states_article(page),
        *(bool(declared & some) for some in _PAGE_KINDS),
    ]  # fmt: skip
    return np.asarray(numbers, np.float64)


def element_kinds(markup: Markup) -> np.ndarray:
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
