"""The pure functions on documents: extraction, Unicode, quality rules, personal data, MinHash."""

import random
import time

import numpy as np
import pytest
from extras import needed
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import TOPICS, article, page

from fastllm.data.clean import CleanConfig, Document, Rejection, clean
from fastllm.data.clean.encodings import decode_page
from fastllm.data.clean.html import EXTRACTORS
from fastllm.data.clean.main_text import extract_fast, visible_text
from fastllm.data.clean.minhash import BANDS, ROWS, SIZE, band_keys, exact_key, signature
from fastllm.data.clean.pii import mask
from fastllm.data.clean.quality import RULES
from fastllm.data.clean.text import repair, tidy
from fastllm.data.clean.wikitext import extract_wikitext
from fastllm.data.clean.words import repeated_share, top_share, words_of

TEXT = article(1)


@pytest.mark.parametrize("main", [True, False], ids=["landmark", "none"])
def test_the_main_text_comes_out_whole_and_alone(main):
    assert extract_fast(page(TEXT, "On violins", main)) == f"On violins\n\n{TEXT}"


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_every_extractor_keeps_the_text_and_only_all_keeps_the_menu(extractor):
    if extractor in ("trafilatura", "baseline"):
        needed("trafilatura", "trafilatura")
    text = EXTRACTORS[extractor](page(TEXT))
    assert all(part in " ".join(text.split()) for part in TEXT.split("\n\n"))
    assert ("Chapter 3" in text) == (extractor == "all")
    assert "tracked" not in text
    assert "color" not in text


def test_code_tables_lists_and_breaks_keep_their_shape():
    source = (
        "<main><h2>Loops</h2><p>A loop <em>re</em>peats<br>things.</p><pre>for x in y:\n    <span>print</span>(x)\n"
        "</pre><ul><li>one thing</li><li>another <a href=x>thing</a></li></ul><table><tr><th>name</th><th>size</th>"
        "</tr><tr><td>a</td><td>1</td></tr></table><p hidden>unseen</p><p>"
        + "A sentence that makes this the main part of the page. " * 4
        + "</p></main>"
    )
    text = extract_fast(source)
    assert text.startswith(
        "Loops\n\nA loop repeats\nthings.\n\nfor x in y:\n    print(x)\n\n- one thing\n- another thing\n\n"
        "name | size\na | 1\n\nA sentence"
    )
    assert "unseen" not in text


def test_menus_go_and_single_links_stay():
    links = "".join(f"<li><a href={i}>Entry number {i}</a></li>" for i in range(5))
    source = (
        f"<main><p>{TEXT}</p><ul>{links}</ul><p>See <a href=x>the other page</a>.</p><p><a href=y>Source</a></p></main>"
    )
    text = extract_fast(source)
    assert "Entry" not in text
    assert text.endswith("See the other page.\n\nSource")


def test_a_page_without_text_is_empty():
    for source in ("", "   ", "<html></html>", "<body><nav>Menu</nav></body>", "<main></main>", "\x00\x01"):
        assert extract_fast(source) == ""
        assert visible_text(source) in ("", "Menu")


@pytest.mark.parametrize(
    "tag", ["div", "b", "span", "x-y", "font", "table", "table><td", "ul><li", "pre", "a href=x", "p"]
)
def test_nesting_costs_no_more_than_its_length(tag):
    begin = time.thread_time()
    text = extract_fast(f"<{tag}>" * 100_000 + f"<p>{TEXT}</p>" + f"</{tag.split('>')[-1].split()[0]}>" * 100_000)
    assert text.removeprefix("- ").split() == TEXT.split()
    # Ten times what it takes here; a parser whose time grows with the square takes minutes.
    assert time.thread_time() - begin < 20


def test_deep_text_is_kept_and_unclosed_tags_are_not_deep():
    assert extract_fast("<div>" * 5000 + TEXT + "</div>" * 5000) == " ".join(TEXT.split())
    # As sqlite.org has it: anchors that nobody closes.
    parts = "".join(
        f"<a name='p{i}'><p>Paragraph {i} tells how a SELECT works in plain words.</p>" for i in range(4000)
    )
    assert extract_fast(f"<body>{parts}</body>").count("works in plain words") > 3950
    # Many elements are not deep ones.
    assert visible_text("<p>x<br>y<li>z" * 20_000).count("z") == 20_000


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["<p>", "</p>", "<div class=nav>", "</div>", "<main>", "<a href=#>", "</a>", "<pre>", "</pre>", "<li>",
             "<table>", "<td>", "text ", "\x1e\x01", "<h1>", "<article hidden>", "<!--", "-->", "<script>", "&amp;",
             "<br>", "\n", "<svg><p>", "<template>", "<p class=nav><p>", "<ul><li><ul>", "</main>", "<a><a><p>"]
        ),
        max_size=40,
    ).map("".join)
)  # fmt: skip
def test_no_page_breaks_the_extractors(source):
    for text in (extract_fast(source), visible_text(source)):
        assert not set(text) & set(map(chr, [*range(9), *range(14, 32)]))


