"""Pages in Chinese and Japanese, whose characters stand in runs without spaces."""

from fastllm.data.clean.body import Running
from fastllm.data.clean.main_text import extract_fast
from fastllm.data.clean.markup import read_markup
from fastllm.data.clean.page_words import PageWords
from fastllm.data.clean.unspaced import in_words


def seen(*texts: str):
    markup = read_markup("".join(f"<p>{text}</p>" for text in texts))
    return markup, in_words("", markup)[1]


def test_two_characters_count_as_a_word():
    """So that a menu of English words does not outweigh them."""
    markup, found = seen("一二三四五六七八", "One two three", "あい x y")
    assert PageWords.of(found.texts).counts.tolist() == [4, 3, 3]
    # A word in Latin letters has five of them, and a space after it.
    assert [len(text) for text in found.texts] == [4 * 6 - 1, len("One two three"), 5 + 4]
    assert markup.texts[0] == "一二三四五六七八"


def test_a_menu_of_languages_does_not_change_a_page_in_english():
    markup, found = seen("日本語", "One two three four five")
    assert found is markup


def test_the_share_of_links_stays():
    markup = read_markup("<p><a href=/>一二三四五</a>六七八九十</p>")
    found = in_words("", markup)[1]
    assert (markup.linked, len(markup.texts[0])) == ([5], 10)
    # 14.5, rounded.
    assert (found.linked, len(found.texts[0])) == ([14], 29)


def test_the_page_itself_is_rewritten_with_its_title():
    page = "<title>一二三</title><p>一二三四"
    markup = read_markup(page)
    title, found = in_words(page, markup)
    assert "<title>一一一二二 三三三</title>" in title
    assert found.texts == ["一一一二二 三三三四四"]


def test_a_sentence_in_chinese_is_running_text():
    """It has a third of the characters of an English one."""
    markup, found = seen("港口的石墙今年重新修建。市政府支付了一半的费用。其余部分由渔民协会承担。")
    assert not Running.of(markup).characters.any()
    assert Running.of(found).characters.all()


def test_what_is_extracted_is_the_pages_own_text():
    text = "港口的石墙今年重新修建。市政府支付了一半的费用。其余部分由渔民协会承担。"
    assert (
        extract_fast(f"<title>石墙</title><body><h1>石墙</h1><p>{text}<p>{text[::-1]}")
        == f"石墙\n\n{text}\n\n{text[::-1]}"
    )
