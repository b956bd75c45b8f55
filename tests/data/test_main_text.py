"""Main text of pages that are built as news sites and forums build them, with what stands around it."""

import random

import numpy as np
import pytest
from pages import TOPICS, article, paragraph

from fastllm.bench.main_text_training import covered_shares
from fastllm.data.clean.cards import Cards
from fastllm.data.clean.main_text import best_set, decide, extract_fast
from fastllm.data.clean.markup import read_markup
from fastllm.data.clean.page_types import TYPES, PageTypes

HEADLINES = [
    "Council votes to rebuild the old harbour wall after winter storms",
    "Why the night train to the coast is running again",
    "Scientists find a glacier that has stopped shrinking",
    "Small bakeries are winning back their towns",
    "A museum of clocks opens in a former railway station",
    "The last ferry pilot on the river retires at seventy",
]
SHARE = ["Share on Facebook", "Share on Twitter", "Email this article", "Print", "Save for later"]
SECTIONS = ["Home", "World", "Politics", "Business", "Sport", "Culture", "Science", "Opinion", "Video", "Subscribe"]
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


BESIDE = {
    "an aside": "<aside><h3>{0}</h3><p>{1}</p></aside>",
    "a dialog": '<div role="dialog"><h3>{0}</h3><p>{1}</p></div>',
    "a modal": '<div class="modal fade"><h3>{0}</h3><p>{1}</p></div>',
    "a popup": '<div id="help-popup"><h3>{0}</h3><p>{1}</p></div>',
    "a newsletter": "<div class=newsletter-box><h3>{0}</h3><p>{1}</p></div>",
    "a footer by name": '<div class="article footer"><h3>{0}</h3><p>{1}</p></div>',
    "a caption": "<figure><img src=a.png><figcaption><b>{0}</b> {1}</figcaption></figure>",
    "a footer": "<footer><h3>{0}</h3><p>{1}</p></footer>",
    "a form for answers": '<div id="post-form"><h3>{0}</h3><p>{1}</p></div>',
    "a plugin's box": '<div id="jp-relatedposts" class="jp-relatedposts"><h3>{0}</h3><p>{1}</p></div>',
    "a form to subscribe": '<div class="subscription-widget-wrap"><h3>{0}</h3><p>{1}</p></div>',
    "AMP's advertisement": "<amp-ad width=300><div placeholder><h3>{0}</h3><p>{1}</p></div></amp-ad>",
    "a complement": '<section role="complementary"><h3>{0}</h3><p>{1}</p></section>',
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_landmarks_hold_beside_an_article_is_left_out(kind):
    """In the middle of an article, where all that stands around it is main text."""
    draw = random.Random(7)
    body = [f"<p>{paragraph('harbour', draw, 4)}</p>" for _ in range(6)]
    beside = paragraph("glaciers", draw, 2)
    body.insert(3, BESIDE[kind].format("What the divers found", beside))
    page = f"<title>Wall</title><body><main><article><h1>The wall</h1>{''.join(body)}</article></main>"
    found = extract_fast(page)
    assert beside not in found
    assert "What the divers found" not in found
    assert all(part[3:-4] in found for part in [*body[:3], *body[4:]])


@pytest.mark.parametrize("kind", ["a dialog", "a modal", "a caption", "a complement", "a footer by name"])
def test_a_landmark_that_holds_the_running_text_is_the_main_text(kind):
    draw = random.Random(8)
    text = [paragraph("bread", draw, 4) for _ in range(6)]
    inner = "</p><p>".join(text)
    page = f"<title>Bread</title><body><div>{BESIDE[kind].format('On bread', inner)}</div><footer>2024</footer>"
    found = extract_fast(page)
    assert all(part in found for part in text)


def test_comments_beside_a_short_post_are_left_out():
    draw = random.Random(9)
    post = paragraph("night trains", draw, 3)
    said = [paragraph("glaciers", draw, 2) for _ in range(12)]
    found = extract_fast(blog("Trains again", f"<p>{post}</p>", said, HEADLINES))
    assert post in found
    assert not any(text in found for text in said)


WALL = [paragraph("harbour", random.Random(seed), 2) for seed in range(3)]
PARAGRAPHS = "".join(f"<p>{text}</p>" for text in WALL)


def test_a_text_for_narrow_and_for_wide_screens_comes_once():
    page = f"<body><main><article><h1>The wall</h1><div class=desktop>{PARAGRAPHS}</div><div class=mobile>{PARAGRAPHS}"
    assert extract_fast(page) == "\n\n".join(["The wall", *WALL])


def test_a_text_that_a_page_says_twice_in_the_same_way_stays():
    page = f"<body><main><article><h1>The wall</h1><p>{WALL[0]}</p><p>{WALL[1]}</p><p>{WALL[0]}</p></article></main>"
    assert extract_fast(page) == "\n\n".join(["The wall", WALL[0], WALL[1], WALL[0]])
    # Classes of screens tell copies apart.
    page = page.replace(f"<p>{WALL[0]}", f"<p class=narrow>{WALL[0]}", 1)
    assert extract_fast(page) == "\n\n".join(["The wall", WALL[0], WALL[1]])


def test_a_short_text_that_is_said_twice_in_a_row_comes_once():
    title, lead = HEADLINES[0], "The wall will be finished before next winter"
    line = "The sea comes in, the sea goes out"
    said = f"<h1>{title}</h1><h2 class=title>{title}</h2><p class=deck>{lead}</p><div class=lead><p>{lead}</p></div>"
    page = f"<body><main><article>{said}{PARAGRAPHS}<p>{line}</p><p>{line}</p></article></main>"
    # Lines of a song are said in the same way.
    assert extract_fast(page) == "\n\n".join([title, lead, *WALL, line, line])


def test_cells_that_say_the_same_are_no_copies():
    rows = "".join(
        f"<tr><td class=before>{name}</td><td class=after>{name}</td><td>{i} metres of wall</td></tr>"
        for i, name in enumerate(HEADLINES)
    )
    markup = read_markup(f"<body><p>{WALL[0]}</p><table>{rows}</table>")
    words = np.asarray([len(text.split()) for text in markup.texts], float)
    assert decide(markup, np.full(len(words), 0.9), words).all()


def test_markup_that_a_browser_saved_as_text_is_none():
    saved = "&lt;img src=&quot;https://example.org/wall.jpg&quot; alt=&quot;The wall in its first winter&quot;&gt;"
    page = f"<p>{WALL[0]}</p><noscript>{saved}</noscript><noscript>In 1 < 2 frames</noscript>"
    assert read_markup(page).texts == [WALL[0], "In 1 < 2 frames"]


@pytest.mark.parametrize("text", ["Skip to content", "Zum Inhalt springen", "Aller au contenu principal"])
def test_links_that_jump_to_the_text_are_left_out(text):
    page = f"<body><a class=skip-link href=#content>{text}</a><main><h1>The wall</h1>{PARAGRAPHS}</main>"
    assert extract_fast(page) == "\n\n".join(["The wall", *WALL])


@pytest.mark.parametrize("around", ["<article>{}</article>{}", "<main>{}</main>{}", "<div role='main'>{}</div>{}"])
def test_teasers_outside_a_short_article_and_outside_the_main_landmark_are_left_out(around):
    cards = [paragraph("bread", random.Random(number), 1) for number in range(8)]
    teasers = "".join(
        f"<div><h3><a href=/{i}>{name}</a></h3><p>{cards[i]}</p></div>" for i, name in enumerate(HEADLINES)
    )
    article = around.format(f"<h1>The wall</h1>{PARAGRAPHS}", f"<section>{teasers}</section>")
    assert extract_fast(f"<title>The wall</title><body>{article}") == "\n\n".join(["The wall", *WALL])


def test_a_title_outside_the_article_stays():
    page = f"<meta property=og:type content=article><body><main><h1>The wall</h1><article>{PARAGRAPHS}</article></main>"
    assert extract_fast(page) == "\n\n".join(["The wall", *WALL])


def test_code_that_repeats_stays():
    code = "for wall in walls: print(wall.name, wall.height, wall.length, wall.year, wall.stone, wall.owner)"
    page = f"<body><main><h1>Loops</h1><p>{WALL[0]}</p><pre>{code}</pre><p>{WALL[1]}</p><pre>{code}</pre>"
    assert extract_fast(page) == "\n\n".join(["Loops", WALL[0], code, WALL[1], code])


def test_definitions_that_say_the_same_stay():
    terms = "".join(
        f"<dt>wall_{i}()</dt><dd><p>{WALL[0]}</p><p>{paragraph('bread', random.Random(i), 2)}" for i in range(3)
    )
    found = extract_fast(f"<body><main><h1>Functions</h1><p>{WALL[1]}</p><dl>{terms}</dl>")
    assert found.count(WALL[0]) == 3


def test_a_short_table_that_lays_out_a_page_is_no_row():
    links_beside = "<br>".join(f"<a href=/{name}>{name}</a>" for name in SECTIONS[:3])
    text = "<br><br>".join(text[:180] for text in WALL)
    page = f"<body><table><tr><td width=150>{links_beside}</td><td><b>The wall</b><br><br>{text}</td></tr></table>"
    assert extract_fast(page) == "\n\n".join(["The wall", *(text[:180].strip() for text in WALL)])


def test_a_page_of_frames_is_read_as_readers_without_frames_see_it():
    frames = "<frameset cols='20%,80%'><frame src=a.html><frame src=b.html>"
    found = extract_fast(f"<html>{frames}<noframes><body>{PARAGRAPHS}</body></noframes></frameset></html>")
    assert found == "\n\n".join(WALL)
    # Beside text it is none.
    assert extract_fast(f"<html><body>{PARAGRAPHS}<noframes><p>No frames.</p></noframes>") == "\n\n".join(WALL)


@pytest.mark.parametrize("edit", ["edit", "Bearbeiten | Quelltext bearbeiten", "\u7f16\u8f91"])
def test_links_to_edit_are_no_part_of_a_wikis_headings(edit):
    heading = f"<h2><span>History</span><span class=mw-editsection>[<a href=/e>{edit}</a>]</span></h2>"
    page = f"<body><main><h1>Wall</h1><p>{WALL[0]}</p>{heading}<p>{WALL[1]}</p><h2>Lists [edit]</h2><p>{WALL[2]}</p>"
    parts = ["Wall", WALL[0], "History", WALL[1], "Lists [edit]", WALL[2]]
    assert extract_fast(page) == "\n\n".join(parts)


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


def test_signs_that_link_to_a_heading_are_no_part_of_it():
    headings = [
        "<h2>Stone<a href=#stone>#</a></h2>",
        "<h2><a href=#wood>\u00a7</a>Wood</h2>",
        "<h2>Iron <a href=#i>\U0001f517</a></h2>",
        "<h2>In C#</h2>",
        "<h2>Why <a href=/c>C#</a></h2>",
    ]
    text = "".join(heading + f"<p>{WALL[number % 3]}{number}</p>" for number, heading in enumerate(headings))
    lines = extract_fast(f"<body><main><h1>Wall</h1><p>{WALL[0]}</p>{text}").split("\n\n")
    assert lines[2::2] == ["Stone", "Wood", "Iron", "In C#", "Why C#"]


def test_a_tables_head_and_body_are_lines_of_one_table():
    cells = [("Day", "Height"), ("1 May", "2.4 m"), ("2 May", "2.6 m"), ("Mean", "2.5 m")]
    head, *body, foot = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells]
    table = f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody><tfoot>{foot}</tfoot></table>"
    found = extract_fast(f"<body><main><h1>Wall</h1>{PARAGRAPHS}{table}{PARAGRAPHS.replace('harbour', 'pier')}")
    assert "\n\n" + "\n".join(" | ".join(row) for row in cells) + "\n\n" in found


