# ruff: noqa: RUF001 - letters of many alphabets
"""The default quality rules on prose of many languages, and on what is no prose in any."""

import pytest

from fastllm.data.clean import Document, Rejection
from fastllm.data.clean.quality import RULES

# Two sentences about a river, its village and its mill, at least 18 words.
PROSE = {
    "pl": (
        "Rzeka płynie z gór i wpada do morza, które jest daleko. "
        "Nad rzeką stoi młyn, w którym nie ma już nikogo, bo ludzie odeszli."
    ),
    "cs": (
        "Řeka teče z hor a vlévá se do moře, které je daleko. "
        "Na břehu stojí mlýn, ve kterém už nikdo není, ale voda teče dál."
    ),
    "sv": (
        "Floden rinner från bergen och ut i havet, som ligger långt bort. "
        "Vid stranden står en kvarn där det inte bor någon."
    ),
    "da": (
        "Floden løber fra bjergene og ud i havet, som ligger langt væk. "
        "Ved bredden står en mølle, hvor der ikke bor nogen."
    ),
    "fi": (
        "Joki virtaa vuorilta mereen, joka on kaukana. "
        "Rannalla seisoo vanha mylly, jossa ei asu ketään, mutta vesi virtaa ja pyörä kääntyy."
    ),
    "hu": (
        "A folyó a hegyekből jön és a tengerbe ömlik, amely messze van. "
        "A parton egy malom áll, ahol már nem lakik senki."
    ),
    "ro": (
        "Râul coboară din munți și se varsă în marea care este departe. "
        "Pe mal stă o moară în care nu mai locuiește nimeni."
    ),
    "tr": (
        "Irmak dağlardan gelir ve çok uzakta olan denize dökülür. "
        "Kıyıda bir değirmen durur, içinde artık kimse oturmaz ama su akar ve çark döner."
    ),
    "hr": ("Rijeka teče s planina i ulijeva se u more koje je daleko. Na obali stoji mlin u kojem više nitko nije."),
    "lt": (
        "Upė teka iš kalnų ir įteka į jūrą, kuri yra toli. "
        "Ant kranto stovi malūnas, kuriame jau niekas ne gyvena, bet vanduo teka."
    ),
    "id": (
        "Sungai itu mengalir dari gunung dan menuju laut yang jauh. "
        "Di tepinya ada kincir tua yang tidak dihuni lagi untuk waktu lama."
    ),
    "vi": ("Dòng sông chảy từ núi và đổ ra biển ở rất xa. Trên bờ có một cối xay cũ của làng mà không còn người ở."),
    "sw": (
        "Mto unatoka milimani na kuingia katika bahari ambayo iko mbali. "
        "Kwa ukingo wa mto kuna kinu cha zamani ambacho ni tupu ya watu."
    ),
    "el": (
        "Ο ποταμός κατεβαίνει από τα βουνά και φτάνει στη θάλασσα, που είναι μακριά. "
        "Στην όχθη στέκεται ένας παλιός μύλος."
    ),
    "ru": (
        "Река течёт с гор и впадает в море, которое лежит далеко. "
        "На берегу стоит мельница, в которой давно никто не живёт."
    ),
}
CHINESE = (
    "黄河中游的水文站建在河边的山坡上，水文站的工作人员每天早晚各测一次水位。老李是水文站里年纪最大的工作人员，他说水文站"
    "刚建成的时候，黄河中游还没有公路，粮食要用船运来。每天早上，水文站的工作人员先看天气，再下到河边去测水位，然后把测到的"
    "水位写在本子上。有一年夏天黄河中游下了很大的雨，水位一夜之间涨了三米，水文站的工作人员整夜没有睡觉，每半个小时测一次水"
    "位，并且用电话把水位报告给下游的县城。下游的县城因为得到了水位的报告，提前把老人和孩子送到了高处。从那以后，县城里的人每"
    "年都给水文站的工作人员送来新鲜的水果。老李明年就要退休了，他希望年轻的工作人员能够继续每天测水位。"
)


@pytest.mark.parametrize("language", PROSE)
def test_prose_of_a_language_has_its_function_words(language):
    text = f"{PROSE[language]}\n\n" * 4
    assert isinstance(RULES["gopher_quality"](Document("a", text.strip(), "html")), Document)


def test_a_list_of_english_words_is_prose_of_no_language():
    words = "cheap watches sale buy online store shoes bags discount price free shipping brand new men women kids"
    found = RULES["gopher_quality"](Document("a", f"{words}\n" * 5, "html"))
    assert isinstance(found, Rejection)
    assert found.details["measure"] == "stop_words"


def test_names_that_recur_in_chinese_are_no_repetition_and_sentences_are():
    for rule in ("gopher_repetition", "gopher_quality", "fineweb"):
        assert isinstance(RULES[rule](Document("a", CHINESE, "html")), Document)
    again = CHINESE + "".join(CHINESE[:120] for _ in range(3))
    assert isinstance(RULES["gopher_repetition"](Document("a", again, "html")), Rejection)


@pytest.mark.parametrize("letters", ["ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"])
def test_an_index_from_a_to_z_is_prose_of_no_language(letters):
    index = " ".join(letters)
    names = "harbour lantern meadow orchard pebble quarry saddle thistle umbrella velvet willow yarrow"
    found = RULES["gopher_quality"](Document("a", f"{index}\n{names} {names} {names}\n" * 2, "html"))
    assert isinstance(found, Rejection)
    assert (found.details["measure"], found.details["value"]) == ("stop_words", 1)
