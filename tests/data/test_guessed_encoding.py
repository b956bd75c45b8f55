# ruff: noqa: RUF001 - letters of many alphabets
"""Text whose encoding nothing names, or something names wrongly."""

import pytest
from extras import needed

from fastllm.data.clean import CleanConfig
from fastllm.data.clean.encodings import codec_of, decode_page
from fastllm.data.clean.guessed_encoding import guess
from fastllm.data.pipeline import prepare_text

SENTENCES = {
    "这条河从山上流下来，经过我们的村子，然后流到大海里去。": ["gb18030"],
    "這條河從山上流下來，經過我們的村子，然後流到大海裡去。": ["big5hkscs", "gb18030"],
    "この川は山から流れてきて、村を通り、やがて海に着きます。カヌーもあります。": ["cp932", "euc-jp", "iso2022-jp"],
    "이 강은 산에서 흘러내려 우리 마을을 지나 바다로 갑니다.": ["cp949"],
    "Эта река течёт с гор мимо нашей деревни и впадает в море.": ["cp1251", "koi8-r", "cp866", "iso-8859-5"],
    "Ця річка тече з гір повз наше село і впадає в море.": ["cp1251", "koi8-u"],
    "Řeka teče z hor kolem naší vesnice a vlévá se do moře, říká žák.": ["cp1250", "iso-8859-2"],
    "Rzeka płynie z gór koło naszej wsi i wpływa do morza, mówią że sześć dni.": ["cp1250", "iso-8859-2"],
    "Ez a folyó a hegyekből jön, és a falunk mellett folyik a tengerhez, ahol nőnek a fűzfák.": ["cp1250"],
    "Bu ırmak dağlardan gelir, köyümüzün yanından geçer ve sonunda denize ulaşır.": ["cp1254"],
    "Ο ποταμός κατεβαίνει από τα βουνά και φτάνει στη θάλασσα.": ["cp1253", "iso-8859-7"],
    "הנהר יורד מן ההרים, עובר ליד הכפר שלנו ומגיע אל הים.": ["cp1255"],
    "ينزل النهر من الجبال ويمر بقريتنا ثم يصل إلى البحر.": ["cp1256", "iso-8859-6"],
    "แม่น้ำสายนี้ไหลลงมาจากภูเขาผ่านหมู่บ้านของเราไปสู่ทะเล": ["cp874"],
    "Der Fluß fließt von den Bergen durch unser Dorf und mündet schließlich in die Nordsee.": ["cp1252"],
    "Cette rivière descend des montagnes, passe près du village et se jette à la mer l\u2019été.": ["cp1252"],
    "La montaña está lejos; ¿cuándo llegará el niño? \u2013 Mañana, señor.": ["cp1252"],
    "Áin rennur úr fjöllunum, fram hjá þorpinu okkar og út í sjó, það er víst.": ["cp1252"],
}
CASES = [(text, codec) for text, codecs in SENTENCES.items() for codec in codecs]


def page(text: str, head: str = "") -> str:
    return f"<html><head>{head}<title>x</title></head><body><p class=a>{text}</p><p>{text}</p></body></html>"


@pytest.mark.parametrize(("text", "codec"), CASES)
def test_letters_tell_an_encoding_that_nothing_names(text, codec):
    written = page(text)
    assert decode_page(written.encode(codec))[0] == written
    # Nobody's bytes are UTF-8 because a page says so.
    declared = page(text, "<meta charset=utf-8>")
    if codec != "iso2022-jp":
        assert decode_page(declared.encode(codec))[0] == declared


@pytest.mark.parametrize(("text", "codec"), [case for case in CASES if case[1] != "iso2022-jp"])
def test_a_server_that_declares_latin_1_for_all_pages_is_not_believed(text, codec):
    written = page(text * 4)
    assert decode_page(written.encode(codec), "iso-8859-1")[0] == written


@pytest.mark.parametrize(
    ("codec", "declared"),
    [("gb18030", "big5"), ("cp932", "euc-jp"), ("cp949", "shift_jis"), ("cp1250", "iso-8859-2")],
)
def test_letters_count_more_than_a_declaration_that_makes_no_text(codec, declared):
    written = page(next(text for text, codecs in SENTENCES.items() if codecs[0] == codec) * 2)
    assert decode_page(written.encode(codec), declared)[0] == written


