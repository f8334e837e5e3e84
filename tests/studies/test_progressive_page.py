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
    ("one", "other", "words", "together"),
    [
        ([LOW, LOW, HIGH], [HIGH, HIGH, LOW], ["better"] * 2, "**holds**"),
        ([HIGH, HIGH, LOW], [LOW, LOW, HIGH], ["worse"] * 2, "**the reverse holds**"),
        ([NOISY, NOISY, LOW], [HIGH, HIGH, HIGH], ["undecided"] * 2, "**undecided**"),
        (
            [LOW, HIGH, LOW],
            [HIGH, LOW, LOW],
            ["better", "worse"],
            "**holds at some, the reverse at others**: better 1, worse 1 of 2",
        ),
        ([LOW, LOW, HIGH], [LOW, [v + 0.005 for v in LOW], LOW], ["equivalent"] * 2, "**no difference**"),
    ],
)
def test_a_size_is_decided_by_the_paired_interval_and_the_margin(one, other, words, together):
    cells, found = page.versus([result(one, other)], "fvu", "matryoshka", page.PRUNED)
    assert found == words
    assert page.together(found) == together
    assert f"{words[0]} at {words.count(words[0])}" in cells[0]


def test_all_models_count_and_are_corrected_together():
    good, bad = result([LOW, LOW, HIGH], [HIGH, HIGH, LOW]), result([NOISY, NOISY, LOW], [HIGH, HIGH, HIGH])
    _, words = page.versus([good, bad], "fvu", "matryoshka", page.PRUNED)
    assert page.together(words) == "**holds at some**: better 2, undecided 2 of 4"
    # three seeds decide a single difference that they do not decide among many
    near = result([[0.1, 0.11, 0.12], LOW], [[0.14, 0.17, 0.16], LOW])
    near["plan"]["sizes"] = [64, 128]
    assert page.versus([near], "fvu", "matryoshka", page.PRUNED)[1] == ["better"]
    assert page.versus([near, *[bad] * 10], "fvu", "matryoshka", page.PRUNED)[1] == ["undecided"] * 21


def test_higher_is_better_for_similarity_and_seeds_are_paired():
    found = result([[0.1, 0.5, 0.9]] * 3, [[0.0, 0.41, 0.79]] * 3, "rsa")  # wide apart, but always about 0.1 higher
    assert page.versus([found], "rsa", "matryoshka", page.PRUNED)[1] == ["better"] * 2
    assert page.versus([found], "fvu", "matryoshka", page.PRUNED) == (["not measured"], [])


@pytest.mark.parametrize(
    ("lognormal", "exponential", "word"),
    [
        (["undecided"] * 3, ["power law"] * 3, "better"),
        (["lognormal", "undecided", "lognormal"], ["power law"] * 3, "undecided"),
        (["lognormal"] * 3, ["power law"] * 3, "worse"),
        (["undecided"] * 3, ["power law", "undecided", "power law"], "undecided"),
    ],
)
def test_a_power_law_is_claimed_only_if_no_rival_fits_better_in_any_seed(lognormal, exponential, word):
    alpha, r2 = page.interval([1.0, 1.1, 1.2]), page.interval([0.9, 0.91, 0.92])
    fit = {"alpha": alpha, "r2": r2, "rivals": {"lognormal": lognormal, "exponential": exponential}}
    assert page.law({"power_laws": {"energy": fit}}, "power_laws", "energy")[0] == word


def test_intervals_over_seeds():
    found = page.interval([1.0, 2.0, 3.0])
    assert found["value"] == 2
    assert found["high"] - 2 == pytest.approx(4.302653 / 3**0.5)
    assert page.interval([1.0])["low"] is None
    assert page.interval([1.0, None])["value"] is None
