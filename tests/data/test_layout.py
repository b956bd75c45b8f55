"""Code, tables, lists and formulas as pages lay them out."""

import random
import time
from html import escape

import pytest
from pages import paragraph

from fastllm.data.clean.main_text import extract_fast, visible_text
from fastllm.data.clean.markup import read_markup

LINES = ["def hold(wall):", "    if wall:", "", "\treturn  wall", "    return None"]
CODE = "\n".join(LINES)


def shown(*parts):
    """``parts`` with a copy for each line of code of those that have a place for its number or its text."""
    copies = ("".join(part.format(n, escape(line)) for n, line in enumerate(LINES, 1)) for part in parts)
    return "".join(part if "{" not in part else copy for part, copy in zip(parts, copies, strict=True))


# As GitHub, gists and highlighters show code, and a page that names nothing.
SHOWN = {
    "blob": shown(
        "<table class='highlight tab-size'>",
        '<tr><td id=L{0} class="blob-num js-line-number" data-line-number={0}></td>'
        '<td class="blob-code blob-code-inner js-file-line">{1}</td></tr>',
        "</table>",
    ),
    "gist": shown("<table><tbody>", "<tr><td class=blob-num>{0}</td><td class='blob-code'>{1}</td></tr>", "</table>"),
    "Crayon": shown(
        "<div class=crayon-main><table class=crayon-table><tr><td class='crayon-nums'><div class=crayon-nums-content>",
        "<div class=crayon-num>{0}</div>", "</div></td><td class=crayon-code><div class='crayon-pre'>",
        '<div class="crayon-line">{1}</div>', "</div></td></tr></table></div>",
    ),
    "SyntaxHighlighter": shown(
        "<div class='syntaxhighlighter py'><table><tr><td class='gutter'>", "<div class='line'>{0}</div>",
        "</td><td class='code'><div class=container>", "<div class='line'>{1}</div>", "</div></td></tr></table></div>",
    ),
    "highlight.js": shown(
        "<pre><code><table class='hljs-ln'>",
        '<tr><td class="hljs-ln-line hljs-ln-numbers" data-line-number={0}><div class=hljs-ln-n>{0}</div></td>'
        '<td class="hljs-ln-line hljs-ln-code">{1}</td></tr>',
        "</table></code></pre>",
    ),
    "Doxygen": shown(
        '<div class="fragment">', '<div class="line"><a name="l{0}"></a><span class="lineno">   {0}</span>{1}</div>',
        "</div>",
    ),
    "Prism": shown("<div class='prism-code'>", "<div class=token-line><span class=token>{1}</span></div>", "</div>"),
    "CodeMirror": shown(
        "<div class='CodeMirror-code'>",
        "<div><div><div class='CodeMirror-linenumber'>{0}</div></div><pre class=' CodeMirror-line '>{1}</pre></div>",
        "</div>",
    ),
    "numbers in the text": shown("<pre>", '<span class="ln">{0} </span>{1}\n', "</pre>"),
    "no names": shown("<table>", "<tr><td>{0}</td><td>{1}</td></tr>", "</table>"),
}  # fmt: skip
# Where a line without text is a row of its own, or a line of the source.
WITH_EMPTY_LINES = ("blob", "gist", "numbers in the text", "no names")
WALL = [paragraph("harbour", random.Random(seed), 3) for seed in range(4)]


def between(inner):
    """What is made of ``inner`` in the middle of an article."""
    text = extract_fast(
        f"<title>Wall</title><body><main><article><h1>Wall</h1><p>{WALL[0]}</p><p>{WALL[1]}</p>{inner}<p>{WALL[2]}</p>"
        f"<p>{WALL[3]}</p></article></main>"
    )
    assert text.startswith(f"Wall\n\n{WALL[0]}\n\n{WALL[1]}\n\n")
    assert text.endswith(f"\n\n{WALL[2]}\n\n{WALL[3]}")
    return text[len(WALL[0]) + len(WALL[1]) + 10 : -len(WALL[2]) - len(WALL[3]) - 4]


def without_empty_lines(text):
    return "\n".join(line.rstrip() for line in text.split("\n") if line.strip())


