"""Main text of pages that are built as news sites and forums build them, with what stands around it."""

import random

import numpy as np
import pytest
from pages import HEADLINES, SECTIONS, TOPICS, article, paragraph

from fastllm.bench.main_text_training import covered_shares
from fastllm.data.clean.cards import Cards
from fastllm.data.clean.main_text import best_set, decide, extract_fast
from fastllm.data.clean.markup import read_markup
from fastllm.data.clean.page_types import TYPES, PageTypes

SHARE = ["Share on Facebook", "Share on Twitter", "Email this article", "Print", "Save for later"]
NEWSLETTER = "Sign up for our daily newsletter and get the best stories in your inbox every morning."
COOKIES = "We use cookies and similar technologies to improve your experience. By clicking Accept you agree to this."
LEGAL = "Copyright 2024 The Daily Example. All rights reserved. Terms of use. Privacy policy. Contact us. Advertise."


def comments(seed, count=5):
    draw = random.Random(seed)
    return [paragraph(TOPICS[(seed + i) % len(TOPICS)], draw, 3) for i in range(count)]


def links(names, tag="li"):
    return "".join(f'<{tag}><a href="/{name.lower().replace(" ", "-")}">{name}</a></{tag}>' for name in names)


def semantic(title, body, said, related):
    cards = "".join(
        f'<li class="related__item"><a href="/{i}"><h3>{name}</h3></a></li>' for i, name in enumerate(related)
    )
    thread = "".join(
        f'<li class="comment"><p class="comment__author">reader{i}</p><p>{text}</p><button>Reply</button></li>'
        for i, text in enumerate(said)
    )
    return f"""<!doctype html><html><head><title>{title} - The Daily Example</title>
      <meta property="og:type" content="article"></head><body>
      <div class="cookie-banner" role="dialog"><p>{COOKIES}</p><button>Accept</button><button>Reject</button></div>
      <header class="site-header"><nav><ul>{links(SECTIONS)}</ul></nav></header>
      <main><article><h1>{title}</h1><ul class="share-buttons">{links(SHARE)}</ul>{body}</article>
      <section class="newsletter"><h2>Newsletter</h2><p>{NEWSLETTER}</p>
      <form><input><button>Sign up</button></form></section>
      <aside class="related"><h2>Related stories</h2><ul>{cards}</ul></aside>
      <section id="comments" class="comments"><h2>{len(said)} comments</h2><ol>{thread}</ol></section></main>
      <footer><ul>{links(SECTIONS)}</ul><p>{LEGAL}</p></footer></body></html>"""


def blog(title, body, said, related):
    thread = "".join(
        f'<li class="comment even depth-1" id="comment-{i}"><div class="comment-body"><cite class="fn">reader{i}</cite>'
        f'<span class="says">says:</span><p>{text}</p><div class="reply"><a href="#r">Reply</a></div></div></li>'
        for i, text in enumerate(said)
    )
    return f"""<html><head><title>{title} | Example Blog</title></head><body class="single single-post comments-open">
      <div id="page"><div id="masthead"><div class="menu-primary"><ul id="menu">{links(SECTIONS)}</ul></div></div>
      <div id="content"><div id="primary"><div class="post hentry"><h1 class="entry-title">{title}</h1>
      <div class="entry-meta">Posted on <a href="#d">May 4, 2021</a> by <a href="#a">admin</a></div>
      <div class="entry-content">{body}
      <div class="sharedaddy sd-sharing-enabled"><h3 class="sd-title">Share this:</h3><ul>{links(SHARE)}</ul></div>
      <div id="jp-relatedposts" class="jp-relatedposts"><h3>Related</h3><ul>{links(related)}</ul></div></div></div>
      <div id="comments" class="comments-area"><h2 class="comments-title">{len(said)} thoughts on this</h2>
      <ol class="comment-list">{thread}</ol><div id="respond"><h3>Leave a Reply</h3>
      <p>Your email address will not be published. Required fields are marked</p></div></div></div>
      <div id="secondary" class="widget-area"><div class="widget"><h2>Recent Posts</h2><ul>{links(related)}</ul></div>
      <div class="widget"><p>{NEWSLETTER}</p></div></div></div>
      <div id="colophon" class="site-footer"><p>{LEGAL}</p></div></div></body></html>"""