@pytest.mark.parametrize(
    ("content", "declared", "text", "encoding"),
    [
        ("naïve 日本".encode(), None, "naïve 日本", "utf-8"),
        (b"\xef\xbb\xbfa", None, "a", "utf-8"),
        ("é".encode("utf-16-le").join([b"\xff\xfe", b""]), None, "é", "utf-16-le"),
        ("<meta charset=shift_jis>日本".encode("shift_jis"), None, "<meta charset=shift_jis>日本", "cp932"),
        ("Привет".encode("koi8-r"), "koi8-r", "Привет", "koi8-r"),
        ("Grüße".encode("latin-1"), "iso-8859-1", "Grüße", "cp1252"),
        ("“Grüße”".encode("cp1252"), None, "“Grüße”", "cp1252"),
        ("Grüße".encode("latin-1"), "no-such-encoding", "Grüße", "cp1252"),
        ("Grüße".encode("latin-1"), "base64", "Grüße", "cp1252"),
    ],
)
def test_pages_are_read_in_their_encoding(content, declared, text, encoding):
    assert decode_page(content, declared) == (text, encoding)


def test_utf_8_with_a_broken_byte_stays_utf_8():
    content = ("日本語のページ。" * 20).encode()
    text, encoding = decode_page(content[:31] + b"\xff" + content[31:])
    assert encoding == "utf-8"
    assert text.count("日本語") >= 19
    assert decode_page(content[:-1])[0].startswith("日本語")


def test_mojibake_and_escapes_are_repaired_and_ligatures_left():
    needed("ftfy", "data")
    assert repair("schÃ¶n \x1b[31mred\x1b[0m &amp; ﬁne") == "schön red & ﬁne"
    assert repair("a &amp; b", entities=False) == "a &amp; b"
    assert repair("e\u0301") == "é"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_tidy_text_has_no_control_codes_and_is_tidy_already(text):
    result = tidy(text)
    assert tidy(result) == result
    assert result == result.strip()
    assert "\n\n\n" not in result
    assert not any(c < " " and c not in "\n\t" for c in result)
    result.encode()


def test_indentation_is_kept():
    assert tidy("def f():\r\n    return  1\t \n\n\n\n  x\u00a0y\ufeff\u200b") == "def f():\n    return  1\n\n  x y"
    assert tidy("  a\n   b", keep_indentation=False) == "a\nb"


@pytest.mark.parametrize(
    "text",
    [
        # England's flag, a family, a heart in colour, a key, Persian and Malayalam joiners, and a form of a character.
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "\U0001f468\u200d\U0001f467",
        "\u2764\ufe0f", "1\ufe0f\u20e3", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0d28\u0d4d\u200d", "\u845b\U000e0100",
    ],
)  # fmt: skip
def test_what_characters_are_joined_by_stays(text):
    assert tidy(repair(f"a {text} b")) == f"a {text} b"
    assert text in extract_fast(f"<body><p>a {text} b</p></body>")


@pytest.mark.parametrize("text", ["a\u061cb", "a\U000e0067b", "a\u202bb\u202c", "a\u00adb", "\U000e007fa\u2066b"])
def test_marks_of_direction_tags_alone_and_soft_hyphens_go(text):
    assert tidy(text) == "ab"


def test_good_text_passes_every_rule():
    document = Document("x", TEXT + "\n\nIt ends with a line that has \u201cquotes\u201d.")
    for rule in RULES.values():
        assert rule(document) is document or rule(document).text == document.text


