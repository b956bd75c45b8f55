"""The walk over a page's tags, what its blocks are, and the trees that judge them."""

import json
import math
import random
import time
from html import escape

import numpy as np
import pytest
from pages import article, page

from fastllm.data.clean.block_model import Trees, block_model
from fastllm.data.clean.features import features
from fastllm.data.clean.main_text import best_set, extract_fast, visible_text
from fastllm.data.clean.markup import read_markup
from fastllm.data.clean.page_words import PageWords, repeated
from fastllm.data.clean.streamed import in_place


def blocks(source):
    markup = read_markup(source, with_carried=False)
    return [(markup.tags[place], text) for place, text in zip(markup.places, markup.texts, strict=True)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("<p>one<p>two", [("p", "one"), ("p", "two")]),
        (
            "<ul><li>a<li>b<ul><li>c</ul><li>d</ul>e",
            [("li", "a"), ("li", "b"), ("li", "c"), ("li", "d"), ("body", "e")],
        ),
        ("<table><tr><td>a<td>b<tr><td>c</table>d", [("td", "a"), ("td", "b"), ("td", "c"), ("body", "d")]),
        ("<dl><dt>a<dd>b<dt>c</dl>", [("dt", "a"), ("dd", "b"), ("dt", "c")]),
        ("<div><table><td></div>x</table>y</div>z", [("td", "x"), ("div", "y"), ("body", "z")]),
        ("</div></p>a</span>b", [("body", "ab")]),
        ("<p>a <b>bold</b>er\n word &amp; &lt;tag&gt;", [("p", "a bolder word & <tag>")]),
        ("<p>a<br>b<br><br>c", [("p", "a\nb"), ("p", "c")]),
        ("<script>'<p>no'</script>a<style>b</style><!-- <p>c --><textarea><p>d</textarea>e", [("body", "ae")]),
        ("a<!-->b<!--->c<!-- x --!>d<!x>e<?y>f</ z>g", [("body", "abcdefg")]),
        ("<a title='x > y' href=z>a</a><p data-x=\"<p>\">b", [("body", "a"), ("p", "b")]),
        ("<P CLASS=X>a</P><DIV>b", [("p", "a"), ("div", "b")]),
        ("<span>Home</span><span>News</span>", [("body", "Home News")]),
        ("<b>re</b><i>peat</i>", [("body", "repeat")]),
        ("a<p>", [("body", "a")]),
        ("1 < 2 and <3", [("body", "1 < 2 and <3")]),
        ("<template><b>a<template>b</template><p>c</p><template/></template>d<template/>e", [("body", "de")]),
        ("<listing>a\n  b</listing>c", [("listing", "a\n  b"), ("body", "c")]),
        ("<p>a<XMP class=x><p>b &amp;</p>\n  c</xmp>d", [("p", "a"), ("pre", "<p>b &amp;</p>\n  c"), ("body", "d")]),
        ("a<script>'<xmp>'</script><!-- <xmp> --><svg/><p>b<xmp>c", [("body", "a"), ("p", "b"), ("pre", "c")]),
        ("<template><p>a</template>b<template shadowrootmode=open><p>c</template>", [("body", "b"), ("p", "c")]),
    ],
)
def test_blocks_are_those_that_a_browser_shows(source, expected):
    assert blocks(source) == expected


def test_preformatted_text_keeps_its_spaces_and_tabs():
    code = "def f(x):\n\treturn  x   # two\n\n\n    y  =  1"
    for source in (f"<pre>{code}</pre>", f"<pre><code><span>{code}</span></code></pre>"):
        assert blocks(source)[0][1] == code
    assert blocks("<pre><div>a  b</div><div>  c</div></pre>") == [("pre", "a  b\n  c")]
    assert blocks("<div style='white-space: pre-wrap'>a  b\n c</div>") == [("div", "a  b\n c")]
    text = extract_fast(page(article(1)).replace("</h1>", f"</h1><pre>{code}</pre>"))
    assert code in text


