"""Quantities: read, spelt, shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.units import read, show, spell

UNITS = ("bit/s", "B/s", "B", "FLOP/s", "s", "W", "1/s", "USD/h", "gCO2e/J", "L/J")


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e30, max_value=1e30), st.sampled_from(UNITS))
def test_spelling_is_exact(value, unit):
    assert read(spell(value, unit), unit) == value


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("400 Gbit/s", "bit/s", 4e11), ("50 GB/s", "bit/s", 4e11), ("80 GiB", "B", 80 * 2**30), ("989 TFLOP/s", "FLOP/s", 989e12),
        ("54 d", "s", 54 * 86400), ("5 us", "s", 5e-6), ("413 gCO2e/kWh", "gCO2e/J", 413 / 3.6e6), ("0.08 USD/kWh", "USD/J", 0.08 / 3.6e6),
        ("4e-3 1/d", "1/s", 4e-3 / 86400), ("inf B", "B", float("inf")), ("50 %", "1", 0.5), ("1.8 L/kWh", "L/J", 1.8 / 3.6e6),
    ],
)  # fmt: skip
def test_reading(text, unit, value):
    assert read(text, unit) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("400 Gbit", "is in Gbit; expected bit/s"),
        ("400", "has no unit; expected bit/s, as in '400 bit/s'"),
        ("fast", "is not a number with a unit"),
        ("400 Gbot/s", "unknown unit 'Gbot'"),
        ("4 mh", "unknown unit 'mh'"),
    ],
)
def test_wrong_units_say_what_to_write(text, complaint):
    with pytest.raises(ValueError, match=complaint.replace("(", r"\(")):
        read(text, "bit/s")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(4e11, "bit/s", "400 Gbit/s"), (5400, "s", "90 min"), (54 * 86400, "s", "54 d"), (0, "s", "0 s"), (3.6e9, "J", "1 MWh"),
     (None, "s", "–"), (1234567, "USD", "1,234,567 USD"), (2.5e12, "gCO2e", "2,500,000 tCO2e"), (0.41, "1", "0.41")],
)  # fmt: skip
def test_showing(value, unit, text):
    assert show(value, unit) == text
