"""Quantities: "400 Gbit/s" outside, 4e11 inside.

A unit is a product and quotient of symbols, each with an SI or binary prefix where that makes sense.
Inside, every quantity is a float in the unit that its field declares (`Annotated[str, "bit/s"]`).
"""

import math
import re
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_args, get_origin

if TYPE_CHECKING:  # a type checker sees the float that is there after loading
    BitRate: TypeAlias = float
    ByteRate: TypeAlias = float
    Bytes: TypeAlias = float
    FlopRate: TypeAlias = float
    Flops: TypeAlias = float
    Seconds: TypeAlias = float
    Watts: TypeAlias = float
    Rate: TypeAlias = float
    DollarsPerHour: TypeAlias = float
    DollarsPerByte: TypeAlias = float
    DollarsPerByteTime: TypeAlias = float
    DollarsPerEnergy: TypeAlias = float
    Intensity: TypeAlias = float
    Litres: TypeAlias = float
else:  # Hydra sees the text that a user writes
    BitRate = Annotated[str, "bit/s"]
    ByteRate = Annotated[str, "B/s"]
    Bytes = Annotated[str, "B"]
    FlopRate = Annotated[str, "FLOP/s"]
    Flops = Annotated[str, "FLOP"]
    Seconds = Annotated[str, "s"]
    Watts = Annotated[str, "W"]
    Rate = Annotated[str, "1/s"]
    DollarsPerHour = Annotated[str, "USD/h"]
    DollarsPerByte = Annotated[str, "USD/B"]
    DollarsPerByteTime = Annotated[str, "USD/B/s"]
    DollarsPerEnergy = Annotated[str, "USD/J"]
    Intensity = Annotated[str, "gCO2e/J"]
    Litres = Annotated[str, "L/J"]

# symbol: (size in base units, exponents of the base units)
SYMBOLS: dict[str, tuple[float, dict[str, int]]] = {
    "1": (1.0, {}),
    "%": (0.01, {}),
    "bit": (1.0, {"bit": 1}),
    "B": (8.0, {"bit": 1}),
    "s": (1.0, {"s": 1}),
    "min": (60.0, {"s": 1}),
    "h": (3600.0, {"s": 1}),
    "d": (86400.0, {"s": 1}),
    "week": (7 * 86400.0, {"s": 1}),
    "month": (365.25 / 12 * 86400.0, {"s": 1}),
    "year": (365.25 * 86400.0, {"s": 1}),
    "FLOP": (1.0, {"FLOP": 1}),
    "J": (1.0, {"J": 1}),
    "W": (1.0, {"J": 1, "s": -1}),
    "Wh": (3600.0, {"J": 1}),
    "USD": (1.0, {"USD": 1}),
    "gCO2e": (1.0, {"gCO2e": 1}),
    "tCO2e": (1e6, {"gCO2e": 1}),
    "token": (1.0, {"token": 1}),
    "L": (1.0, {"L": 1}),
}
PREFIXES = {
    "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "m": 1e-3, "u": 1e-6, "µ": 1e-6, "n": 1e-9,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50,
}  # fmt: skip
_NUMBER = re.compile(r"^\s*([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?inf)\s*(.*?)\s*$")


@cache
def _symbol(name: str) -> tuple[float, tuple[tuple[str, int], ...]]:
    if name in SYMBOLS:
        size, base = SYMBOLS[name]
        return size, tuple(base.items())
    for width in (2, 1):
        prefix, rest = name[:width], name[width:]
        if prefix in PREFIXES and rest in SYMBOLS and rest not in ("1", "%", "min", "h", "d", "week", "month", "year"):
            size, base = SYMBOLS[rest]
            return PREFIXES[prefix] * size, tuple(base.items())
    raise ValueError(f"unknown unit {name!r}; units are {', '.join(SYMBOLS)} with prefixes {', '.join(PREFIXES)}")