def test_tables_keep_rows_and_lists_keep_items():
    rows = "".join(f"<tr><td>row {i}</td><td><p>{i}</p></td><td>{i * i}</td></tr>" for i in range(3))
    items = "".join(f"<li><p>Item {i} is here.</p></li>" for i in range(3))
    text = visible_text(f"<p>Before.</p><table>{rows}</table><ul>{items}</ul><p>After.</p>")
    assert text == (
        "Before.\n\nrow 0 | 0 | 0\nrow 1 | 1 | 1\nrow 2 | 2 | 4\n\n- Item 0 is here.\n- Item 1 is here.\n"
        "- Item 2 is here.\n\nAfter."
    )


def test_a_title_is_kept_once():
    text = extract_fast(page(article(2), "On canals").replace("<p>", "<h1>On canals</h1><p>", 1))
    assert text.count("On canals") == 1


def test_posts_and_texts_that_a_page_carries_as_data_are_read():
    posts = [{"username": f"user{i}", "cooked": f"<p>{article(i, 1)}</p>"} for i in range(3)]
    stores = {"topic_7": json.dumps({"post_stream": {"posts": posts}})}
    source = f'<body><div id=main></div><div class="hidden" data-preloaded="{escape(json.dumps(stores))}"></div></body>'
    assert all(article(i, 1) in extract_fast(source) for i in range(3))
    data = json.dumps({"@graph": [{"@type": "NewsArticle", "headline": "News", "articleBody": article(4)}]})
    carried = extract_fast(f'<body><script type="application/ld+json">{data}</script><nav>Menu</nav></body>')
    assert carried.split()[-50:] == article(4).split()[-50:]
    # What the page shows already is not read twice.
    shown = extract_fast(f'<script type="application/ld+json">{data}</script>' + page(article(4)))
    assert shown.count(article(4).split("\n\n")[0]) == 1


@pytest.mark.parametrize("data", ["{", "[" * 5000, '{"@graph": [1, null, {"text": 5}]}', '"x"', "[" * 99 + "]" * 99])
def test_broken_data_is_passed_over(data):
    source = f'<script type="application/ld+json">{data}</script>{page(article(5))}'
    assert article(5).split("\n\n")[1] in extract_fast(source)
    assert article(5).split("\n\n")[1] in extract_fast(
        source.replace("<body>", f'<body><p data-preloaded="{escape(data)}">')
    )


@pytest.mark.parametrize(
    "piece",
    ["<script>", "<!--", '<a "', "<a x='", "<", "<a ", "</", "<svg/", "<a = ", "<template", "<br>", "a <br> \n",
     "<pre>a", "<option>x", "<meta name=description ", '<script type="application/ld+json">[', "<body ",
     "&#1;", "<li><a href=x>y</a>"],
)  # fmt: skip
def test_hostile_pages_take_linear_time(piece):
    def seconds(count):
        begin = time.thread_time()
        read_markup(piece * count)
        return time.thread_time() - begin

    few = max(seconds(10_000), 0.02)
    # Ten times the page may take ten times the time; with the square it would be a hundred.
    assert seconds(100_000) < 40 * few


def test_trees_say_what_walking_down_them_says():
    draw = np.random.default_rng(3)
    trees = Trees(
        draw.integers(0, 9, (20, 4)), draw.normal(size=(20, 4)).astype(np.float32),
        draw.normal(size=(20, 16)).astype(np.float32), 0.25,
    )  # fmt: skip
    rows = draw.normal(size=(2500, 9)).astype(np.float32)
    found = trees.probabilities(rows)
    for row, value in zip(rows[::500], found[::500], strict=True):
        total = 0.25
        for columns, borders, leaves in zip(trees.columns, trees.borders, trees.leaves, strict=True):
            total += leaves[sum(1 << level for level in range(4) if row[columns[level]] > borders[level])]
        assert value == pytest.approx(1 / (1 + np.exp(-total)), rel=1e-5)
    other = Trees(trees.columns[:5], trees.borders[:5], trees.leaves[:5], -0.5)
    odds = [np.log(p / (1 - p)) for p in (found, other.probabilities(rows))]
    both = Trees.mean([trees, other]).probabilities(rows)
    assert np.log(both / (1 - both)) == pytest.approx(sum(odds) / 2, abs=1e-4)


