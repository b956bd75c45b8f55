"""Personal data masked: mail addresses, public IP addresses, telephone, card and bank account numbers."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter

# Bounded repeats: no pattern takes more than linear time.
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){1,7}(?![\w:])")
# Countries' codes (ITU-T E.164); those of three digits are all the others that begin with their first two.
_COUNTRY = (
    r"(?:1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|2[1-689]\d|35\d|37\d|38\d|42\d|50\d|59\d|67\d|68\d|"
    r"69\d|80\d|85\d|87\d|88\d|96\d|97\d|99\d)"
)
_GAP = r"[ .\-/\u00a0\u2010\u2011]"
_REST = rf"(?:{_GAP}?\(?\d{{1,6}}\)?){{2,7}}(?![\w%])"
# A plus sign may be as wide as a Chinese character.
_PHONE = re.compile(rf"(?<![\w+.,])(?:[+\uff0b]|00(?={_COUNTRY}{_GAP}))(?:{_COUNTRY}|\({_COUNTRY}\)){_GAP}?{_REST}")
# North America's, whose form is its own.
_BREAK, _SPACE = r"[.\-\u2010\u2011\u2013]", r"[ \u00a0]"
_LAST_FOUR = r"\d{4}(?!-?\w|[\w\-.]*\d)"
_NORTH_AMERICA = re.compile(
    rf"(?<![\w+.,\-/])(?:1[ .\-\u00a0])?(?:\([2-9]\d\d\){_SPACE}?|[2-9]\d\d{_BREAK})[2-9]\d\d{_BREAK}{_LAST_FOUR}"
    rf"|(?<![\w+.,\-/])\([2-9]\d\d\){_SPACE}?[2-9]\d\d{_SPACE}{_LAST_FOUR}"
)
# A number of any country, after a word that says what it is.
_CALLED = re.compile(
    r"(?i:\b(?:tel|telephone|phone|call|mobile|cell|fax|whatsapp|telefon|telefax|handy|mobil|t\u00e9l|t\u00e9l\u00e9phone|"
    r"tel\u00e9fono|telefono|m\u00f3vil)\b)(?: (?:us|me|number|no|nr|at|on|is|or|under)\b){0,2}[.:]{0,2} {0,2}"
    rf"(\(?\d{{2,6}}\)?{_REST})"
)
# What follows or precedes an amount.
_UNIT = re.compile(
    r"\s?(?:%|\u2030|\u00b0|[\u20ac$\u00a3\u00a5]|(?:[kmgtp]i?b|bytes?|bits?|[kmgt]?hz|[kmcn\u00b5]?m|[km]?g|kwh?|mw|gw|usd|eur|gbp|"
    r"chf|jpy|dollars?|euros?|pounds?|units?|points?|people|users?|years?|days?|hours?|seconds?|ms|ns|s|k|million|"
    r"billion|shares?|votes?|items?|pixels?|px|lines?|rows?|records?|tokens?|steps?)\b)",
    re.IGNORECASE,
)
_MONEY = re.compile(r"[\u20ac$\u00a3\u00a5]\s?$")
# Thousands by threes; one point and nothing else; a date or a time.
_THOUSANDS = re.compile(r"[+\uff0b(]*\d{1,3}(?:([ ,.\u00a0])\d{3})(?:\1\d{3})*$")
_DECIMAL = re.compile(r"[+\uff0b]?\d+\.\d+$")
_DATE = re.compile(r"\(?(?:\d{4}[./\-]\d{1,2}[./\-]\d{1,2}|\d{1,2}[./\-]\d{1,2}[./\-]\d{2,4})(?!\d)")
# Digits with a point, a stroke, or up to three spaces and dashes between two of them.
_DIGITS = re.compile(
    r"(?<![\w.,+\-])\d(?:(?:[._/]|[ \t\-\u00a0\u2000-\u2015\u202f\u2212\u3000]{0,3})\d){12,40}(?![^\W_])"
)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")


def _luhn(digits: str) -> bool:
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + i % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _is_card(digits: str) -> bool:
    """Whether a network has numbers that begin so, of that length, and the check digit is right."""
    size, first = len(digits), int(digits[:4])
    network = (
        (digits[0] == "4" and size in (13, 16, 19))
        or ((51 <= first // 100 <= 55 or 2221 <= first <= 2720) and size == 16)
        or (first // 100 in (34, 37) and size == 15)
        or ((first // 100 in (36, 38, 39) or 300 <= first // 10 <= 305) and 14 <= size <= 19)
        or ((first == 6011 or 644 <= first // 10 <= 659 or first // 100 == 62) and 16 <= size <= 19)
        or (3528 <= first <= 3589 and 16 <= size <= 19)
        or ((first // 100 in (50, 56, 57, 58) or digits[0] == "6") and 12 <= size <= 19)
    )
    return network and len(set(digits)) > 1 and _luhn(digits)


def _card_in(run: str) -> tuple[int, int] | None:
    """The place of a card number in a run of digits, by whole groups of three digits or more; the last may be shorter.

    Of single digits and pairs it is the whole run: in parts of them a check digit is right by chance too often.
    """
    groups = [match.span() for match in re.finditer(r"\d+", run)]
    sizes = {b - a for a, b in groups[:-1]}
    if len(groups) > 6 and len(sizes) == 1 and max(sizes) < 3:
        digits = "".join(run[a:b] for a, b in groups)
        return (0, groups[-1][1]) if len(digits) in (15, 16) and _is_card(digits) else None
    if len(groups) == 2 and run[groups[0][1]] == ".":
        return None
    for begin in range(len(groups)):
        for end in range(min(len(groups), begin + 6), begin, -1):
            if any(b - a < 3 for a, b in groups[begin : end - 1]):
                continue
            digits = "".join(run[a:b] for a, b in groups[begin:end])
            # Among other numbers a short one is a card's by chance.
            least = 12 if end - begin == len(groups) else 14
            if least <= len(digits) <= 19 and _is_card(digits):
                return groups[begin][0], groups[end - 1][1]
    return None


def _is_iban(match: str) -> bool:
    joined = match.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in joined[4:] + joined[:4])) % 97 == 1


def _is_public(match: str) -> bool:
    try:
        return ipaddress.ip_address(match).is_global
    except ValueError:
        return False


def _is_phone(match: re.Match[str]) -> bool:
    """Whether a number is a telephone's: not an amount, a decimal or a date, and of a length that one has."""
    number, text = match[0], match.string
    digits = re.sub(r"\D", "", number)
    international = number.lstrip("(")[:1] in ("+", "\uff0b")
    if _DECIMAL.match(number) or (not international and _DATE.match(number)):
        return False
    if _UNIT.match(text, match.end()) or _MONEY.search(text[max(0, match.start() - 2) : match.start()]):
        return False
    if international:
        code = re.match(_COUNTRY, digits)
        national = len(digits) - len(code[0]) if code else 0
        if code and code[0] in ("1", "7"):
            return national == 10
        return 6 <= national <= 12 and len(digits) <= 15 and not (_THOUSANDS.match(number) and national < 8)
    return 7 <= len(digits) <= 15