def hashed(title, body, said, related):
    cards = "".join(
        f'<li class="css-x9{i}"><div class="css-1l4spti"><a href="/x"><h2 class="css-1j">{name}</h2></a></div></li>'
        for i, name in enumerate(related)
    )
    thread = "".join(f'<div class="css-8k{i}"><div class="css-ux1">{text}</div></div>' for i, text in enumerate(said))
    return f"""<html><head><title>{title}</title><meta property="og:type" content="article"></head><body><div id="app">
      <div class="css-1b"><div class="css-nav">{links(SECTIONS, "span")}</div></div>
      <div class="css-2c"><article id="story"><header><h1 class="css-4h">{title}</h1></header>
      <section name="articleBody">{body}</section></article>
      <div class="css-tools">{links(SHARE, "span")}</div>
      <section id="more"><h2>More in Culture</h2><ol>{cards}</ol></section>
      <div id="comments-panel">{thread}</div></div>
      <footer class="css-ft"><p>{LEGAL}</p><nav>{links(SECTIONS, "span")}</nav></footer></div></body></html>"""


@pytest.mark.parametrize("style", [semantic, blog, hashed], ids=lambda style: style.__name__)
def test_an_article_comes_out_without_what_stands_around_it(style):
    for number in range(4):
        text = article(number, 8)
        body = "".join(f"<p>{part}</p>" for part in text.split("\n\n"))
        said = comments(100 + number)
        others = [name for name in HEADLINES if name != HEADLINES[number]]
        found = extract_fast(style(HEADLINES[number], body, said, others))
        assert all(part in found for part in text.split("\n\n"))
        outside = [*said, NEWSLETTER, COOKIES, LEGAL, *SHARE, *others]
        assert [part for part in outside if part in found] == []


def test_comments_that_are_the_page_stay():
    said = comments(7, 6)
    thread = "".join(
        f'<div class="comment" id="comment-{i}"><div class="comment-author">user{i}</div>'
        f'<div class="comment-content"><p>{text}</p></div></div>'
        for i, text in enumerate(said)
    )
    page = f"""<html><head><title>How do I mend a clock? - Forum</title></head><body>
      <nav><ul>{links(SECTIONS)}</ul></nav><h1>How do I mend a clock?</h1>
      <div id="comments">{thread}</div></body></html>"""
    found = extract_fast(page)
    assert all(text in found for text in said)


def test_a_page_whose_text_is_for_readers_without_scripts_is_read():
    text = article(5, 6)
    body = "".join(f"<div class='crawler-post'><p>{part}</p></div>" for part in text.split("\n\n"))
    found = extract_fast(f"<body><div id='app'></div><noscript><nav>{links(SECTIONS)}</nav>{body}</noscript></body>")
    assert all(part in found for part in text.split("\n\n"))


@pytest.mark.parametrize(
    "body",
    [
        "<noscript>You need to enable JavaScript to run this app.</noscript><div id=root></div>",
        "<noscript>Bitte aktivieren Sie JavaScript.</noscript>",
        "<div id=app></div><script>start()</script>",
    ],
)
def test_a_page_that_shows_nothing_has_no_text(body):
    head = "<meta name=description content='A shop for lamps, chairs and tables of all kinds, open on every day.'>"
    assert extract_fast(f"<html><head>{head}</head><body>{body}</body></html>") == ""


def test_a_restaurants_menu_is_no_menu_of_links():
    dishes = "<h2>Dishes</h2><p>Spring rolls with a sweet sauce, a good way to begin.</p><p>Soup of the day.</p>"
    linked = "<li><a href=/a>Dishes of the week</a><li><a href=/b>Where we are</a><li><a href=/c>Reserve a table</a>"
    for name in ("menu", "nav", "toc"):
        source = (
            f"<body><main><h1>Our kitchen</h1><p>Welcome to our kitchen, which has been open since the spring.</p>"
            f"<div id={name}>{{}}</div><p>Please ask for what the season has, and for what you may not eat.</p></main>"
        )
        assert "sweet sauce" in extract_fast(source.format(dishes))
        assert "Reserve a table" not in extract_fast(source.format(linked))