def test_the_model_that_ships_fits_the_features_and_survives_saving(tmp_path):
    source = page(article(6))
    markup = read_markup(source)
    model = block_model()
    words = PageWords.of(markup.texts)
    rows = features(source, markup, words, model.lexicon)
    assert np.isfinite(rows).all()
    assert model.first.columns.max() < rows.shape[1]
    model.save(tmp_path / "model.npz")
    again = type(model).load(tmp_path / "model.npz")
    assert np.array_equal(again.probabilities(source, markup, words), model.probabilities(source, markup, words))


def test_the_best_set_is_the_best_of_all_sets():
    draw = random.Random(4)
    for _ in range(10):
        probabilities = np.asarray([draw.random() for _ in range(8)])
        words = np.asarray([float(draw.randrange(1, 40)) for _ in range(8)])
        odds = np.log(probabilities / (1 - probabilities))
        # A page's common error: -3 to 3, normal with a standard deviation of 1.5.
        cases = [(math.exp(-(z**2) / 2), 1 / (1 + np.exp(-odds - 1.5 * z))) for z in (-2, -1, 0, 1, 2)]

        def expected(chosen, w=words, cases=cases):
            f1 = [2 * (p * w)[chosen].sum() / (w[chosen].sum() + (p * w).sum()) for _, p in cases]
            return np.average(f1, weights=[weight for weight, _ in cases])

        best = max(expected(np.asarray([(bits >> i) & 1 for i in range(8)], bool)) for bits in range(1, 256))
        # The likeliest blocks come first, which is best in each case alone and nearly so in the mean over all.
        assert expected(best_set(probabilities, words)) >= 0.999 * best


def test_words_of_blocks_are_numbered_and_runs_that_occur_again_are_found():
    words = PageWords.of(["One two three four.", "", "zero one TWO three", "x", "five six seven"])
    assert words.counts.tolist() == [4, 0, 4, 1, 3]
    assert words.shares(words.numbers == words.known["two"]).tolist() == [0.25, 0, 0.25, 0, 0]
    assert words.first_sums({"one": 1.5, "three": 1.0}).tolist() == [2.5, 0, 2.5, 0, 0]
    expected = [[0, 0.75, 0], [0, 0, 0], [0.75, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert repeated(words, "Here five six seven.").tolist() == expected
    assert repeated(PageWords.of(["a", "b c"]), "a").tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize(
    ("attributes", "hidden"),
    [
        ("style='display: none'", True), ("style=color:red;DISPLAY:none", True), ("hidden", True),
        ("style='--footer-display: none; --graph-display:none'", False), ("data-hidden=1", False),
    ],
)  # fmt: skip
def test_an_element_is_hidden_by_its_own_style(attributes, hidden):
    markup = read_markup(f"<div {attributes}><p>text</p></div>")
    assert markup.unshown[markup.places[0]] == hidden


def test_parts_of_a_page_that_come_late_are_read_where_they_belong():
    source = (
        '<body><main><p>first</p><template id="B:0"></template><p>third</p></main><footer>last</footer>'
        '<div hidden id="S:0"><p>second <template id="P:1"></template></p></div><script>$RC("B:0","S:0")</script>'
        '<div hidden id="S:1"><b>and more</b></div><script>x();$RS("S:1","P:1")</script>'
        '<div hidden id="S:2">lost</div><script>$RC("B:2","S:2")</script>'
    )
    markup = read_markup(source)
    assert markup.texts == ["first", "second and more", "third", "last", "lost"]
    assert not any(markup.unshown)
    spaced = source.replace("</div><script>", "</div>\n  <script>")
    assert read_markup(spaced).texts == markup.texts
    for piece in (
        '<div hidden id="S:0">',
        '<template id="B:0"></template>',
        "</div><script>$RC(",
        '<div hidden id="S:1">a</div><script>$RC(',
    ):
        begin = time.thread_time()
        assert len(in_place(piece * 20_000 + '<div hidden id="S:0">')) <= len(piece) * 20_000 + 100
        assert time.thread_time() - begin < 1
