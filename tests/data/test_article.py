"""What a page's data and names say of its article: its lead, its comments, teasers around it, metadata of copies."""

import json
import random

import numpy as np
import pytest
from pages import paragraph

from fastllm.data.clean.article import elsewhere_odds, stated_lead
from fastllm.data.clean.body import Running
from fastllm.data.clean.main_text import decide, extract_fast
from fastllm.data.clean.markup import read_markup
from fastllm.data.clean.page_data import states_article
from fastllm.data.clean.page_words import PageWords

TEXT = [paragraph("harbour", random.Random(seed), 3) for seed in range(5)]
BODY = "".join(f"<p>{text}</p>" for text in TEXT)
LEAD = "A wall that kept the sea out for a hundred years is rebuilt, and the town argues about who should pay for it."
IS_ARTICLE = "<meta property=og:type content=article>"
NEWS = f'<script type="application/ld+json">{json.dumps({"@type": "NewsArticle", "headline": "The wall"})}</script>'
LEADS = {
    "in a header": "<main><header><h1>The wall</h1><div class=intro><p>{lead}</p></div></header>"
    "<article>{body}</article></main>",
    "beside a byline": "<main><div class=hero><h1>The wall</h1><p>{lead}</p><span>Ann Example</span></div>"
    "<article class=story>{body}</article></main>",
}


@pytest.mark.parametrize("kind", LEADS)
def test_an_articles_lead_stays(kind):
    page = f"<title>The wall</title>{IS_ARTICLE}<body>{LEADS[kind].format(lead=LEAD, body=BODY)}"
    found = extract_fast(page)
    assert LEAD in found
    assert all(text in found for text in TEXT)


STATED = "The old wall that kept out the sea is rebuilt"


@pytest.mark.parametrize(
    ("stated", "lead"),
    [
        (STATED, STATED),
        # Cut off by the page's system, and escaped twice.
        (f"{LEAD[:-30]}...", LEAD),
        (LEAD.replace("and", "&amp;amp;"), LEAD.replace("and", "&amp;")),
    ],
)
@pytest.mark.parametrize("element", ["<p class=teaser>{}</p>", "<h2 class=subtitle>{}</h2>", "<ul><li>{}</li></ul>"])
def test_a_lead_that_the_page_says_of_itself_stays(stated, lead, element):
    described = f'<meta name=description content="{stated}">{IS_ARTICLE}{NEWS}'
    header = f"<header><h1>The wall</h1>{element.format(lead)}<span>Share</span></header>"
    page = f"<title>The wall</title>{described}<body><main>{header}<article>{BODY}</article></main>"
    found = extract_fast(page)
    assert lead.replace("&amp;", "&") in found
    assert all(text in found for text in TEXT)


@pytest.mark.parametrize("place", ["<h1>The wall</h1>{body}{lead}", "{lead}<h1>The wall</h1>{body}"])
def test_what_a_page_says_of_itself_elsewhere_is_no_lead(place):
    body, lead = f"<article>{BODY}</article>", f"<p>{LEAD}</p>"
    page = f"<title>The wall</title><meta name=description content='{LEAD}'><body>{place.format(body=body, lead=lead)}"
    markup = read_markup(page)
    assert stated_lead(markup, Running.of(markup)) is None


def test_a_caption_before_the_text_is_no_lead():
    caption = f"<div class=image-credit><p>{LEAD}</p></div>"
    page = f"<title>The wall</title>{IS_ARTICLE}<body><main><h1>The wall</h1>{caption}<article>{BODY}</article></main>"
    found = extract_fast(page)
    assert LEAD not in found
    assert all(text in found for text in TEXT)


def test_comments_longer_than_the_article_that_a_page_declares_are_left_out():
    post = paragraph("night trains", random.Random(1), 2)
    said = [paragraph("glaciers", random.Random(seed), 4) for seed in range(20)]
    thread = "".join(
        f"<li class=comment><div class=comment-body><b>reader{i} says:</b><p>{text}</p></div></li>"
        for i, text in enumerate(said)
    )
    page = f"""<title>Trains</title>{IS_ARTICLE}<body><main><article><h1>Trains</h1><div class=entry-content>
      <p>{post}</p></div></article><div id=comments><ul class=comment-list>{thread}</ul></div></main>"""
    found = extract_fast(page)
    assert post in found
    assert not any(text in found for text in said)


