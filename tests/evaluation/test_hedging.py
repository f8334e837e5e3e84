"""The hedging degree: its formula, planted features that fire together, what cannot be trained on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from saekit import BatchTopK, JumpReLU, Matryoshka, SyntheticRows, TopK, TrainSettings, evaluate, train
from saekit.errors import ConfigError
from saekit.evaluation import hedging as module
from saekit.evaluation.hedging import HEDGING, hedging, hedging_config
from saekit.evaluation.result import Evaluation
from saekit.evaluation.settings import EvaluationSettings
from saekit.report.page import sections_of
from saekit.sae.model import SAE

# children fire only where their parents do, in directions nearly at right angles
ROWS = SyntheticRows(
    d_in=32, n_features=16, l0=3, power=0.3, trees=4, branching=3, depth=2, parting=50, n_rows=20_000, seed=1
)
QUIET: dict[str, Any] = {"progress": False}
SETTINGS = EvaluationSettings(controls=False, intervals=False, max_rows=1000, hedging_rows=5_000)


@pytest.fixture(scope="module")
def saes() -> dict[int, SAE]:
    """Too narrow for all features, and wide enough."""
    settings = TrainSettings(batch_rows=64)
    trained = train([BatchTopK(6, k=3), BatchTopK(24, k=3)], ROWS, tokens=20_000, settings=settings, **QUIET)
    return {sae.n_latents: sae for sae in trained}


def test_a_narrow_sae_hedges_and_a_wide_one_does_not(saes):
    result = evaluate(list(saes.values()), ROWS, settings=SETTINGS, **QUIET)
    narrow, wide = (each.hedging for each in result.entries)
    assert set(narrow) == set(HEDGING)
    assert narrow["degree"].value > 0.1 > 0.05 > wide["degree"].value
    assert result.hedging_table()[1][0] == result.entries[0].name
    read = Evaluation.from_json(result.to_json())
    assert read.entries[0].hedging == narrow
    assert any("Hedging" in section.title for section in sections_of(result.to_json()))
    assert hedging(saes[6], ROWS, 5_000) == narrow  # draws and all


def test_the_degree_is_the_formula_by_hand(saes, monkeypatch):
    stream = torch.Generator().manual_seed(0)

    def moved(sae: SAE, by: float) -> SAE:
        return sae.replace(W_dec=sae.W_dec + by * torch.randn(sae.W_dec.shape, generator=stream))

    plain, wide = moved(saes[6], 0.1), moved(module._widened(saes[6], 4, stream), 0.3)
    monkeypatch.setattr(module, "train", lambda *args, **more: [plain, wide])
    found = hedging(saes[6], ROWS, 1000)
    a, b = (each.W_dec.double().numpy() for each in (plain, wide))
    a, b = a / np.linalg.norm(a, axis=1)[:, None], b / np.linalg.norm(b, axis=1)[:, None]
    q, _ = np.linalg.qr(b[6:].T)
    expected = np.linalg.norm((b[:6] - a) @ q, axis=1).mean()
    assert found["moved"].value == pytest.approx(expected)
    # a random subspace of 4 of 32 dimensions has a part of sqrt(4 / 32) of any change, a little less in the mean
    length = np.linalg.norm(b[:6] - a, axis=1).mean()
    assert found["chance"].value == pytest.approx(length * (4 / 32) ** 0.5, rel=0.1)
    chance = found["chance"].value
    assert found["degree"].value == pytest.approx(max(0, (expected - chance) / (1 - chance)))


def test_new_latents_change_nothing_before_they_are_trained(saes):
    wide = module._widened(saes[24], 3, torch.Generator().manual_seed(0))
    assert wide.n_latents == 27
    torch.testing.assert_close(wide.W_dec[:24], saes[24].W_dec)
    [jump] = train(JumpReLU(12, target_l0=3), ROWS, tokens=2048, **QUIET)
    wide = module._widened(jump, 2, torch.Generator().manual_seed(0))
    thresholds = wide.rule.tensors()["threshold"]
    torch.testing.assert_close(thresholds[12:], thresholds[:12].mean().expand(2))
    assert set(hedging(jump, ROWS, 512)) == set(HEDGING)


def test_sizes_of_a_matryoshka_sae_stay_and_the_last_one_grows(monkeypatch):
    [sae] = train(Matryoshka(16, k=3, balance=0.75, bias="mean"), ROWS, tokens=2048, **QUIET)
    seen = []
    monkeypatch.setattr(
        module, "train", lambda configs, *args, **more: seen.extend(configs) or train(configs, *args, **more)
    )
    hedging(sae, ROWS, 512)
    assert [(each.n_latents, each.sizes, each.balance) for each in seen] == [
        (16, (2, 4, 8, 16), 0.75),
        (20, (2, 4, 8, 20), 0.75),
    ]
    assert seen[0].bias == "geometric-median"  # it has one already


def test_what_cannot_be_trained_on_is_refused_before_anything_is_measured(saes):
    sae = saes[6]
    [topk] = train(TopK(6, k=3), ROWS, tokens=512, **QUIET)
    foreign = topk.replace(provenance={})
    assert hedging_config(foreign) == TopK(6, k=3)
    [frozen] = train(TopK(6, k=3, control="frozen-decoder"), ROWS, tokens=512, **QUIET)
    [jump] = train(JumpReLU(12, target_l0=3), ROWS, tokens=512, **QUIET)
    for wrong, said in (
        (jump.replace(provenance={}), "does not say how it was trained"),
        (frozen, "this one is a control"),
        (sae.take(3), "a part of another"),
        (sae.replace(provenance={"parts": [{"name": "a", "width": 32}]}), "a transcoder or crosscoder"),
    ):
        with pytest.raises(ConfigError, match=f"evaluate: `hedging_rows`.*{said}"):
            evaluate(wrong, ROWS, settings=SETTINGS, **QUIET)
    for few in (-1, 255):
        with pytest.raises(ConfigError, match="hedging_rows"):
            dataclasses.replace(SETTINGS, hedging_rows=few)