def _mask_phones(text: str, counts: Counter[str]) -> str:
    def replace(match: re.Match[str]) -> str:
        if not _is_phone(match):
            return match[0]
        counts["phone"] += 1
        # A bracket that closes what came before the number is the sentence's.
        return _PHONE_STANDS + ")" * (match[0].endswith(")") and match[0].count(")") > match[0].count("("))

    def replace_called(match: re.Match[str]) -> str:
        digits = re.sub(r"\D", "", match[1])
        amount = _DATE.match(match[1]) or _DECIMAL.match(match[1]) or _UNIT.match(match.string, match.end())
        if amount or not 6 <= len(digits) <= 13 or not (digits[0] == "0" or len(digits) >= 9):
            return match[0]
        counts["phone"] += 1
        return match[0][: match.start(1) - match.start()] + _PHONE_STANDS

    text = _PHONE.sub(replace, text)
    text = _NORTH_AMERICA.sub(replace, text)
    return _CALLED.sub(replace_called, text)


def _mask_cards(text: str, counts: Counter[str]) -> str:
    def replace(match: re.Match[str]) -> str:
        found = _card_in(match[0])
        if found is None:
            return match[0]
        counts["card"] += 1
        return match[0][: found[0]] + "0000 0000 0000 0000" + match[0][found[1] :]

    return _DIGITS.sub(replace, text)


_PHONE_STANDS = "+00 000 0000"
# What stands in is reserved for documentation (RFC 2606, RFC 5737, RFC 3849) or is plainly no number of anyone's.
_MASKS = (
    ("email", _EMAIL, lambda match: not match.endswith("@example.com"), "email@example.com"),
    ("iban", _IBAN, _is_iban, "XX00 0000 0000 0000"),
    ("ip_address", _IPV4, _is_public, "192.0.2.1"),
    ("ip_address", _IPV6, _is_public, "2001:db8::1"),
)


def mask(text: str) -> tuple[str, Counter[str]]:
    """``text`` with personal data replaced, and how many of each kind were.

    Numbers are checked first: card numbers by Luhn's digit, bank accounts by ISO 7064, addresses for being public.
    """
    counts: Counter[str] = Counter()
    for name, pattern, check, stand_in in _MASKS:

        def replace(match: re.Match[str], name=name, check=check, stand_in=stand_in) -> str:
            if not check(match[0]):
                return match[0]
            counts[name] += 1
            return stand_in

        text = pattern.sub(replace, text)
    return _mask_phones(_mask_cards(text, counts), counts), counts