@pytest.mark.parametrize("name", ["hentry has-comments", "post comments-enabled"])
def test_a_name_that_says_that_an_article_has_comments_does_not_make_it_one(name):
    footer = f"<div><p>{paragraph('bread', random.Random(9), 2)}</p></div>"
    for title in ("<h1>The wall</h1>{}", "{}"):
        story = f'<div class="{name}">{title.format(BODY)}</div>'
        page = f"<title>The wall</title>{IS_ARTICLE}<body><main>{story}</main>{footer}"
        assert all(text in extract_fast(page) for text in TEXT)


def test_links_around_a_short_text_that_a_page_states_is_an_article_are_left_out():
    names = [f"The {word} that the town remembers best" for word in ("mill", "ferry", "inn", "tower", "pier")]
    cards = "".join(f"<li>{i}<h5><a href=/{i}>{names[i % 5]} in {1900 + i}</a></h5></li>" for i in range(20))
    page = f"""<title>The wall</title>{NEWS}<body><div class=content><section class=story><h1>The wall</h1>
      <div class=articleBody><p>{TEXT[0]}</p><p>{TEXT[1]}</p></div></section><ul class=linklist>{cards}</ul></div>"""
    found = extract_fast(page)
    assert TEXT[0] in found
    assert not any(name in found for name in names)


@pytest.mark.parametrize(
    "line", ["<div><a href=/{i}>{text}</a></div>", "<div><b>{i}</b><br><a href=/{i}>{text}</a></div>"]
)
def test_a_list_of_links_beside_the_one_text_of_a_page_without_data_is_left_out(line):
    harbour = "\u0412 \u043f\u043e\u0440\u0442\u0443 \u0433\u043e\u0440\u043e\u0434\u0430"
    harbour += " \u0441\u043d\u043e\u0432\u0430 \u0448\u0442\u043e\u0440\u043c"
    others = [f"{harbour}, {1900 + i} \u0433\u043e\u0434" for i in range(60)]
    teasers = "".join(line.format(i=i, text=other) for i, other in enumerate(others))
    name = "\u041f\u043e\u0440\u0442"
    text = [f"{part} {name} \u0437\u0430\u043a\u0440\u044b\u0442." for part in TEXT[:3]]
    story = f"<div><b>{name}</b>{''.join(f'<p>{part}</p>' for part in text)}</div>"
    found = extract_fast(f"<title>{name}</title><body><table><tr><td>{story}</td><td>{teasers}</td></tr></table>")
    assert all(part in found for part in text)
    assert not any(other in found for other in others)


def odds_elsewhere(body, likely):
    """What each block of ``body`` loses; ``likely`` gives the model's probability of a text."""
    markup = read_markup(f"<body>{body}")
    probabilities = np.asarray([likely(text) for text in markup.texts])
    odds = elsewhere_odds(markup, Running.of(markup), probabilities)
    return dict(zip(markup.texts, np.broadcast_to(odds, len(markup.texts)), strict=True))


def test_what_leads_elsewhere_beside_the_one_text_of_a_page():
    note = "Smith (1990). <a href=/smith>On walls and what they keep</a>, in a book."
    beside = "<div><p>Short</p><p><a href=/b>Outside</a></p></div>"
    links = [f"<p><a href=/{name}>{name}</a></p>" for name in ("Inside", "Again", "Source")]
    body = f"<div>{BODY}<p>{note}</p>{links[0]}{links[1]}<p>end</p>{links[2]}</div>{beside}"
    odds = odds_elsewhere(body, lambda text: 0.9 if text in TEXT else 0.5)
    smith = "Smith (1990). On walls and what they keep, in a book."
    assert [odds[text] for text in (*TEXT, smith, "end", "Source")] == [0] * (len(TEXT) + 3)
    assert odds["Outside"] <= odds["Inside"] < odds["Short"] < 0


@pytest.mark.parametrize(
    "likely", [lambda text: 0.9, lambda text: 0.4 if text in TEXT else 0.2], ids=["as likely", "no main text"]
)
def test_links_that_are_as_likely_as_the_text_are_a_lists_own(likely):
    body = f"<div>{BODY}</div><div><p><a href=/b>Outside</a></p></div>"
    assert set(odds_elsewhere(body, likely).values()) == {0}


