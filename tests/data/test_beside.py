"""What stands beside the main text goes, and what a page repeats, lists and lays out comes as it should."""

import random

import numpy as np
import pytest
from pages import HEADLINES, SECTIONS, paragraph

from fastllm.data.clean.article import caption_odds
from fastllm.data.clean.beside import landmark_odds
from fastllm.data.clean.body import Running
from fastllm.data.clean.main_text import decide, extract_fast, visible_text
from fastllm.data.clean.markup import read_markup

WALL = [paragraph("harbour", random.Random(seed), 2) for seed in range(3)]
PARAGRAPHS = "".join(f"<p>{text}</p>" for text in WALL)
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
    "a bar above the page": '<div class="announcement-bar"><h3>{0}</h3><p>{1}</p></div>',
    "an author's box": '<div class="author-bio"><h3>{0}</h3><p>{1}</p></div>',
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


@pytest.mark.parametrize("name", ["copyright", "are-there-copyright-notices", "on-newsletters-and-how-to-leave-them"])
def test_an_id_that_is_made_of_its_heading_names_no_landmark(name):
    """As documentation's sections have it: on a page of its own, and as a part of others."""
    title = name.replace("-", " ").capitalize()
    level = "h1" if name == "copyright" else "h2"
    notice = "This wall and its pictures are ours. Use them as you like."
    short = f"<body><div class=body><section id={name}><{level}>{title}<a href=#{name}>\u00b6</a></{level}><p>{notice}"
    assert notice in extract_fast(short)
    page = f"<body><main><h1>The wall</h1><p>{WALL[0]}</p><section id={name}><{level}>{title}</{level}><p>{notice}</p>"
    found = extract_fast(f"{page}</section><section><h2>Stones</h2><p>{WALL[1]}</p><p>{WALL[2]}</p></section></main>")
    assert notice in found
    assert title in found


@pytest.mark.parametrize("name", ["image-caption", "InlineImage-imageEmbedCaption", "photo_credit", "wp-caption-text"])
def test_captions_by_their_class_are_unlikely_unless_they_hold_the_text(name):
    caption = "The wall in its first winter, before the storms, as it looks from the old pier in the harbour."
    markup = read_markup(f"<body><main>{PARAGRAPHS}<div><img src=a.jpg><p class={name}>{caption}</p></div></main>")
    assert caption_odds(markup, Running.of(markup)).tolist() == [0, 0, 0, -2]
    slides = read_markup("".join(f"<li><div class={name}><p>{text}</p></div>" for text in WALL))
    assert caption_odds(slides, Running.of(slides)) == 0


def test_a_name_that_only_holds_the_word_is_no_caption():
    markup = read_markup(
        f"<body class=has-caption><main>{PARAGRAPHS}<div><p class=captioning>{WALL[0]}</p></div></main>"
    )
    assert not caption_odds(markup, Running.of(markup)).any()


def test_values_for_machines_in_hidden_elements_go_and_hidden_sentences_stay():
    markup = read_markup(
        f"<body><main>{PARAGRAPHS}</main><div hidden><div>2019-11-19T08:57:40</div><p>{WALL[0]} x.</p>"
    )
    odds = landmark_odds(markup, Running.of(markup))
    assert odds.tolist() == [0, 0, 0, -2.5, -1]


def test_links_in_a_list_with_other_items_are_no_table_of_contents():
    bugs = "".join(f"<li><a href=/bugs/{number}>{text}</a>" for number, text in enumerate(HEADLINES))
    # So long that rules for small pages have no say.
    texts = "".join(f"<p>Part {number}. {paragraph('harbour', random.Random(number), 2)}</p>" for number in range(60))
    for first, stays in (("Walls that were mended:", True), ("<a href=#walls>Walls</a>", False)):
        markup = read_markup(f"<body><main><ul><li>{first}<ul>{bugs}</ul></ul>{texts}")
        words = np.asarray([float(len(text.split())) for text in markup.texts])
        kept = decide(markup, np.full(len(words), 0.9), words)
        assert kept[: len(HEADLINES) + 1].tolist() == [stays] * (len(HEADLINES) + 1)


def test_a_table_of_data_stays_whole_with_its_caption():
    rows = "".join(f"<tr><td>{name}</td><td>{number} m</td></tr>" for number, name in enumerate(HEADLINES))
    table = f"<table><caption>Walls</caption><tr><th>Wall</th><th>Height</th></tr>{rows}</table>"
    # So long that rules for small pages have no say.
    texts = "".join(f"<p>Part {number}. {paragraph('harbour', random.Random(number), 2)}</p>" for number in range(60))
    markup = read_markup(f"<body><main>{table}{texts}")
    words = np.asarray([float(len(text.split())) for text in markup.texts])
    chances = np.full(len(words), 0.9)
    # The caption, the head and two rows.
    chances[[0, 1, 2, 5, 6, 9, 10]] = 0.1
    assert decide(markup, chances, words).all()


def test_choices_in_forms_are_beside_the_text():
    markup = read_markup(f"<body><main>{PARAGRAPHS}<form><select><option>Low<option>{WALL[0]}</select></form></main>")
    assert landmark_odds(markup, Running.of(markup)).tolist() == [0, 0, 0, -8, -8]


@pytest.mark.parametrize("text", ["Test", "<a href=/wall>Wall</a>", "<i>Foo</i>&lrm;", "<abbr>TLA</abbr> <b>xyz</b>"])
def test_a_page_of_a_few_words_has_them(text):
    assert extract_fast(f"<body>{text}</body>") == visible_text(text) != ""


def test_a_body_that_waits_for_its_script_is_shown():
    page = f"<body style='display: none'><main>{PARAGRAPHS}</main>"
    assert extract_fast(page) == visible_text(page) == "\n\n".join(WALL)


def test_an_abstract_in_an_aside_is_part_of_the_text():
    aside = '<aside class="{}"><p>Abstract</p><p>{}</p></aside>'
    page = f"<body><main><h1>The wall</h1>{aside}<p>{WALL[1]}<p>{WALL[2]}"
    assert WALL[0] in extract_fast(page.format("topic", WALL[0]))
    assert WALL[0] not in extract_fast(page.format("related-topic", WALL[0]))


@pytest.mark.parametrize(
    "label", ["Advertisement", "- Advertisement -", "Werbung", "ADVERTISEMENT - story continues below"]
)
def test_labels_of_advertisements_go_and_their_subject_stays(label):
    page = f"<body><main><h1>The wall</h1><p>{WALL[0]}</p><div>{label}</div><p>{WALL[1]}</p><p>{WALL[2]}</p></main>"
    assert extract_fast(page) == "\n\n".join(["The wall", *WALL])
    costs = "<table><tr><td>Stones</td><td>90</td></tr><tr><td>Advertising</td><td>10</td></tr></table>"
    page = f"<body><main><h1>Advertising</h1><p>{WALL[0]}</p>{costs}<p>{WALL[1]}</p><p>{WALL[2]}</p></main>"
    assert extract_fast(page) == "\n\n".join(
        ["Advertising", WALL[0], "Stones | 90\nAdvertising | 10", WALL[1], WALL[2]]
    )
