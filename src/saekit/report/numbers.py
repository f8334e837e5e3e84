"""Numbers as text, with the digits that the terminal shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..measure.numbers import decimals
from ..measure.results import Measured

Quantity = Mapping[str, Any]
"""A measured quantity as in JSON: `value`, `low`, `high`."""

NONE = "–"
"""What stands for a number that does not exist."""


def number(value: float | None) -> str:
    """Format a number for a table: three significant digits, thousands separated, ``–`` for none.

    >>> number(0.123456), number(12345.6), number(None), number(0.0), number(16.0), number(-0.5)
    ('0.123', '12,346', '–', '0', '16', '−0.5')
    """
    if value is None or not math.isfinite(value):
        return NONE
    return minus(decimals(value))


def minus(text: str) -> str:
    """Return text with the sign for minus in front of numbers.

    >>> minus("-0.5"), minus("1e-05"), minus("+0.5")
    ('−0.5', '1e-05', '+0.5')
    """
    return f"−{text[1:]}" if text[:1] == "-" else text


def capital(text: str) -> str:
    """Return text with its first letter as at the beginning of a sentence.

    >>> capital("no intervals: 25 documents, 40 are needed")
    'No intervals: 25 documents, 40 are needed'
    """
    return f"{text[:1].upper()}{text[1:]}"


def parts_of(measured: Quantity, spec: str = "") -> tuple[str, str]:
    """Return a measured quantity and its interval as text, rounded as the terminal does; no interval is empty.

    >>> parts_of({"value": -0.3118, "low": -0.33, "high": -0.29})
    ('−0.312', '−0.33 to −0.29')
    """
    if measured["value"] is None or not math.isfinite(measured["value"]):
        return NONE, ""
    low, high = measured.get("low"), measured.get("high")
    text = format(Measured(measured["value"], low, high), spec)
    value, _, ends = text.partition(" [")
    if not ends:
        return (minus(value) if spec else number(measured["value"])), ""
    first, last = (minus(end) for end in ends.rstrip("]").split(", "))
    if low == high == measured["value"]:  # an exact number
        return (minus(value) if spec else number(low)), ""
    return minus(value), f"{first} to {last}"


def told(measured: Quantity, spec: str = "") -> str:
    """Return a measured quantity in words.

    >>> told({"value": 0.3118, "low": 0.29, "high": 0.33}), told({"value": 0.5, "low": None, "high": None})
    ('0.312 (0.29 to 0.33)', '0.5')
    """
    value, interval = parts_of(measured, spec)
    return f"{value} ({interval})" if interval else value


def has_interval(measured: Quantity) -> bool:
    """Return whether both ends are known."""
    return measured.get("low") is not None and measured.get("high") is not None