def test_a_page_of_several_texts_has_no_one_text():
    more = "".join(
        f"<ul><li><div><p>{paragraph('bread', random.Random(seed), 3)}</p></div></li></ul>" for seed in range(9)
    )
    body = f"<div><p>{TEXT[0]}</p></div><div><p><a href=/b>Outside</a></p></div><div>{more}</div>"
    assert set(odds_elsewhere(body, lambda text: 0.9 if len(text) > 50 else 0.2).values()) == {0}


@pytest.mark.parametrize(
    "start", ["Read more:", "Lea tambi\u00e9n:", "\u00c0 lire aussi :", "Auch lesen:", "DON'T MISS:"]
)
def test_lines_that_send_readers_to_another_text_are_left_out(start):
    """Of a page so long that the model alone decides."""
    text = [paragraph("harbour", random.Random(seed), 2) for seed in range(70)]
    line = f"<p>{start} <a href=/mill>The mill that the town remembers</a></p>"
    body = "".join(f"<p>{part}</p>{line if number == 20 else ''}" for number, part in enumerate(text))
    page = f"<title>The wall</title>{NEWS}<body><article><h1>The wall</h1>{body}</article>"
    found = extract_fast(page)
    assert "mill that the town" not in found
    assert all(part in found for part in text)
    # A sentence that begins in the same way stays.
    sentence = f"Read more of what the <a href=/town>town</a> thinks: {TEXT[0]}"
    assert "Read more of what the" in extract_fast(page.replace(line, f"<p>{sentence}</p>"))


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (NEWS, True),
        ("<meta property='article:published_time' content='2024-05-04T10:00:00Z'>", True),
        ("<div itemscope itemtype='https://schema.org/BlogPosting'>", True),
        # Site builders write this on every page.
        (IS_ARTICLE, False),
        # Lists of articles.
        (NEWS * 8, False),
        ("<div itemscope itemtype='https://schema.org/BlogPosting'></div>" * 8, False),
        ('<script type=\'application/ld+json\'>{"@type": "ArticleList"}</script>', False),
        ("<meta property='article:published_timeline' content='1'>", False),
    ],
)
def test_what_states_that_a_page_is_an_article(head, expected):
    assert states_article(f"<html><head>{head}</head><body><p>{TEXT[0]}") is expected


def test_running_text_is_what_a_page_shows():
    """A description that repeats the whole article, and a hidden copy, are not where the text is."""
    whole = " ".join(TEXT)
    page = f"""<meta name=description content="{whole}"><body><div style="display: none"><div>{whole}</div>{BODY}</div>
      <div class=story><p>{TEXT[0]}</p><p>{TEXT[1]}</p></div>"""
    markup = read_markup(page)
    running = Running.of(markup)
    assert markup.attributes[running.best].strip() == "class=story"
    shown = [markup.texts[block] for block in np.flatnonzero(running.characters)]
    assert shown == TEXT[:2]
    # Where nothing else is, hidden text counts.
    hidden = read_markup(f"<body><div style='display: none' class=tab>{BODY}</div>")
    assert "tab" in hidden.attributes[Running.of(hidden).best]


def test_what_stands_beside_a_hidden_copy_is_left_out():
    """Also if the model takes all of it for main text; the page is so long that the model alone decides."""
    text = [paragraph("harbour", random.Random(seed), 2) for seed in range(40)]
    body = "".join(f"<p>{part}</p>" for part in text)
    copy = body.replace("<p>", "<p itemprop=text>")
    page = f"""<body><main><h1>The wall</h1><div class=post>{body}</div>
      <div style="display: none"><div>{copy}</div><p>2024-05-04T10:00:00+01:00</p><p>Wall, Sea, Town</p></div>
      <div style="display: none" class=tab><p>{LEAD}</p></div></main>"""
    markup = read_markup(page)
    keep = decide(markup, np.full(len(markup.texts), 0.95), PageWords.of(markup.texts).counts)
    assert [text for text, kept in zip(markup.texts, keep, strict=True) if kept] == ["The wall", *text, LEAD]