@cache
def size_of(unit: str) -> tuple[float, tuple[tuple[str, int], ...]]:
    """Size of a unit in base units, and the exponents of those.

    >>> size_of("kB/s")
    (8000.0, (('bit', 1), ('s', -1)))
    """
    size, base, sign = 1.0, Counter[str](), 1
    for part in re.split(r"([*/])", unit.replace(" ", "")):
        if part in "*/":
            sign = 1 if part == "*" else -1
            continue
        factor, exponents = _symbol(part)
        size *= factor**sign
        for name, power in exponents:
            base[name] += sign * power
    return size, tuple(sorted((n, p) for n, p in base.items() if p))


def read(text: str, unit: str) -> float:
    """The number that `text` is in `unit`.

    Raises ValueError with a line that a user can act on.

    >>> read("400 Gbit/s", "bit/s"), read("50 GB/s", "bit/s"), read("54 d", "s")
    (400000000000.0, 400000000000.0, 4665600.0)
    >>> read("400 Gbit", "bit/s")
    Traceback (most recent call last):
    ValueError: '400 Gbit' is in Gbit; expected bit/s, as in '1 bit/s'
    """
    match = _NUMBER.match(text)
    if not match:
        raise ValueError(f"{text!r} is not a number with a unit; write for example '1 {unit}'")
    number, given = match.groups()
    if not given:
        raise ValueError(f"{text!r} has no unit; expected {unit}, as in '{text.strip()} {unit}'")
    size, base = size_of(given)
    target, expected = size_of(unit)
    if base != expected:
        raise ValueError(f"{text!r} is in {given}; expected {unit}, as in '1 {unit}'")
    return float(number) * (size / target)


def spell(value: float, unit: str) -> str:
    """A quantity as text that `read` turns back into the same float.

    >>> spell(4e11, "bit/s")
    '400000000000.0 bit/s'
    """
    return f"{value!r} {unit}"


_SPANS = ((365.25 * 86400, "years"), (2 * 86400, "d"), (2 * 3600, "h"), (120, "min"), (1, "s"), (1e-3, "ms"), (0, "µs"))
_SPAN_SIZES = {"years": 365.25 * 86400, "d": 86400, "h": 3600, "min": 60, "s": 1, "ms": 1e-3, "µs": 1e-6}
_STEPS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (0.0, ""))


def show(value: float | None, unit: str) -> str:
    """A quantity for a person: three digits and the prefix that fits.

    >>> show(4e11, "bit/s"), show(0.41, "1"), show(5400, "s"), show(7.2e9, "J"), show(1234.5, "USD")
    ('400 Gbit/s', '0.41', '90 min', '2 MWh', '1,234 USD')
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if unit == "s":
        if value == 0:
            return "0 s"
        name = next(n for limit, n in _SPANS if abs(value) >= limit)
        return f"{_three(value / _SPAN_SIZES[name])} {name}"
    if unit == "J":
        return show(value / 3600, "Wh")
    if unit == "USD":
        return f"{value:,.0f} USD" if abs(value) >= 100 else f"{value:,.2f} USD" if abs(value) >= 1 else f"{_three(value)} USD"
    if unit == "gCO2e" and abs(value) >= 1e6:
        return f"{_three(value / 1e6)} tCO2e"
    if unit in ("1", ""):
        return _three(value)
    if unit == "count":
        return f"{value:,.0f}"
    if unit in ("nat", "h", "1/s", "bit/B"):
        return f"{_three(value)} {unit}"
    limit, prefix = next(s for s in _STEPS if abs(value) >= s[0])
    return f"{_three(value / limit if limit else value)} {prefix}{unit}"


def _three(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2e}"


def unit_of(annotation: Any) -> str | None:
    """The unit that a field's type declares, or None for a plain number or text."""
    if get_origin(annotation) is Annotated:
        return str(get_args(annotation)[1])
    return next((u for a in get_args(annotation) if (u := unit_of(a))), None)
