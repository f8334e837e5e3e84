"""Cells and tables."""

from __future__ import annotations

import pytest

from saekit.errors import DataError
from saekit.report.numbers import parts_of
from saekit.report.parts import facts, measured_cell


def test_a_number_that_is_not_measured():
    with pytest.raises(DataError, match=r"`metrics.fvu` must be a measured quantity"):
        measured_cell(0.5, where="metrics.fvu")


def test_nested_settings_get_dotted_names():
    assert [row[0].text for row in facts({"a": {"b": {"c": 1}}, "d": None}).rows] == ["a.b.c", "d"]


def test_an_exact_number_has_the_digits_of_the_terminal():
    exact = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert parts_of(exact, "+.3f") == ("+0.000", "")
    assert parts_of(exact) == ("0", "")
