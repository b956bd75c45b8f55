"""Text that streams is the text that decodes, whatever the tokenizer's decoder."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers.normalizers import Prepend, Replace, Sequence

from fastllm.data import Tokenizer
from fastllm.data.tokenizer import END_OF_TEXT, KINDS, SPECIAL_TOKENS

SCRIPTS = (
    "The quick brown fox doesn't jump.", "Der Käfer läuft über die Straße.", "Žluťoučký kůň úpěl ďábelské ódy.",
    "Быстрая коричневая лиса.", "\u0397 γρήγορη καφέ αλεπού.", "השועל החום המהיר", "الثعلب البني السريع",
    "तेज़ भूरी लोमड़ी",
    "দ্রুত বাদামী শিয়াল", "வேகமான பழுப்பு நரி", "వేగవంతమైన నక్క", "ವೇಗದ ಕಂದು ನರಿ", "വേഗതയേറിയ കുറുക്കൻ", "สุนัขจิ้งจอกสีน้ำตาล",
    "ໝາຈອກສີນ້ຳຕານ", "လျင်မြန်သော မြေခွေး", "ሰላም ለዓለም", "სწრაფი ყავისფერი მელა", "Արագ շագանակագույն աղվես",
    "敏捷的棕色狐狸。", "素早い茶色の狐。カタカナ", "빠른 갈색 여우", "🦊👩‍👩‍👧 \U0001d51e\U0001d51f 𓀀",
    "a  b\t\n c \u00a0d\u2028e\x85", "\ufffd ##x ▁y <0x41> <s>",
)  # fmt: skip
SEEN = [SCRIPTS[0], SCRIPTS[1], SCRIPTS[20] * 2, SCRIPTS[5]]
TEXTS = st.lists(
    st.sampled_from(SCRIPTS).flatmap(lambda text: st.integers(0, len(text)).map(lambda cut: text[cut:]))
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    max_size=4,
).map("".join)  # fmt: skip


def own(kind):
    return Tokenizer.train(SEEN, 420, kind, special_tokens=SPECIAL_TOKENS["all"])


def other(model, decoder, pre_tokenizer=None, normalizer=None):
    inner = tokenizers.Tokenizer(model)
    inner.decoder, inner.pre_tokenizer, inner.normalizer = decoder, pre_tokenizer, normalizer
    inner.add_special_tokens([END_OF_TEXT])
    inner.add_tokens([AddedToken("<tool>", special=False)])
    return Tokenizer(inner.to_str())


def llama2():
    """SentencePiece's BPE as Llama 2 has it: spaces as U+2581, one before the text, bytes for what is unknown."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ abcdefghijklmnopqrstuvwxyzäüß.,'", "▁t", "th"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    model = models.BPE(vocabulary, [("▁", "t"), ("t", "h")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return other(model, decoder, normalizer=Sequence([Prepend("▁"), Replace(" ", "▁")]))


def metaspace(prepend, byte_fallback):
    """A unigram model as T5 and XLM-R have it."""
    pieces = ["<unk>", "▁", "▁the", "▁▁", *"abcdefghijklmnopqrstuvwxyz日本狐", *(f"<0x{b:02X}>" for b in range(256))]
    model = models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, byte_fallback)
    decoder = decoders.Metaspace("▁", prepend)
    if byte_fallback:
        decoder = decoders.Sequence([decoders.ByteFallback(), decoder])
    return other(model, decoder, pre_tokenizers.Metaspace("▁", prepend))


def words_with_ends():
    """The first BPE, which marks the end of a word (GPT-1)."""
    vocabulary = {p: i for i, p in enumerate(["<unk>", *"abcdefghij", *(f"{c}</w>" for c in "abcdefghij"), "</w>"])}
    model = models.BPE(vocabulary, [], unk_token="<unk>", end_of_word_suffix="</w>")
    return other(model, decoders.BPEDecoder("</w>"), pre_tokenizers.WhitespaceSplit())


TOKENIZERS = {
    **{kind: lambda kind=kind: own(kind) for kind in KINDS}, "llama2": llama2, "ends": words_with_ends,
    **{f"metaspace-{p}-{b}": lambda p=p, b=b: metaspace(p, b) for p in ("always", "never") for b in (False, True)},
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_streams_is_what_decodes(name):
    tokenizer = TOKENIZERS[name]()

    def check(ids):
        pieces = list(tokenizer.stream(iter(ids)))
        assert "".join(pieces) == tokenizer.decode(ids)
        assert all(pieces)

    @settings(max_examples=60, deadline=None)
    @given(TEXTS)
    def text(text):
        check([tokenizer.end_of_text, *tokenizer.encode(text)])

    # What a model draws need not be any text's tokens, nor whole characters.
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size), max_size=12))
    def tokens(ids):
        check(ids)

    text()
    tokens()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_continues_a_text_streams_as_it_decodes(name):
    tokenizer = TOKENIZERS[name]()

    @settings(max_examples=40, deadline=None)
    @given(TEXTS, TEXTS)
    def check(prompt, text):
        after, ids = tokenizer.encode(prompt), tokenizer.encode(text)
        whole = tokenizer.decode([*after, *ids])
        # With bytes at the prompt's end a continuation can change what the prompt decodes to.
        if whole.startswith(tokenizer.decode(after)):
            assert tokenizer.decode(after) + "".join(tokenizer.stream(iter(ids), after=after)) == whole

    check()
    if name in ("word", "wordpiece", "metaspace-always-False"):
        fox = tokenizer.encode("fox")
        assert "".join(tokenizer.stream(fox, after=fox)) == " fox"


def test_characters_come_when_they_are_complete_and_not_later():
    tokenizer = own("bpe")
    ids = tokenizer.encode("ab" + "\U0001f98a" + "ü狐")
    seen, pieces = [], []
    stream = tokenizer.stream(seen.append(i) or i for i in ids)
    for piece in stream:
        pieces.append((piece, len(seen)))
    ends = [len(tokenizer.encode("ab" + "\U0001f98a" + "ü狐"[:n])) for n in range(3)]
    # The fox's four bytes are four tokens: nothing is given out before the last of them.
    assert ("\U0001f98a", ends[0]) in pieces
    assert "".join(piece for piece, _ in pieces) == "ab\U0001f98aü狐"
    assert not any("\ufffd" in piece for piece, _ in pieces)


def test_a_long_stream_decodes_each_token_a_few_times(monkeypatch):
    tokenizer = own("bpe")
    ids = tokenizer.encode("素早い茶色の狐。" * 200)
    decoded = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    assert "".join(tokenizer.stream(ids)) == "素早い茶色の狐。" * 200
    assert sum(decoded) < 20 * len(ids)