@pytest.mark.parametrize("kind", SHOWN)
def test_code_keeps_its_lines_and_indentation(kind):
    found = between(SHOWN[kind])
    if kind in WITH_EMPTY_LINES:
        assert found == CODE
    else:
        assert without_empty_lines(found) == without_empty_lines(CODE)


def test_numbered_rows_of_data_are_no_code():
    table = "".join(f"<tr>\n  <td>{number}</td>\n  <td>Wall {number}</td>\n</tr>" for number in range(1, 5))
    assert between(f"<table>{table}</table>") == "\n".join(f"{number} | Wall {number}" for number in range(1, 5))


@pytest.mark.parametrize(
    ("element", "expected"),
    [
        ('<code style="white-space:pre">{}</code>', CODE),
        ('<div><code style="white-space: pre-wrap;">{}</code></div>', CODE),
        ('<div style="color: red; white-space: pre">{}</div>', CODE),
        ('<div style="white-space:pre"><div>hold()</div><div>    return  1</div></div>', "hold()\n    return  1"),
        ('<code style="display: block; white-space: break-spaces">{}</code>', CODE),
        ('<p style="white-space-collapse: preserve">{}</p>', CODE),
        ('<p style="white-space: pre-line">one\n  two  three\nfour</p>', "one\ntwo three\nfour"),
        ('<pre style="white-space: normal">one\n  two</pre>', "one two"),
        ('<div style="white-space: pre-wrap"><p>one  two</p><p>three</p></div>', "one  two\n\nthree"),
        ("<p>Call <code style='white-space: pre'>a(\n  &quot;b&quot;)</code> now</p>", 'Call a(\n  "b") now'),
    ],
)  # fmt: skip
def test_white_space_stays_where_a_style_says_so(element, expected):
    assert visible_text(f"<body>{element.format(escape(CODE))}") == expected


def test_empty_cells_keep_the_columns():
    table = (
        "<tr><th></th><th>Mon</th><td> </td><th>Tue</th></tr><tr><td>8:00</td><td></td><td></td><td>Talk</td></tr>"
        "<tr><td>9:00</td><td>Walk</td><td></td><td></td></tr><tr><td>10:00</td></tr>"
    )
    # The third column is empty everywhere.
    assert between(f"<table>{table}</table>") == "| Mon | Tue\n8:00 |  | Talk\n9:00 | Walk\n10:00"


def test_cells_that_take_rows_and_columns_keep_the_columns():
    table = (
        "<tr><th>Day</th><th>Time</th><th>Who</th></tr><tr><td rowspan=2>Mon</td><td>8:00</td><td>Ann</td></tr>"
        "<tr><td>9:00</td><td>Bob</td></tr><tr><td colspan='2'>All week</td><td>Eve</td></tr>"
    )
    expected = "Day | Time | Who\nMon | 8:00 | Ann\n| 9:00 | Bob\nAll week |  | Eve"
    assert between(f"<table>{table}</table>") == expected


def test_a_row_without_cells_is_read():
    assert visible_text("<table><tr>a<td>b</td></tr><tr><td>c<td>d</table>") == "a b\nc | d"


TEX = r"E = mc^{2} &lt; \frac{a}{b}"
SHOWN_TEX = "$E = mc^{2} < \\frac{a}{b}$"
MATHS = {
    "an annotation": (
        f"<math><semantics><mrow><mi>E</mi></mrow><annotation encoding='application/x-tex'>{TEX}</annotation>"
        "</semantics></math>",
        SHOWN_TEX,
    ),
    "an alternative text": (f'<math alttext="{{\\displaystyle {TEX}}}"><mi>E</mi></math>', SHOWN_TEX),
    "KaTeX": (
        f"<span class=katex><span class=katex-mathml><math><semantics><mi>E</mi><annotation encoding='x-tex'>"
        f"{TEX}</annotation></semantics></math></span><span class=katex-html aria-hidden=true><span class=base>E</span>"
        "<span>mc2</span></span></span>",
        SHOWN_TEX,
    ),
    "KaTeX without MathML": (
        "<span class=katex><span class=katex-html aria-hidden=true><span class=base>E</span><span>=mc2</span></span>"
        "</span>",
        "E=mc2",
    ),
    "a wiki": (
        f'<span><span style="display: none;"><math alttext="{TEX}"><mi>E</mi></math></span><img alt="{TEX}"></span>',
        SHOWN_TEX,
    ),
    "MathJax": (f"<span class=MathJax_Preview>E</span><script type='math/tex'>{TEX}</script>", SHOWN_TEX),
    "an image": (f'<img src=a.png alt="{TEX}" class="latex">', SHOWN_TEX),
    "characters": (
        "<math><mi>p</mi><mo>=</mo><mfrac><mrow><mi>r</mi><mo>+</mo><mn>1</mn></mrow><msup><mi>h</mi><mn>2</mn></msup>"
        "</mfrac><mo>&le;</mo><msqrt><mi>x</mi></msqrt></math>",
        "p = (r+1)/(h^2) \u2264 \u221ax",
    ),
}


