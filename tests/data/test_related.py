"""What follows a heading that announces other texts."""

import random

import numpy as np
import pytest
from pages import paragraph

from fastllm.data.clean.body import Running
from fastllm.data.clean.markup import read_markup
from fastllm.data.clean.related import related_odds
from fastllm.data.clean.unspaced import in_words

TEXT = [paragraph("harbour", random.Random(seed), 3) for seed in range(4)]
BODY = "".join(f"<p>{text}</p>" for text in TEXT)
ITEMS = "".join(f"<li>{name}</li>" for name in ("A wall of sand", "Boats in winter", "Who pays?"))


def left_out(body: str, likely: float = 0.9) -> list[str]:
    """The blocks that lose; all are taken for main text with the probability ``likely``."""
    _, markup = in_words(body, read_markup(body))
    odds = related_odds(markup, Running.of(markup), np.full(len(markup.texts), likely))
    assert set(odds.tolist()) <= {0.0, -4.0}
    return [text for text, lost in zip(markup.texts, odds.tolist(), strict=True) if lost]


@pytest.mark.parametrize(
    "heading",
    ["You may also like", "RELATED STORIES:", "Das könnte Sie auch interessieren", "Читайте также:", "관련기사",
     "Sur le même sujet", "Tin liên quan",
     # Capitals whose lower case by Python is not the list's, and a typographer's apostrophe.
     "İlgili Haberler", "İLGİLİ YAZILAR", "ΔΙΑΒΑΣΤΕ ΕΠΙΣΗΣ", "Editor\u2019s Picks"],
)  # fmt: skip
@pytest.mark.parametrize(
    "section",
    ["<div><h3>{heading}</h3><ul>{items}</ul></div>", "<h3>{heading}</h3><ul>{items}</ul>",
     "<div>{heading}</div><ul>{items}</ul>", "{heading}<ul>{items}</ul>"],
)  # fmt: skip
def test_the_section_after_the_text_is_left_out(heading, section):
    after = section.format(heading=heading, items=ITEMS)
    found = left_out(f"<body><div>{BODY}{after}<p>Notes of the author</div></body>")
    assert found[:4] == [heading, "A wall of sand", "Boats in winter", "Who pays?"]
    # An h3 stands over all that follows; what has no such mark stands over one element.
    assert found[4:] == (["Notes of the author"] if section.startswith("<h3>") else [])


@pytest.mark.parametrize("heading", ["相关阅读", "為您推薦", "【関連記事】"])
def test_headings_in_chinese_and_japanese(heading):
    text = "港口的石墙今年重新修建。市政府支付了一半的费用。其余部分由渔民协会承担。" * 3
    found = left_out(f"<body><div><p>{text}<p>{text}</div><div><h3>{heading}</h3><ul>{ITEMS}</ul></div>")
    assert found[1:] == ["A wall of sand", "Boats in winter", "Who pays?"]


def test_the_text_after_a_box_inside_it_stays():
    box = f"<div><b>Read also</b><ul>{ITEMS}</ul></div>"
    found = left_out(f"<body><div>{BODY}{box}{BODY}</div></body>")
    assert found == ["Read also", "A wall of sand", "Boats in winter", "Who pays?"]
    found = left_out(f"<body><div>{BODY}<h3>Related</h3><ul>{ITEMS}</ul><section>{BODY * 2}</section></div></body>")
    assert found == ["Related", "A wall of sand", "Boats in winter", "Who pays?"]


@pytest.mark.parametrize(
    "body",
    [
        # A sentence, a link in a sentence, and a heading before the text.
        f"<div>{BODY}</div><h3>Related work and what became of it</h3><ul>{ITEMS}</ul>",
        f"<h3>Latest news</h3><ul>{ITEMS}</ul><div>{BODY}</div>",
        # Without a text of its own a page is such a list.
        f"<h3>Latest news</h3><ul>{ITEMS}</ul>",
    ],
)
def test_other_headings_and_lists_stay(body):
    assert left_out(f"<body>{body}</body>") == []


def test_a_page_of_several_texts_or_of_an_unlikely_one_keeps_its_lists():
    texts = f"<section><div><div>{BODY}</div></div></section>" * 3
    assert left_out(f"<body>{texts}<div><h3>Latest news</h3><ul>{ITEMS}</ul></div></body>") == []
    assert left_out(f"<body><div>{BODY}</div><h3>Latest news</h3><ul>{ITEMS}</ul></body>", 0.4) == []