def test_line_numbers_beside_code_are_left_out():
    code = "for wall in walls:\n    print(wall)"
    row = "<table><tr><td><pre>{}</pre></td><td><pre>{}</pre></td></tr></table>"
    page = f"<body><main><h1>Wall</h1><p>{WALL[0]}</p>{{}}<p>{WALL[1]}</p>"
    assert extract_fast(page.format(row.format("1\n2", code))) == "\n\n".join(["Wall", WALL[0], code, WALL[1]])
    # Numbers that do not count lines are a program's output.
    assert "2\n4" in extract_fast(page.format(row.format("2\n4", code)))


def test_a_table_of_contents_of_terms_goes_and_a_glossary_stays():
    terms = [f"<dt><a href=#{number}>{number}. {text}</a></dt>" for number, text in enumerate(HEADLINES)]
    contents = f"<dl>{''.join(terms[:3])}<dd><dl>{''.join(terms[3:])}</dl></dd></dl>"
    # So long that rules for small pages have no say.
    texts = [f"Part {number}. {paragraph('harbour', random.Random(number), 2)}" for number in range(60)]
    glossary = "".join(f"{term}<dd>{text}</dd>" for term, text in zip(terms, texts, strict=False))
    markup = read_markup(f"<body><main>{contents}<p>{texts[6]}<dl>{glossary}</dl><p>{'<p>'.join(texts[7:])}")
    words = np.asarray([float(len(text.split())) for text in markup.texts])
    kept = decide(markup, np.full(len(words), 0.9), words)
    assert kept.tolist() == [False] * 6 + [True] * (len(words) - 6)