@pytest.mark.parametrize("kind", MATHS)
def test_formulas_are_read(kind):
    source, expected = MATHS[kind]
    assert visible_text(f"<p>The load is {source} at depth.</p>") == f"The load is {expected} at depth."


def test_lists_inside_items_are_indented():
    inner = "<ul><li>granite<ol><li>red</li></ol></li><li>slate<br>split</li></ul>"
    source = f"<ul><li>Stone{inner}and more of it</li><li>Wood<ul><li>oak</li></ul></li></ul>"
    expected = "- Stone\n  - granite\n    - red\n  - slate\n  split\nand more of it\n- Wood\n  - oak"
    assert visible_text(source) == expected
    # Items with headings are parts of a page.
    assert visible_text("<ul><li><h2>Wall</h2><ul><li>one<li>two</ul></ul>") == "- Wall\n- one\n- two"


def test_a_title_before_a_long_table_of_contents_stays():
    contents = "".join(f"<li><a href=#{number}>Part {number} of the wall</a></li>" for number in range(30))
    parts = "".join(
        f"<h2 id={number}>Part {number}</h2><p>{paragraph('wall', random.Random(number), 4)}" for number in range(9)
    )
    found = extract_fast(f"<title>The wall</title><body><main><h1>The wall</h1><ul>{contents}</ul>{parts}</main>")
    assert found.startswith("The wall\n\n")
    assert "Part 20" not in found


@pytest.mark.parametrize(
    "piece",
    ["<tr><td class=blob-code>a", "<table><tr><td> a", "<math>", "<math alttext='", "<td rowspan=99 colspan=99>a<tr>",
     "<span class=katex-html>", "<span hidden>", "<img>",
     "<code style='white-space:pre'>a\n", "<li>a<ul>", "<script type=math/tex>"],
)  # fmt: skip
def test_hostile_layout_takes_linear_time(piece):
    def seconds(count):
        begin = time.thread_time()
        visible_text(piece * count)
        return time.thread_time() - begin

    # The less of two: a collection of garbage may fall into one.
    few, many = (min(seconds(count) for _ in range(2)) for count in (1000, 10_000))
    assert many < 40 * max(few, 0.01)


def test_marks_of_white_space_are_never_a_pages_own():
    markup = read_markup("<p>a\x03\x04b &#3;c&#1;</p><pre>\x03d</pre>")
    assert markup.texts == ["ab c", "d"]


def test_names_and_times_beside_each_other_stand_apart():
    source = (
        "<p><a href=/u><span>ann</span></a><span class=when><time>4 May</time></span><span>12</span></p><p>x<b>y</b>z"
    )
    assert read_markup(source).texts == ["ann 4 May 12", "xyz"]


@pytest.mark.parametrize("name", ["quote no-group", "starlight-aside starlight-aside--note", "admonition warning"])
def test_a_quotation_and_a_note_in_an_aside_are_part_of_the_text(name):
    said = paragraph("bread", random.Random(5), 2)
    assert said in between(f'<aside class="{name}"><blockquote><p>{said}</p></blockquote></aside>')
    assert said not in between(f'<aside class="pullquote"><blockquote><p>{said}</p></blockquote></aside>')
