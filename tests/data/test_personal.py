"""Personal data: graded on lines of this project's own making, and in linear time."""

import time
from collections import Counter

import pytest

from fastllm.bench import personal_data
from fastllm.data.clean.pii import mask


def test_there_are_enough_lines_of_both_kinds_and_they_are_graded():
    lines = personal_data.read_lines()
    grades = personal_data.grade(lines)
    assert len(lines) >= 300
    assert sum("{" not in line for line in lines) >= 150
    precision, recall = grades.row(sorted(grades.there))
    assert precision >= 0.98, grades.wrong
    assert recall >= 0.98, grades.wrong


def test_the_grader_sees_what_is_missed_and_what_is_hidden_too_much(monkeypatch):
    lines = ["call {phone:+49 30 901820} now", "nothing here"]
    monkeypatch.setattr(personal_data, "mask", lambda text: (text, Counter()))
    assert personal_data.grade(lines).row(["phone"]) == (0.0, 0.0)
    monkeypatch.setattr(personal_data, "mask", lambda text: ("X", Counter(phone=1)))
    assert personal_data.grade(lines).row(["phone"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "The offset is +1.23456789.", "+1 234 567 bytes", "+33 000 000 km", "wrote 1234567890 bytes", "+1,234,567",
        "4294967296 B", "+52.520008, +13.404954", "1234 5678 9012 3456", "€ 1 234 567 890", "2024-01-15 10:30:00",
        "part no 800-555-0199-A",
    ],
)  # fmt: skip
def test_numbers_that_are_no_telephone_numbers_stay(text):
    assert mask(text) == (text, {})


@pytest.mark.parametrize("digits", ["4111111111111111", "378282246310005", "30569309025904", "6011000990139424"])
@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (8, 8), (6, 13), (4, 12), (19,)])
@pytest.mark.parametrize("sign", [" ", "-", "\u00a0", " - ", "\u2013", "\u2009", "/", "_"])
def test_cards_are_masked_in_all_groupings(digits, sizes, sign):
    groups, rest = [], digits
    for size in sizes:
        if rest:
            groups.append(rest[:size])
            rest = rest[size:]
    number = sign.join([*groups, *([rest] if rest else [])])
    assert mask(f"card {number}.") == ("card 0000 0000 0000 0000.", {"card": 1})


def test_cards_in_pairs_and_single_digits_are_masked_where_they_stand_alone():
    for size in (1, 2):
        number = " ".join("4111111111111111"[i : i + size] for i in range(0, 16, size))
        assert mask(f"card {number}, thanks") == ("card 0000 0000 0000 0000, thanks", {"card": 1})
        assert mask(f"row {number} 7 12") == (f"row {number} 7 12", {})


@pytest.mark.parametrize("number", ["(202)\u00a0555\u20110143", "202\u2013555\u20130143", "\uff0b81 3-1234-5678"])
def test_telephone_numbers_with_typographers_signs_are_masked(number):
    assert mask(f"ring {number}.")[1] == {"phone": 1}


@pytest.mark.parametrize(
    "piece", ["1 ", "12 ", "4111 ", "+49 ", "(212) ", "tel ", "tel: 0", "00 1 ", "4-", "4.", "phone is "]
)
def test_masking_takes_linear_time(piece):
    begin = time.thread_time()
    mask(piece * (300_000 // len(piece)))
    assert time.thread_time() - begin < 10
