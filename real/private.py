"""Personal data masked: e-mail addresses, public IP addresses, telephone numbers.

As FineWeb did (Penedo et al. 2024, section 3.7) an address gives way to one that nobody has: names of RFC 2606, addresses of RFC 5737
and 3849, numbers kept free for fiction. Private and reserved IP addresses say nothing of anybody and stay.
"""

import ipaddress
import re
from collections import Counter

EMAIL = re.compile(r"\b[A-Za-z0-9][A-Za-z0-9._%+\-]{0,63}@(?:[A-Za-z0-9\-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
IP = re.compile(
    r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}"
    r"|(?:[0-9A-Fa-f]{1,4}:){2,7}:?[0-9A-Fa-f]{1,4}(?::[0-9A-Fa-f]{1,4}){0,6})(?![\w:]|\.\d)"
)
PHONE = re.compile(  # +49 30 1234 5678, (212) 555-7890, 212-555-7890
    r"(?<![\w.,+\-/])(?:\+\d{1,3}[ .\-]?(?:\(\d{1,4}\)[ .\-]?)?\d{2,4}(?:[ .\-]\d{2,4}){1,4}"
    r"|\(\d{3}\) ?\d{3}[ .\-]\d{4}|\d{3}[.\-]\d{3}[.\-]\d{4})(?![\w\-/]|[.,]\d)"
)
STANDS_FOR = {"e-mail": "someone@example.com", "phone": "+1 555-555-0100"}


def masked(text: str) -> tuple[str, Counter[str]]:
    """The text without what tells who somebody is, and how many of each kind there were.

    >>> masked("Ask jo.doe@mail.org, or 8.8.8.8; not 10.0.0.1. Tel. +49 30 1234 5678.")[0]
    'Ask someone@example.com, or 192.0.2.1; not 10.0.0.1. Tel. +1 555-555-0100.'
    """
    found: Counter[str] = Counter()

    def address(match: re.Match[str]) -> str:
        try:
            number = ipaddress.ip_address(match[0])
        except ValueError:
            return match[0]
        if not number.is_global:
            return match[0]
        found["IP address"] += 1
        return "192.0.2.1" if number.version == 4 else "2001:db8::1"

    if "@" in text:
        text, found["e-mail"] = EMAIL.subn(STANDS_FOR["e-mail"], text)
    text = IP.sub(address, text)
    text, found["phone"] = PHONE.subn(STANDS_FOR["phone"], text)
    return text, +found
