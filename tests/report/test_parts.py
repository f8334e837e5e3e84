"""Cells and tables."""

from __future__ import annotations

import pytest

from saekit.errors import DataError
from saekit.report.parts import facts, measured_cell


def test_a_number_that_is_not_measured():
    with pytest.raises(DataError, match=r"`metrics.fvu` must be a measured quantity"):
        measured_cell(0.5, where="metrics.fvu")


def test_nested_settings_get_dotted_names():
    assert [row[0].text for row in facts({"a": {"b": {"c": 1}}, "d": None}).rows] == ["a.b.c", "d"]
