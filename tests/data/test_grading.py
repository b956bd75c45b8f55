"""Cleaning graded on Python's documentation as Debian packages it (python3.11-doc), against its sources.

Takes minutes: FASTLLM_TESTS=thorough runs it.
"""

from pathlib import Path

import pytest
from thorough import THOROUGH

from fastllm.bench import cleaning
from fastllm.bench.marked_pages import read_marked
from fastllm.data.clean import CleanConfig
from fastllm.data.pipeline import prepare_text

DOCUMENTATION = Path("/usr/share/doc/python3.11/html")
pytestmark = [
    THOROUGH,
    pytest.mark.skipif(not DOCUMENTATION.exists(), reason="apt-get install python3.11-doc"),
]


def test_cleaning_beats_stripping_tags_and_the_pages_own_main_division():
    pages = read_marked(DOCUMENTATION)
    assert len(pages) >= 400
    some = {f.__name__: f for f in (cleaning.strip_all_tags, cleaning.main_division, cleaning.whole_cleaning)}
    scores, _ = cleaning.grade(some, pages)
    means = {name: sum(score.f1 for score in found) / len(found) for name, found in scores.items()}
    ours = means.pop("whole_cleaning")
    assert ours > max(means.values()) + 0.02


def test_no_page_of_it_fails(tmp_path):
    report = prepare_text([DOCUMENTATION], tmp_path / "out", CleanConfig(), workers=2)
    assert report["documents_read"] > 1000
    assert not report["rejected"].keys() & {"failed", "crashed", "too_slow", "damaged", "unreadable"}
