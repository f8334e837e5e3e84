"""Where there is nothing to know nothing is found: short runs of ``benchmarks/classification_chance.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from saekit.classification import verdicts


@pytest.fixture(scope="module")
def chance(load_benchmark) -> Any:
    return load_benchmark("classification_chance")


def test_shuffled_labels_are_said_to_leak_no_more_often_than_announced(chance, monkeypatch):
    """At most 5 in 100; 11 of 80 are more than that in one of 500 cases. Without the correction it is many more."""
    results = [chance.shuffled_arms(100, 2, 12, seed) for seed in range(80)]
    assert sum(map(chance.leaks, results)) < 11
    monkeypatch.setattr(verdicts, "holm", lambda values: list(values))
    assert sum(map(chance.leaks, results)) > 11


def test_trees_that_tell_few_rows_apart_do_not_leak_more_often(chance):
    """Nearly all rows are in one leaf; how often few others are right is no normal number."""
    assert sum(chance.leaks(chance.shuffled_arms(150, 15, 2, seed, "trees")) for seed in range(30)) < 6


@pytest.mark.parametrize("n_train", [20, 200])
def test_families_of_noise_are_at_chance_and_have_no_verdict(n_train, chance):
    found = [chance.families_of_noise(n_train, 300, seed, ("dense", "full")) for seed in range(3)]
    assert not [each for result in found for each in result if each.verdict in ("better", "worse")]
    areas = np.array([each.auc.value for result in found for each in result])
    assert abs(areas.mean() - 0.5) < 3.3 * 0.0333 / np.sqrt(len(areas))
