"""Metrics by name, as items and as attributes."""

from __future__ import annotations

import pickle

import pytest

from saekit.errors import FormatError
from saekit.measure.metrics import METRICS, Metrics
from saekit.measure.results import Measured


def test_metrics_come_in_the_order_of_their_declaration():
    found = Metrics({"l0": Measured(2.0), "own": Measured(1.0), "fvu": Measured(0.5)})
    assert list(found) == ["fvu", "l0", "own"]
    assert found.l0 is found["l0"]
    assert len(found) == 3


def test_metrics_read_back_from_json_and_copies():
    found = Metrics({name: Measured(0.5, 0.25, 0.75, metric.unit) for name, metric in METRICS.items()})
    assert Metrics.from_json(found.to_json()) == found
    assert pickle.loads(pickle.dumps(found)) == found
    with pytest.raises(FormatError, match="`metrics` must be a JSON object"):
        Metrics.from_json([1])
    with pytest.raises(FormatError, match=r"`metrics\.fvu`"):
        Metrics.from_json({"fvu": 0.5})


def test_ranges_hold_their_perfect_values():
    for metric in METRICS.values():
        if metric.least is not None and metric.most is not None:
            assert metric.least < metric.most, metric.name
        assert metric.better in ("lower", "higher", "neither")