def test_blocks_know_the_card_that_they_lie_in():
    cards = "".join(f"<li><a><h3>Lamp {i}</h3></a><div><p>A lamp</p><b>$ {i}</b></div></li>" for i in range(4))
    markup = read_markup(f"<body><p>before</p><ul>{cards}</ul><div><p>one</p></div></body>")
    found = Cards.of(markup)
    roots, slots = found.roots[markup.places], found.slots[markup.places]
    assert roots[0] == roots[-1] == -1
    items = [number for number, tag in enumerate(markup.tags) if tag == "li"]
    assert roots[1:-1].tolist() == [item for item in items for _ in range(3)]
    # What is in the same place of each card shares a number.
    assert len(set(slots[1:-1].tolist())) == 3
    assert slots[1:-1].tolist() == slots[1:4].tolist() * 4
    assert (found.sizes[found.groups[items]] == 4).all()


def test_what_little_of_a_reference_seems_unlikely_stays_with_the_rest():
    terms = "".join(f"<dt>name_{i}</dt><dd><p>{paragraph(TOPICS[0], random.Random(i), 2)}</p></dd>" for i in range(40))
    markup = read_markup(f"<body><dl>{terms}</dl><p>{paragraph(TOPICS[1], random.Random(1), 60)}</p></body>")
    words = np.asarray([len(text.split()) for text in markup.texts], float)
    chances = np.where(np.arange(len(words)) == 7, 0.2, 0.95)
    chances[[3, -1]] = 0.0005, 0.2
    kept = decide(markup, chances, words)
    assert np.flatnonzero(~kept).tolist() == [3, len(words) - 1]


def test_page_types_are_learned_from_tokens_and_counts():
    draw = np.random.default_rng(1)
    pages, types = [], []
    for number in range(210):
        type = TYPES[number % 7]
        noise = {f"noise{i}" for i in draw.integers(0, 50, 10)}
        pages.append(({*noise, f"of-{type}"} if number % 3 else noise, draw.normal(number % 7, 0.1, 2)))
        types.append(type)
    learned = PageTypes.learn(pages, types, 5, 0.01)
    found = [TYPES[int(np.argmax(learned.scores(*page)))] for page in pages]
    named = np.arange(210) % 3 > 0
    right = np.asarray(found) == np.asarray(types)
    assert right[named].all()
    # The bias is the types' share: the scores of all pages have their mean.
    mean = np.mean([learned.scores(*page) for page in pages], 0)
    assert mean == pytest.approx(np.full(7, 1 / 7), abs=1e-6)
    assert learned.scores({"unknown"}, learned.counts[0]) == pytest.approx(learned.bias)


def test_a_text_that_a_page_repeats_is_right_once():
    block = ["a", "text", "that", "occurs", "on", "this", "page", "more", "than", "once"]
    shares = covered_shares([block, ["other", *block[:3]], block], ["before", *block], np.asarray([0.0, 0.0, 1.0]))
    assert shares.tolist() == [0, 0, 1]
    assert covered_shares([block, block], block * 2, np.zeros(2)).tolist() == [1, 1]


def test_comments_beside_a_short_post_are_left_out():
    draw = random.Random(9)
    post = paragraph("night trains", draw, 3)
    said = [paragraph("glaciers", draw, 2) for _ in range(12)]
    found = extract_fast(blog("Trains again", f"<p>{post}</p>", said, HEADLINES))
    assert post in found
    assert not any(text in found for text in said)


def test_the_best_set_has_the_highest_expected_f1_under_a_pages_common_error():
    """Beside sums over the five errors and the blocks. A fifth of the sets differ from those without error."""
    draw, differ = np.random.default_rng(0), 0

    def expected(probabilities, words, taken, spread):
        total = 0.0
        weights = [np.exp(-(z**2) / 2) for z in (-2, -1, 0, 1, 2)]
        for z, weight in zip((-2, -1, 0, 1, 2), weights, strict=True):
            right = [w / (1 + (1 - p) / p * np.exp(-spread * z)) for p, w in zip(probabilities, words, strict=True)]
            kept = sum(r for r, take in zip(right, taken, strict=True) if take)
            total += weight / sum(weights) * 2 * kept / (sum(words[taken]) + sum(right))
        return total

    for _ in range(40):
        probabilities, words = draw.uniform(0.02, 0.98, 6), draw.integers(1, 60, 6)
        sets = [probabilities >= least for least in probabilities]
        best, alone = (max(sets, key=lambda s, at=at: expected(probabilities, words, s, at)) for at in (1.5, 0.0))
        assert np.array_equal(best_set(probabilities, words), best)
        differ += not np.array_equal(best, alone)
    assert differ > 4
