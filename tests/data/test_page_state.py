"""Pages whose text a script makes of data."""

import json
import random
import time

import pytest
from pages import paragraph

from fastllm.data.clean.main_text import extract_fast
from fastllm.data.clean.markup import read_markup

WALL = [paragraph("harbour", random.Random(seed), 4) for seed in range(6)]
OTHER = [paragraph("glacier", random.Random(seed), 1) for seed in range(3)]
EXPECTED = "\n\n".join(["The wall", *WALL])
TEASERS = [{"title": "A glacier", "excerpt": text, "slug": f"/{number}"} for number, text in enumerate(OTHER)]


def spans(text):
    """``text`` as parts of a paragraph."""
    middle = len(text) // 2
    return [{"type": "span", "text": text[:middle], "marks": []}, {"type": "span", "text": text[middle:]}]


BODIES = {
    "markup": "".join(f"<p>{text}</p>" for text in WALL),
    "text": "\n\n".join(WALL),
    "blocks": [{"id": "ab12", "type": "paragraph", "data": {"text": text}} for text in WALL],
    "portable text": [{"_type": "block", "style": "normal", "children": spans(text)} for text in WALL],
}


def page(script):
    return (
        "<html><head><title>The wall</title></head><body><div id=__next><header><a href=/>Home</a></header></div>"
        f"<noscript>You need to enable JavaScript to run this app.</noscript>{script}</body></html>"
    )


@pytest.mark.parametrize("body", BODIES)
def test_text_that_a_page_has_as_data_alone_is_read(body):
    article = {"id": 7, "title": "The wall", "url": "https://example.org/wall", "content": BODIES[body]}
    props = {"props": {"pageProps": {"seo": {"description": OTHER[0] * 20}, "article": article, "related": TEASERS}}}
    found = extract_fast(page(f'<script id="__NEXT_DATA__" type="application/json">{json.dumps(props)}</script>'))
    assert found == EXPECTED


@pytest.mark.parametrize("assigned", ["window.__INITIAL_STATE__ = {};", "window.__NUXT_DATA__=JSON.parse({})"])
def test_data_that_a_script_assigns_is_read(assigned):
    data = json.dumps({"post": {"headline": "The wall", "body": BODIES["markup"]}})
    data = json.dumps(data) if "parse" in assigned else data
    assert extract_fast(page(f"<script>{assigned.replace('{}', data, 1)}; start()</script>")) == EXPECTED


def test_a_page_that_shows_its_text_is_read_as_it_is():
    shown = "".join(f"<p>{text}</p>" for text in OTHER * 2)
    data = json.dumps({"page": {"title": "The wall", "content": BODIES["markup"]}})
    texts = read_markup(f"<main>{shown}</main><script type=application/json>{data}</script>").texts
    assert texts == OTHER * 2


def test_items_of_a_list_and_parts_of_a_shop_are_no_article():
    items = [{"title": f"Wall {number}", "body": text} for number, text in enumerate(WALL)]
    parts = {"title": "Lamps", "guide": {"text": WALL[0] + WALL[1]}, "delivery": {"html": WALL[2] + WALL[3]}}
    for data in ({"list": items}, parts):
        source = page(f'<script id="__NEXT_DATA__" type="application/json">{json.dumps(data)}</script>')
        assert not any(text in " ".join(read_markup(source).texts) for text in WALL)


def test_settings_and_messages_are_no_text():
    messages = {f"label{number}": f"Please choose the number {number} of lamps" for number in range(99)}
    data = json.dumps({"locale": messages, "api": "https://example.org/" + "a" * 400, "flags": [True, None, 1.5]})
    assert extract_fast(page(f'<script type="application/json">{data}</script>')) == ""


@pytest.mark.parametrize(
    "piece",
    ['<script type="application/json">', '<script type="application/json">[', "__A_STATE__={", '__A_DATA="[',
     "__A_STATE__=JSON.parse(", "_" * 20, '<script id=__NEXT_DATA__>{"a":'],
)  # fmt: skip
def test_hostile_data_takes_linear_time(piece):
    def seconds(count):
        begin = time.thread_time()
        read_markup(piece * count)
        return time.thread_time() - begin

    few = max(seconds(1000), 0.01)
    assert seconds(10_000) < 40 * few
