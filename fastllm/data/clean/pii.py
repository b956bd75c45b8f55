"""Personal data masked: mail addresses, public IP addresses, telephone, card and bank account numbers."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter

# Bounded repeats: no pattern takes more than linear time.
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){1,7}(?![\w:])")
_PHONE = re.compile(r"(?<![\w+])\+[1-9]\d{0,2}[ .\-/]?(?:\(?\d{1,5}\)?[ .\-/]?){2,5}\d(?!\w)")
_CARD = re.compile(r"(?<![\w-])(?:\d{4}[ -]?){3}\d{1,7}(?![\w-])")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")


def _luhn(digits: str) -> bool:
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + i % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _is_card(match: str) -> bool:
    digits = re.sub(r"\D", "", match)
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and _luhn(digits)


def _is_iban(match: str) -> bool:
    joined = match.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in joined[4:] + joined[:4])) % 97 == 1


def _is_public(match: str) -> bool:
    try:
        return ipaddress.ip_address(match).is_global
    except ValueError:
        return False


def _is_phone(match: str) -> bool:
    return 8 <= len(re.sub(r"\D", "", match)) <= 15


# What stands in is reserved for documentation (RFC 2606, RFC 5737, RFC 3849) or is plainly no number of anyone's.
_MASKS = (
    ("email", _EMAIL, lambda match: not match.endswith("@example.com"), "email@example.com"),
    ("iban", _IBAN, _is_iban, "XX00 0000 0000 0000"),
    ("card", _CARD, _is_card, "0000 0000 0000 0000"),
    ("phone", _PHONE, _is_phone, "+00 000 0000"),
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
    return text, counts