@pytest.mark.parametrize(("text", "codec"), CASES)
def test_a_right_declaration_is_believed(text, codec):
    assert guess(page(text).encode(codec), codec) == codec
    assert guess(page(text).encode("iso-8859-3", "replace"), "iso-8859-3") == "iso-8859-3"


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("Ο ΠΟΤΑΜΟΣ ΚΑΤΕΒΑΙΝΕΙ ΑΠΟ ΤΑ ΒΟΥΝΑ", "cp1253"), ("РЕКА ТЕЧЁТ С ГОР МИМО НАШЕЙ ДЕРЕВНИ", "koi8-r"),
        ("龘靐齉爩", "gb18030"), ("嘅咗喺嚟", "big5hkscs"), ("ąę", "iso-8859-2"),
    ],
)  # fmt: skip
def test_a_declaration_that_makes_text_is_believed_whatever_the_letters(text, codec):
    for times in (1, 4, 50):
        assert guess(page(f"{text} " * times).encode(codec), codec) == codec


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("ﾆｭｰｽ ﾒｰﾙ ｹﾞｰﾑ ｵｰｸｼｮﾝ ﾗﾝｷﾝｸﾞ", "cp932"), ("ﾆｭｰｽ一覧へ ﾒｰﾙを送る ｹﾞｰﾑの攻略 ﾗﾝｷﾝｸﾞを見る", "cp932"),
        ("ﾆｭｰｽ一覧へ ﾒｰﾙを送る ｹﾞｰﾑの攻略 ﾗﾝｷﾝｸﾞを見る", "euc-jp"),
        ("שָׁלוֹם עֲלֵיכֶם מַלְאֲכֵי הַשָּׁרֵת", "cp1255"), ("السَّلامُ عَلَيْكُمْ وَرَحْمَةُ اللهِ", "cp1256"),
        ("РЕКА ТЕЧЁТ С ГОР МИМО НАШЕЙ ДЕРЕВНИ", "cp1251"), ("РЕКА ТЕЧЁТ С ГОР МИМО НАШЕЙ ДЕРЕВНИ", "cp866"),
    ],
)  # fmt: skip
def test_capitals_points_and_half_width_letters_are_letters(text, codec):
    for times in (1, 4, 20):
        for stated in (None, codec):
            assert guess(page(f"{text} " * times).encode(codec), stated) == codec


@pytest.mark.parametrize(
    "text",
    [
        "café", "© 2020 \u2013 “all”", "10 £ or 12 ¥, 3 m², 5°", "\u00a0" * 200, "¼ ½ ¾", "\u2014" * 60,
        "naïve Müller, García, François, Åse, Søren, José, Zoë", "GRÖSSE ÄRGER ÜBER ÉTÉ", "Acme® and Brand™ it’s",
        "â€™ Ã© â€œ", "50 µm ± 3 µm, 10 µs. " * 20, "1º Sol, 2º Mar, 3ª Lua; nº 4. " * 20, "´a´ ¬b ¦ c, ¬d " * 20,
    ],
)  # fmt: skip
def test_a_few_letters_and_signs_are_western(text):
    for stated in (None, "cp1252"):
        assert guess(page(text).encode("cp1252"), stated) == "cp1252"
    assert guess(b"") == "cp1252"


@pytest.mark.parametrize(
    ("label", "codec"),
    [("cp874", "cp874"), ("cp936", "gb18030"), ("MS936", "gb18030"), ("cp950", "big5hkscs"), ("win-1251", "cp1251"),
     ("windows-932", "cp932"), ("cp65001", "utf-8"), ("cp437", None), ("win", None)],
)  # fmt: skip
def test_numbers_of_code_pages_are_labels(label, codec):
    assert codec_of(label) == codec


def test_utf_16_without_a_mark_is_told_by_its_zeros(tmp_path):
    for codec in ("utf-16-le", "utf-16-be"):
        text = "A plain text without a mark or a tag, with caf\u00e9s.\n" * 3
        assert decode_page(text.encode(codec)) == (text, codec)
    assert decode_page(b"a\0b" * 40)[1] == "utf-8"
    needed("ftfy", "data")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(text.encode("utf-16-le"))
    report = prepare_text([tmp_path / "in"], tmp_path / "out", CleanConfig(rules=("none",)), workers=0)
    assert report["documents_kept"] == 1
