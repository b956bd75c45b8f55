# ruff: noqa: RUF001 - letters of many alphabets
"""The default quality rules on prose of many languages, and on what is no prose in any."""

import pytest

from fastllm.data.clean import Document, Rejection
from fastllm.data.clean.quality import RULES
from fastllm.data.clean.words import words_of
from fastllm.data.sentences import sentence_starts

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
    "mt": (
        "Ix-xmara tinżel mill-muntanji u tasal sal-baħar, li huwa 'l bogħod minn dan il-post. "
        "Ħdejn ix-xmara hemm mitħna li fiha ma joqgħod ħadd."
    ),
    "jv": (
        "Kali iku mili saka gunung lan tekan segara kang adoh banget. "
        "Ing pinggir kali ana gilingan lawas sing wis ora ana wong manggon."
    ),
    "zu": (
        "Umfula ugeleza usuka ezintabeni futhi uya olwandle olukude. "
        "Eduze kwawo kunesigayo esidala kodwa akukho umuntu ohlala kuso ngoba sebemuka."
    ),
    "so": (
        "Webigu wuxuu ka yimaadaa buuraha oo wuxuu u socdaa badda fog. "
        "Agtiisa waa qol hore oo aan cid ku noolayn, ama dadku way tageen."
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

# A sentence about the same river, in scripts with marks of their own, and in two that have none.
MARKED = {
    "hy": "Գետը իջնում է լեռներից և հասնում է հեռավոր ծովին։",
    "am": "ወንዙ ከተራራው ይወርዳል እና ወደ ሩቅ ባሕር ይደርሳል።",
    "bn": "নদীটি পাহাড় থেকে নেমে আসে এবং দূরের সাগরে গিয়ে মেশে।",
    "ne": "नदी पहाडबाट बग्छ र टाढाको समुद्रमा पुग्छ।",
    "pa": "ਨਦੀ ਪਹਾੜਾਂ ਤੋਂ ਆਉਂਦੀ ਹੈ ਅਤੇ ਦੂਰ ਸਮੁੰਦਰ ਵਿੱਚ ਜਾਂਦੀ ਹੈ।",
    "ur": "دریا پہاڑوں سے آتا ہے اور دور سمندر میں گرتا ہے۔",
    "my": "မြစ်သည် တောင်မှ ဆင်း၍ ဝေးသော ပင်လယ်သို့ ရောက်သည်။",
    "km": "ទន្លេហូរចុះពីភ្នំ ហើយហូរទៅសមុទ្រដ៏ឆ្ងាយ។",
    "bo": "ཆུ་བོ་རི་ནས་བབས་ཏེ་རྒྱ་མཚོ་ཐག་རིང་པོར་འགྲོ།",
    "ja": "「川は山から下りて、遠い海へ流れていく」",
    "th": "แม่น้ำไหลลงมาจากภูเขาและไหลไปสู่ทะเลที่อยู่ไกล",
    "lo": "ແມ່ນ້ຳໄຫຼລົງມາຈາກພູເຂົາແລະໄຫຼໄປສູ່ທະເລທີ່ຢູ່ໄກ",
}
THAI = (
    "สถานีวัดระดับน้ำตั้งอยู่บนเนินเขาริมแม่น้ำ เจ้าหน้าที่ของสถานีวัดระดับน้ำวันละสองครั้ง ลุงสมเป็นเจ้าหน้าที่ที่อายุมากที่สุด เขาเล่าว่า"
    "เมื่อสร้างสถานีเสร็จใหม่ ๆ ยังไม่มีถนน อาหารต้องขนมาทางเรือ ทุกเช้าเจ้าหน้าที่ของสถานีดูท้องฟ้าก่อน แล้วจึงลงไปวัดระดับน้ำ "
    "จากนั้นก็จดระดับน้ำลงในสมุด มีอยู่ปีหนึ่งฝนตกหนักมาก ระดับน้ำสูงขึ้นสามเมตรในคืนเดียว เจ้าหน้าที่ของสถานีไม่ได้นอนทั้งคืน "
    "พวกเขาวัดระดับน้ำทุกครึ่งชั่วโมง และโทรศัพท์แจ้งระดับน้ำให้เมืองที่อยู่ทางใต้ ชาวเมืองจึงพาเด็กและคนแก่ขึ้นไปอยู่บนที่สูงได้ทันเวลา "
    "ตั้งแต่นั้นมาชาวเมืองก็นำผลไม้สดมาให้เจ้าหน้าที่ของสถานีทุกปี ปีหน้าลุงสมจะเกษียณแล้ว เขาหวังว่าคนรุ่นใหม่จะวัดระดับน้ำต่อไปทุกวัน"
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


@pytest.mark.parametrize("language", MARKED)
def test_sentences_end_as_their_script_ends_them(language):
    text = "\n".join(f"{number} {MARKED[language]}" for number in range(9))
    assert isinstance(RULES["fineweb"](Document("a", text, "html")), Document)


@pytest.mark.parametrize("language", ["hy", "am", "bn", "ne", "pa", "ur", "my", "km", "bo"])
def test_a_sentence_begins_after_the_mark_of_its_script(language):
    sentence = MARKED[language]
    assert sentence_starts(f"{sentence} {sentence}") == [0, len(sentence) + 1]


@pytest.mark.parametrize("rule", ["gopher_repetition", "gopher_quality", "fineweb"])
def test_prose_in_thai_passes(rule):
    """A word has several characters, so that runs of a few repeat as words do."""
    assert isinstance(RULES[rule](Document("a", THAI, "html")), Document)


def test_marks_belong_to_the_character_before_them_and_marks_between_words_to_none():
    assert words_of("น้ำที่นี่").words == ("น้", "ำ", "ที่", "นี่")
    assert words_of("ወንዙ፡ከተራራው፡ይወርዳል").words == ("ወንዙ", "ከተራራው", "ይወርዳል")


@pytest.mark.parametrize(("text", "count"), [("a b c", 1), ("水文站", 2), ("สถานี", 4), ("ទន្លេ", 4), ("水 a b c", 1)])
def test_how_many_characters_are_as_much_as_a_word(text, count):
    assert words_of(text).to_a_word == count


def test_lines_of_a_dialogue_in_japanese_are_not_short():
    """A character is as much as three Latin letters; a line in English of so many characters is short."""
    spoken = "\n".join(f"{i}{MARKED['ja']}" for i in range(9))
    assert isinstance(RULES["fineweb"](Document("a", spoken, "html")), Document)
    names = RULES["fineweb"](Document("a", "\n".join(f"Item number {i} of a list." for i in range(9)), "html"))
    assert isinstance(names, Rejection)
    assert names.details["measure"] == "short_lines"
