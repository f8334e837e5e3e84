"""Which controls each SAE is measured with, and which of them SAEs share."""

from __future__ import annotations

import torch

from saekit import ArrayRows
from saekit.evaluation.controls import Reconstructors, with_controls
from saekit.evaluation.settings import EvaluationSettings
from saekit.measure.reconstruction import calibrate
from saekit.sae.model import SAE


def controlled(rows: torch.Tensor, *saes: SAE, frozen: SAE | None = None, seed: int = 0) -> Reconstructors:
    calibration = calibrate(ArrayRows(rows), EvaluationSettings(), like=saes[0], with_controls=True)
    return with_controls([(str(at), sae) for at, sae in enumerate(saes)], frozen, calibration, seed)


def order_of(sae: SAE) -> torch.Tensor:
    return torch.randperm(sae.n_latents, generator=torch.Generator().manual_seed(0))


def test_without_calibration_there_are_none(oracle):
    found = with_controls([("a", oracle)], None, None, 0)
    assert (len(found.reconstructors), found.controls) == (1, [{}])


def test_saes_of_one_shape_and_rule_share_their_controls_in_any_order_of_latents(oracle, thresholded, rows):
    found = controlled(rows, oracle, oracle.permute(order_of(oracle)), thresholded)
    first, second, other = found.controls
    assert first == second
    assert other["untrained"] != first["untrained"]
    assert len(found.reconstructors) == len({at for each in found.controls for at in each.values()}) + 3


def test_pca_has_as_many_components_as_latents_fire(oracle, rows):
    found = controlled(rows, oracle)
    assert found.reconstructors[found.controls[0]["pca"]].l0 == 2


def test_the_frozen_sae_given_is_the_control_of_all(oracle, thresholded, rows):
    found = controlled(rows, oracle, thresholded, frozen=oracle)
    assert found.controls[0]["frozen-decoder"] == found.controls[1]["frozen-decoder"]
    assert found.reconstructors[found.controls[0]["frozen-decoder"]].sae is oracle


def test_a_frozen_sae_among_them_is_the_control_of_the_most_similar_and_not_its_own(oracle, thresholded, rows):
    frozen = [each.replace(provenance={"config": {"control": "frozen-decoder"}}) for each in (oracle, thresholded)]
    found = controlled(rows, oracle, thresholded, *frozen)
    assert [each.get("frozen-decoder") for each in found.controls] == [2, 3, None, None]


def test_the_untrained_sae_depends_on_the_seed(oracle, rows):
    W = [
        found.reconstructors[found.controls[0]["untrained"]].sae.W_dec
        for found in (controlled(rows, oracle, seed=seed) for seed in (0, 0, 1))
    ]
    assert torch.equal(W[0], W[1])
    assert not torch.equal(W[0], W[2])
