"""Cleaning graded on Python's documentation as Debian packages it (python3.11-doc), against its sources.

Takes minutes: FASTLLM_TESTS=thorough runs it.
"""

from pathlib import Path

import pytest
from thorough import THOROUGH

from fastllm.bench import cleaning
from fastllm.data.clean import CleanConfig
from fastllm.data.pipeline import prepare_text

DOCUMENTATION = Path("/usr/share/doc/python3.11/html")
pytestmark = [
    THOROUGH,
    pytest.mark.skipif(not DOCUMENTATION.exists(), reason="apt-get install python3.11-doc"),
]


def test_cleaning_beats_stripping_tags_and_the_pages_own_main_division():
    documents = cleaning.pairs(DOCUMENTATION)
    assert len(documents) >= 400
    some = {f.__name__: f for f in (cleaning.strip_all_tags, cleaning.main_division, cleaning.whole_cleaning)}
    scores = {name: found.f1 for name, found in cleaning.grade(some, documents).items()}
    ours = scores.pop("whole_cleaning")
    assert ours > max(scores.values()) + 0.02


def test_no_page_of_it_fails(tmp_path):
    report = prepare_text([DOCUMENTATION], tmp_path / "out", CleanConfig(), workers=2)
    assert report["documents_read"] > 1000
    assert not report["rejected"].keys() & {"failed", "crashed", "too_slow", "damaged", "unreadable", "nesting"}