@pytest.mark.parametrize(
    ("rule", "text", "measure"),
    [
        ("gopher_quality", "Too short to say much of anything.", "words"),
        ("gopher_quality", "# the and " * 40, "symbols_per_word"),
        ("gopher_quality", "\n".join(f"- the {w} of and" for w in TOPICS), "bullet_lines"),
        ("gopher_quality", "\n".join(f"the {w} and then..." for w in TOPICS * 2), None),
        ("gopher_quality", "12 345 6 the 78 and 9 " * 20, "words_with_a_letter"),
        (
            "gopher_quality",
            " ".join(f"antidisestablishmentarianism{w} the and" for w in TOPICS * 2),
            "mean_word_length",
        ),
        ("gopher_quality", "lorem ipsum dolor sit amet consectetur " * 20, "stop_words"),
        ("gopher_repetition", "A line that comes again.\n" * 9 + TEXT, "repeated_lines"),
        ("gopher_repetition", ("buy now " * 40) + TEXT[:200], "top_2_words"),
        ("gopher_repetition", TEXT + " " + TEXT, None),
        ("fineweb", "\n".join(f"a {w} with no end" for w in TOPICS), "lines_with_end_mark"),
        ("fineweb", "\n".join(f"Short {w}." for w in TOPICS), "short_lines"),
        ("c4", TEXT + "\nlorem ipsum dolor", "contains"),
        ("c4", TEXT + " { }", "contains"),
        ("c4", "One sentence. Two sentences.", "sentences"),
    ],
)
def test_each_rule_says_what_it_measured(rule, text, measure):
    result = RULES[rule](Document("x", text))
    assert isinstance(result, Rejection)
    assert result.rule == rule
    assert result.excerpt == text[:2000]
    if measure:
        assert result.details["measure"] == measure


POEM = [
    "the tide went out below the wall", "the gulls came in above the quay", "the lamps were lit along the mall",
    "the boats were waiting for the sea", "the night was long and cold and slow", "the bell was heard from far away",
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        # Gopher bounds hash signs and ellipses each by itself.
        ("gopher_quality", "# the gulls and the boats went out to the sea... " * 9 + "and home again."),
        # Lines of code that differ in their indentation alone.
        ("fineweb", TEXT + "\n" + "\n".join(" " * i + "return the values of that column." for i in range(40))),
        # C4 counts the sentences of each line, and looks for braces where it keeps the line.
        ("c4", "\n".join(POEM)),
        ("c4", f"{TEXT}\nfunction() {{ javascript here }}"),
        ("c4", f"{TEXT}\n{{ }}"),
    ],
)
def test_no_rule_is_stricter_than_it_was_published(rule, text):
    assert isinstance(RULES[rule](Document("x", text)), Document)


def test_c4_takes_lines_out():
    result = RULES["c4"](Document("x", f"{TEXT}\nPlease enable JavaScript.\nWe use cookies.\nThe end[12] came[edit]."))
    assert result.text == f"{TEXT}\nThe end came."


def test_a_language_without_spaces_is_no_reason_to_reject():
    text = "。\n".join(f"{i}番目の文はとても短いですが、それでも意味があります" for i in range(30)) + "。"
    assert RULES["gopher_quality"](Document("x", text)).text == text


def test_personal_data_is_masked_and_what_only_looks_like_it_is_not():
    text, counts = mask(
        "Mail jo.doe+x@mail.example.net or call +49 30 1234567. Card 4111 1111 1111 1111, not 4111 1111 1111 1112. "
        "IBAN DE89 3704 0044 0532 0130 00, from 8.8.8.8 and 2001:4860:4860::8888, not 192.168.0.1, 10.0.0.1 or "
        "1.2.3.4.5; version 3.11.2, 12:30:45, a@b, __init__@decorator."
    )
    assert counts == {"email": 1, "phone": 1, "card": 1, "iban": 1, "ip_address": 2}
    assert text == (
        "Mail email@example.com or call +00 000 0000. Card 0000 0000 0000 0000, not 4111 1111 1111 1112. "
        "IBAN XX00 0000 0000 0000, from 192.0.2.1 and 2001:db8::1, not 192.168.0.1, 10.0.0.1 or 1.2.3.4.5; "
        "version 3.11.2, 12:30:45, a@b, __init__@decorator."
    )
    assert mask(text) == (text, {})


@pytest.mark.parametrize(
    "text", ["a" * 200_000, "1." * 100_000, "a@" * 100_000, "+1 " * 70_000, "AB12 " * 40_000, "a:" * 99_999]
)
def test_masking_takes_linear_time(text):
    began = time.process_time()
    mask(text)
    # 0.02 to 0.06 s on a core of an AMD EPYC; a pattern that goes back over its text takes minutes.
    assert time.process_time() - began < 3


