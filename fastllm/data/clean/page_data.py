"""The text that a page carries as data instead of as elements: posts of Discourse, schema.org's JSON, descriptions.

What is found comes back as markup, so that it is read and judged like the rest of the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape, unescape
from typing import Any

_SCHEMA = re.compile(r"<script\b[^>]{0,500}application/ld\+json[^>]{0,500}>((?s:.)*?)(?:</script|\Z)", re.IGNORECASE)
_DESCRIPTION = re.compile(
    r"""<meta\b(?=[^>]{0,2000}?(?:name|property)\s*=\s*["']?(?:og:)?description["'\s/])"""
    r"""[^>]{0,2000}?content\s*=\s*(?:"([^"]*)"|'([^']*)')""",
    re.IGNORECASE,
)
_ARTICLE_TYPE = r"(?:\w*Article|BlogPosting|LiveBlogPosting|Report|Recipe)"
_ARTICLE_IN_JSON = re.compile(rf'"@type"\s*:\s*\[?\s*"{_ARTICLE_TYPE}"')
_ARTICLE_IN_MARKUP = re.compile(rf"""itemtype\s*=\s*["']?https?://schema\.org/{_ARTICLE_TYPE}(?!\w)""")
_TIME = "article:published_time"
_PUBLISHED = re.compile(rf"""<meta\b[^>]{{0,300}}?(?:property|name)\s*=\s*["']?{_TIME}(?!\w)""", re.IGNORECASE)
# A page with more articles in its data is a list of them. A guess: an article's data name one, or it and its page's.
_MOST_ARTICLES = 3
# Descriptions and times of publication are in a page's head.
_HEAD = 200_000
_PRELOADED = 'data-preloaded="'
_NAMES = ("headline", "name")
_TEXTS = ("articleBody", "text", "description", "reviewBody")
# schema.org's objects that say who made a page and how it is found, not what is on it.
_ABOUT = {
    "Organization", "Person", "WebSite", "SearchAction", "BreadcrumbList", "ImageObject", "Brand", "Offer",
    "AggregateOffer", "Place", "PostalAddress", "ContactPoint", "SiteNavigationElement", "NewsMediaOrganization",
    "Rating", "AggregateRating", "VideoObject", "CollegeOrUniversity", "Corporation",
}  # fmt: skip
# JSON that nests deeper holds no text for readers. The second is the most objects that are read for a page. Guesses.
_DEEPEST, _MOST = 24, 3000


def states_article(page: str) -> bool:
    """Whether a page's data say that it is one article: schema.org's type, or OpenGraph's time of publication.

    OpenGraph's ``og:type`` says so on lists and shops too, as some site builders write it on every page.
    """
    if 0 < len(_ARTICLE_IN_JSON.findall(page)) <= _MOST_ARTICLES or len(_ARTICLE_IN_MARKUP.findall(page)) == 1:
        return True
    head = page[:_HEAD]
    # The plain search is far faster, and most pages end with it.
    return _TIME in head and _PUBLISHED.search(head) is not None


def _objects(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The objects in ``value`` that may hold text, an object before those in it."""
    if depth > _DEEPEST:
        return
    if isinstance(value, list):
        for part in value:
            yield from _objects(part, depth + 1)
    elif isinstance(value, dict):
        kind = value.get("@type")
        if isinstance(kind, str) and kind in _ABOUT:
            return
        yield value
        for key, part in value.items():
            if isinstance(part, (dict, list)) and key not in ("author", "publisher", "brand", "offers", "isPartOf"):
                yield from _objects(part, depth + 1)


def _schema(page: str) -> Iterator[str]:
    count = 0
    for found in _SCHEMA.finditer(page):
        try:
            value = json.loads(found[1], strict=False)
        except (ValueError, RecursionError):
            continue
        for item in _objects(value):
            count += 1
            if count > _MOST:
                return
            names = [item[key] for key in _NAMES if isinstance(item.get(key), str)][:1]
            texts = [(key, item[key]) for key in _TEXTS if isinstance(item.get(key), str)]
            kind = kind if isinstance(kind := item.get("@type"), str) else ""
            if names or texts:
                title = "".join(f"<h3>{escape(unescape(name))}</h3>" for name in names)
                inner = "".join(f'<div itemprop="{key}">{_as_markup(text)}</div>' for key, text in texts)
                yield f'<schema-object class="{escape(kind)}">{title}{inner}</schema-object>'


def _as_markup(text: str) -> str:
    if re.search(r"<(?:p|br|div|li|h\d|b|strong|a)\b", text):
        return text
    return escape(unescape(unescape(text))).replace("\n", "<br>")


def _posts(page: str) -> Iterator[str]:
    """What Discourse hands its own script: the topic's posts, as markup in JSON in JSON in an attribute."""
    begin = page.find(_PRELOADED)
    if begin < 0:
        return
    begin += len(_PRELOADED)
    end = page.find('"', begin)
    try:
        stores = json.loads(unescape(page[begin:end]))
        for name, content in stores.items():
            if name.startswith("topic_"):
                for post in json.loads(content)["post_stream"]["posts"]:
                    yield f'<article class="post"><h3 class="username">{escape(str(post.get("username", "")))}</h3>'
                    yield f'<div class="cooked">{post["cooked"]}</div></article>'
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return


def descriptions(page: str) -> list[str]:
    """What ``page`` says of itself in its head, each text once, as markup with single spaces."""
    found = _DESCRIPTION.finditer(page[:_HEAD])
    return list(dict.fromkeys(" ".join((match[1] or match[2] or "").split()) for match in found))


def carried(page: str) -> list[tuple[str, str]]:
    """(name of the source, markup) for each source of text that ``page`` carries as data."""
    found = [("carried-posts", "".join(_posts(page))), ("carried-schema", "".join(_schema(page)))]
    found.append(("carried-description", "".join(f"<p>{text}</p>" for text in descriptions(page))))
    return [(name, markup) for name, markup in found if markup]
