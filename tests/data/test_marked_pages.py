"""The grader of main text: what it reads, and that its scores are what they say."""

import io
import json
import tarfile

import pytest
from pages import article, page

from fastllm.bench.cleaning import Score, grade, interval, report
from fastllm.bench.marked_pages import MarkedPage, read_marked, words

TRUTH = [{"id": f"{i:02}", "type": "article" if i else "forum", "main_content": article(i)} for i in range(3)]


def test_a_folder_an_archive_and_sources_read_alike(tmp_path):
    folder = tmp_path / "set"
    (folder / "html").mkdir(parents=True)
    (folder / "truth.jsonl").write_text("\n".join(map(json.dumps, TRUTH)))
    for line in TRUTH:
        (folder / "html" / f"{line['id']}.html").write_text(page(line["main_content"]))
    found = read_marked(folder)
    assert [(p.id, p.type, p.text) for p in found] == [(t["id"], t["type"], t["main_content"]) for t in TRUTH]
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "pages.tar.xz", "w:xz") as archive:
        for path in sorted(folder.rglob("*.*")):
            member = tarfile.TarInfo(str(path.relative_to(folder)))
            member.size = path.stat().st_size
            archive.addfile(member, io.BytesIO(path.read_bytes()))
    assert read_marked(packed) == read_marked(packed / "pages.tar.xz") == found
    sphinx = tmp_path / "sphinx"
    (sphinx / "_sources" / "a").mkdir(parents=True)
    (sphinx / "a").mkdir()
    (sphinx / "_sources" / "a" / "b.rst.txt").write_text("source")
    (sphinx / "a" / "b.html").write_text("<p>page")
    assert read_marked(sphinx) == [MarkedPage("a/b.html", "sphinx", "<p>page", "source")]
    with pytest.raises(FileNotFoundError, match="expected truth"):
        read_marked(tmp_path / "packed" / "..")


def test_scores_are_of_words_as_often_as_they_occur():
    score = Score.of("x", words("a b b c"), words("b B b d"))
    assert (score.precision, score.recall, score.f1) == (0.5, 0.5, 0.5)
    assert Score.of("x", words(""), words("")).f1 == 1
    assert Score.of("x", words("a"), words("")).f1 == Score.of("x", words(""), words("a")).f1 == 0


def test_a_report_has_a_row_for_each_extractor_and_a_column_for_each_type():
    pages = [MarkedPage(t["id"], t["type"], page(t["main_content"]), t["main_content"]) for t in TRUTH]
    scores, speeds = grade(
        {"all of it": lambda html: article(0) + article(1) + article(2), "none": lambda html: ""}, pages
    )
    table = report(scores, speeds).splitlines()
    assert table[0].split(" | ")[5:7] == ["article", "forum"]
    assert [line.split(" | ")[0] for line in table[2:]] == ["| all of it", "| none"]
    assert table[3].split(" | ")[1:4] == ["0.000"] * 3
    low, high = interval([0.0, 1.0] * 50)
    assert 0.35 < low < 0.45 < 0.55 < high < 0.65


def test_a_site_is_what_a_page_names_as_its_own():
    def site(html):
        return MarkedPage("7", "x", html, "").site

    assert site('<link rel="canonical" href="https://www.news.example.co.uk/a">') == "example.co.uk"
    assert site("<meta property=og:url content=http://blog.example.org/x>") == "example.org"
    assert site("<p>") == "7"
