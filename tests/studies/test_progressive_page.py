"""The verdicts of studies/progressive: what its page says about intervals."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_path = Path(__file__).parents[2] / "studies" / "progressive" / "page.py"
_spec = importlib.util.spec_from_file_location("progressive_page", _path)
page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(page)


def result(one, other, metric="fvu"):
    """Two ways at three sizes; the last is the largest and does not count."""

    def by_size(values):
        return {metric: {str(64 * 2**i): page.interval(v) for i, v in enumerate(values)}}

    return {"plan": {"sizes": [64, 128, 256]}, "curves": {"matryoshka": by_size(one), page.PRUNED: by_size(other)}}


LOW, HIGH, NOISY = [0.1, 0.11, 0.12], [0.3, 0.31, 0.33], [0.0, 0.3, 0.6]


@pytest.mark.parametrize(
    ("one", "other", "word"),
    [
        ([LOW, LOW, HIGH], [HIGH, HIGH, LOW], "**holds** (holds at 2 of 2"),
        ([HIGH, HIGH, LOW], [LOW, LOW, HIGH], "**contrary** (contrary at 2 of 2"),
        ([NOISY, NOISY, LOW], [HIGH, HIGH, HIGH], "**undecided** (undecided at 2 of 2"),
        ([LOW, HIGH, LOW], [HIGH, LOW, LOW], "**mixed** (holds at 1, contrary at 1 of 2"),
    ],
)
def test_a_claim_holds_where_the_paired_interval_lies_on_its_side(one, other, word):
    assert page.verdict(result(one, other), "fvu", "matryoshka", page.PRUNED).startswith(word)


def test_higher_is_better_for_similarity_and_seeds_are_paired():
    found = result([[0.1, 0.5, 0.9]] * 3, [[0.0, 0.41, 0.79]] * 3, "rsa")  # wide apart, but always about 0.1 higher
    assert page.verdict(found, "rsa", "matryoshka", page.PRUNED).startswith("**holds**")
    assert page.verdict(found, "fvu", "matryoshka", page.PRUNED) == "not measured"


def test_intervals_over_seeds():
    found = page.interval([1.0, 2.0, 3.0])
    assert found["value"] == 2
    assert found["high"] - 2 == pytest.approx(4.302653 / 3**0.5)
    assert page.interval([1.0])["low"] is None
    assert page.interval([1.0, None])["value"] is None
