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


def verdicts(found, metric="fvu"):
    [(_, words)] = page.versus(found, metric, "matryoshka", page.PRUNED)
    return words


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
    [(cells, found)] = page.versus([result(one, other)], "fvu", "matryoshka", page.PRUNED)
    assert found == words
    assert page.together(found) == together
    assert f"{words[0]} at {words.count(words[0])}" in cells[0]


def test_all_models_count_and_are_corrected_together():
    good, bad = result([LOW, LOW, HIGH], [HIGH, HIGH, LOW]), result([NOISY, NOISY, LOW], [HIGH, HIGH, HIGH])
    [(_, words)] = page.versus([good, bad], "fvu", "matryoshka", page.PRUNED)
    assert page.together(words) == "**holds at some**: better 2, undecided 2 of 4"
    # three seeds decide a single difference that they do not decide among many
    near = result([[0.1, 0.11, 0.12], LOW], [[0.14, 0.17, 0.16], LOW])
    near["plan"]["sizes"] = [64, 128]
    assert verdicts([near]) == ["better"]
    assert verdicts([near, *[bad] * 10]) == ["undecided"] * 21


def test_every_k_of_a_claim_is_corrected_together():
    found = result([[0.1, 0.11, 0.12], LOW], [[0.14, 0.17, 0.16], LOW])
    found["plan"] = {"sizes": [64, 128], "k": 8}
    noisy = result([NOISY, LOW], [HIGH, LOW])["curves"]
    found["levels"] = {"4": noisy, "16": noisy}
    lines = page.versus([found], "fvu", "matryoshka", page.PRUNED, (1, 0.5, 2))
    assert [words for _, words in lines] == [["undecided"]] * 3
    found["levels"] = {"4": found["curves"], "16": result([HIGH, LOW], [LOW, LOW])["curves"]}
    lines = page.versus([found], "fvu", "matryoshka", page.PRUNED, (1, 0.5, 2))
    assert lines[2][1] == ["worse"]


def test_drawn_sizes_cost_nothing_unless_they_are_worse_and_have_to_be_better_in_between():
    near = [value + 0.002 for value in LOW]
    by_size = {
        page.NESTED: {"64": LOW, "91": HIGH, "128": LOW},
        page.DRAWN: {"64": near, "91": LOW, "128": HIGH},
    }
    sampled = {way: {"fvu": {size: page.interval(v) for size, v in sizes.items()}} for way, sizes in by_size.items()}
    (_, fixed), (_, between) = page.drawn([{"plan": {"sizes": [64, 128], "between": [91]}, "sampled": sampled}])
    assert (fixed, between) == (["holds", "refuted"], ["better"])
    assert page.together(fixed) == "**holds at some**: holds 1, refuted 1 of 2"


@pytest.mark.parametrize(("best", "word"), [(HIGH, "better"), ([v + 0.002 for v in LOW], "equivalent")])
def test_the_widest_is_compared_with_the_best_of_the_narrower(best, word):
    curves = {page.APART: {"fvu": {"64": page.interval(HIGH), "128": page.interval(best), "256": page.interval(LOW)}}}
    dead = {"8": {page.APART: page.interval([0.01, 0.02, 0.03]), page.NESTED: page.interval([0.0] * 3)}}
    found = {"model": "m", "plan": {"sizes": [64, 128, 256], "k": 8}, "curves": curves, "dead": dead}
    *_, line = page.widest([found]).splitlines()
    assert line.endswith(f"| 2.0% | 0.0% | {word} |")


def test_higher_is_better_for_similarity_and_seeds_are_paired():
    found = result([[0.1, 0.5, 0.9]] * 3, [[0.0, 0.41, 0.79]] * 3, "rsa")  # wide apart, but always about 0.1 higher
    assert verdicts([found], "rsa") == ["better"] * 2
    assert page.versus([found], "fvu", "matryoshka", page.PRUNED) == [(["not measured"], [])]


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