def test_clean_goes_from_a_page_to_text_and_from_any_failure_to_a_rejection():
    needed("ftfy", "data")
    document, masked = clean(
        Document("x", page(TEXT + "\n\nWrite to me@mail.example.net about the café.")[:], "html"),
        CleanConfig(mask_pii=True),
    )
    assert document.text.endswith("Write to email@example.com about the café.")
    assert masked == {"email": 1}
    assert clean(Document("x", "<p>", "html"), CleanConfig())[0].rule == "empty"
    assert clean(Document("x", "<div>" * 9999, "html"), CleanConfig())[0].rule == "empty"
    with pytest.raises(ValueError, match=r"rules: expected some of .*; got 'gopher'"):
        CleanConfig(rules=("gopher",))


def test_wikitext_loses_its_markup():
    needed("mwparserfromhell", "data")
    source = (
        "{{Infobox|a={{b|c}}}}'''Violins''' are [[string instrument|strings]] in [[Italy]].<ref>{{cite|x}}</ref>\n"
        "{| class=x\n! a\n|-\n| {| nested |} b\n|}\n[[File:V.jpg|thumb|A [[violin]] here]]\n== History ==\n"
        "* one ''item''\n<!-- note -->[[Category:Music]]__TOC__ [http://x.org a link]"
    )
    assert tidy(extract_wikitext(source)) == ("Violins are strings in Italy.\n\nHistory\n- one item\na link")


# Words and MinHash


def test_repeated_runs_are_counted_as_gopher_does():
    words = words_of("a b c d a b c e")
    assert repeated_share(words, 3) == 3 / 8
    assert top_share(words, 2) == 2 * 2 / 8
    assert repeated_share(words, 9) == top_share(words, 9) == 0
    assert top_share(words_of("a b c d"), 2) == 0
    # "la la" occurs three times in these four words, which are half of the characters.
    assert top_share(words_of("la la la la abcdefgh"), 2) == 0.5


def test_shares_agree_with_a_plain_count():
    draw = random.Random(5)
    words = words_of(" ".join(draw.choice(TOPICS[:4]) for _ in range(200)))
    for n in (2, 3, 5):
        seen, covered = set(), set()
        for i in range(len(words.words) - n + 1):
            gram = words.words[i : i + n]
            if gram in seen:
                covered |= set(range(i, i + n))
            seen.add(gram)
        expected = sum(len(words.words[i]) for i in covered) / sum(map(len, words.words))
        assert repeated_share(words, n) == pytest.approx(expected)


def test_equal_minhash_values_estimate_the_share_of_common_runs():
    draw = random.Random(1)
    base = [f"word{draw.randrange(10**6)}" for _ in range(2000)]
    for changed in (0, 20, 60, 150):
        other = list(base)
        for i in range(changed):
            other[i * (2000 // max(1, changed))] = f"new{i}"
        runs = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (base, other)]
        jaccard = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        a, b = signature(" ".join(base)), signature(" ".join(other))
        # Four standard deviations of a mean of 112 draws.
        assert (
            abs(float((a == b).mean()) - jaccard)
            < 4 * (0.25 / SIZE) ** 0.5 * 2 * (jaccard * (1 - jaccard)) ** 0.5 + 1e-9
        )


def test_signatures_do_not_depend_on_case_order_of_blocks_or_length():
    assert np.array_equal(signature("A b c d e f"), signature("a B c d e f"))
    assert signature("").shape == signature("one").shape == (SIZE,)
    assert not np.array_equal(signature("one two"), signature("one three"))
    long = " ".join(article(i) for i in range(60))
    assert signature(long).dtype == np.uint32
    assert len(exact_key(long)) == 16


def test_bands_are_equal_only_where_their_rows_are():
    values = np.stack([signature(TEXT)] * 2)
    values[1, 3] ^= 1
    keys = band_keys(values)
    assert keys.shape == (2, BANDS)
    assert (keys[0] == keys[1]).tolist() == [band != 3 // ROWS for band in range(BANDS)]
    values = np.random.default_rng(0).integers(0, 2, (500, SIZE)).astype(np.uint32)
    for band, keys in enumerate(band_keys(values).T):
        rows = np.unique(values[:, band * ROWS : (band + 1) * ROWS], axis=0)
        assert len(np.unique(keys)) == len(rows) > 100
