"""Wiki text: links whose titles have a colon, and name spaces in the dump's own language."""

import pytest
from extras import needed
from pages import dump

from fastllm.data.clean import CleanConfig, Document, clean
from fastllm.data.clean.text import tidy
from fastllm.data.clean.wikitext import extract_wikitext
from fastllm.data.sources import Limits, SourceEntry, read

needed("mwparserfromhell", "data")

SITEINFO = (
    "<siteinfo><sitename>Wikipedia</sitename><namespaces>"
    '<namespace key="-2" case="first-letter">Medium</namespace><namespace key="0" case="first-letter" />'
    '<namespace key="4" case="first-letter">Wikipedia</namespace>'
    '<namespace key="6" case="first-letter">Datei</namespace>'
    '<namespace key="14" case="first-letter">Kategorie Alt</namespace></namespaces></siteinfo>'
)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("[[Mission: Impossible]] came out.", "Mission: Impossible came out."),
        ("[[Star Trek: Voyager|Voyager]] is a series.", "Voyager is a series."),
        ("[[2001: A Space Odyssey]]", "2001: A Space Odyssey"),
        ("[[Wikipedia:Help|the help]] and [[Portal:Music]]", "the help and Portal:Music"),
        ("[[:Category:Music]] lists them.", "Category:Music lists them."),
        ("A[[File:V.jpg|thumb|A [[violin]] here]]B", "AB"),
        ("A[[ file : V.jpg]]B[[image:x.png]]C[[Category:Music]]", "ABC"),
        ("Text.\n[[de:Geige]]\n[[zh-min-nan:X]]", "Text."),
        ("one<br>two<BR />three", "one\ntwo\nthree"),
        ("用-{zh-hans:软件; zh-hant:軟體}-写-{原文}--{T|zh-cn:甲;zh-tw:乙}-", "用软件写原文"),
        ("[[Batman: Year One]]: a comic", "Batman: Year One: a comic"),
    ],
)
def test_links_with_a_colon_keep_their_words_and_files_go(source, text):
    assert tidy(extract_wikitext(source)) == text


def test_name_spaces_come_from_the_dump(tmp_path):
    source = (
        "Eins [[Datei:V.jpg|mini|Eine [[Geige]]]]zwei [[datei:W.jpg]]drei [[Kategorie_alt:Musik]][[Kunst: Teil 1]]."
    )
    content = dump([("Geige", "0", source)])
    head, pages = content.split("<page>", 1)
    path = tmp_path / "a.xml"
    path.write_text(f"{head}{SITEINFO}<page>{pages}")
    (raw,) = read(SourceEntry(str(path), path.name, "mediawiki", path.stat().st_size), Limits())
    document, _ = clean(Document(raw.id, raw.content.decode(), raw.kind, raw.metadata), CleanConfig(rules=("none",)))
    assert document.text == "Eins zwei drei Kunst: Teil 1."
    assert document.metadata == {"title": "Geige"}
