"""Ablated latents write nothing, and cost what they carried."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saekit.comparison.ablation import GROUPS, ablated, ablation_costs, variants
from saekit.comparison.orphan_properties import Kinds
from saekit.evaluation.run import evaluate
from saekit.evaluation.settings import EvaluationSettings
from saekit.measure.importance import importance
from saekit.measure.reconstruction import measure_saes
from saekit.measure.settings import MeasureSettings
from saekit.rows.arrays import ArrayRows


def test_ablating_one_latent_costs_its_loss(oracle, rows):
    lost = importance(oracle, rows).scores["loss"]
    whole, without = (
        evaluate(sae, rows, settings=EvaluationSettings(controls=False, intervals=False)).metrics.fvu.value
        for sae in (oracle, ablated(oracle, [5]))
    )
    variance = float(rows.double().var(0, unbiased=False).sum())
    assert without - whole == pytest.approx(float(lost[5]) / variance, rel=1e-4)


def test_ablated_latents_compete_as_before(oracle, rows):
    without = ablated(oracle, torch.tensor([5, 7]))
    assert torch.equal(without.encode(rows).indices, oracle.encode(rows).indices)
    assert (without.W_dec[[5, 7]] == 0).all()
    assert torch.equal(without.W_dec[8:], oracle.W_dec[8:])


def test_costs_of_each_group_are_those_of_its_ablation(oracle, rows):
    shared = np.arange(oracle.n_latents) < 30
    kinds = Kinds([shared, shared], {1: (np.array([40, 41]), np.array([3, 4]))})
    measured = measure_saes(
        variants([oracle, oracle], kinds), ArrayRows(rows), settings=MeasureSettings(intervals=False, max_rows=1000)
    )
    costs = ablation_costs(measured, kinds)
    assert [each.latents for each in costs.groups] == list(GROUPS)
    assert [each.n_latents for each in costs.groups] == [18, 30, 2, 2]
    whole, *without = (each["fvu"].value for each in measured.estimates)
    assert [each.fvu.value for each in costs.groups] == pytest.approx([value - whole for value in without])
    assert costs.differences["fvu"].value == pytest.approx(without[2] - without[3])
    assert costs.groups[0].ce is None
