"""Alignment of selected latents compared with others of their density."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit.errors import ConfigError, DataError
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule

PATH = Path(__file__).resolve().parents[2] / "studies" / "classify" / "selected_alignment.py"
SPEC = importlib.util.spec_from_file_location("selected_alignment", PATH)
study = sys.modules["selected_alignment"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(study)
decoder_alignment, selected_alignment = study.decoder_alignment, study.selected_alignment


def an_sae(seed: int, shared: int = 0) -> SAE:
    """Random directions; the first `shared` are the same for every seed."""
    W = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed))
    W[:shared] = torch.randn(40, 64, generator=torch.Generator().manual_seed(99))[:shared]
    return SAE(W_enc=W, b_enc=torch.zeros(40), W_dec=W, b_dec=torch.zeros(64), rule=TopKRule(2))


def test_latents_that_all_seeds_have_are_aligned():
    saes = [an_sae(seed, shared=10) for seed in range(3)]
    alignment = decoder_alignment(saes[0], saes[1:])
    assert alignment[:10] == pytest.approx(1, abs=1e-5)
    assert alignment[10:].mean() < 0.5
    assert decoder_alignment(saes[0], [saes[0].permute(torch.arange(39, -1, -1))]) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ConfigError, match="at least one other SAE"):
        decoder_alignment(saes[0], [])


def test_selection_of_aligned_latents_is_told_from_density():
    generator = np.random.default_rng(0)
    density = generator.random(400)
    alignment = 0.3 + 0.5 * density + 0.02 * generator.normal(size=400)  # density alone explains it
    by_density = selected_alignment(np.argsort(-density)[40:80], alignment, density)
    assert by_density.selected.value > alignment.mean() + 0.1
    assert abs(by_density.difference.value) < 0.02
    better = alignment.copy()
    better[:30] += 0.2
    found = selected_alignment(range(30), better, density)
    assert found.difference.value == pytest.approx(0.2, abs=0.03)
    assert found.difference.low > 0.1  # type: ignore[operator]
    assert found.to_json()["n_selected"] == 30


def test_intervals_hold_nothing_where_nothing_is_there():
    generator = np.random.default_rng(1)
    alignment, density = generator.random(500), generator.random(500)
    found = [
        selected_alignment(generator.choice(500, 20, replace=False), alignment, density, near=100, draws=400).difference
        for _ in range(200)
    ]
    held = np.mean([each.low <= 0 <= each.high for each in found])  # type: ignore[operator]
    assert 0.9 < held < 0.99  # 0.95 within four standard errors, neither short nor idle


def test_bad_selections():
    with pytest.raises(DataError, match="must be some of the 5 latents"):
        selected_alignment([], np.zeros(5), np.zeros(5))
    with pytest.raises(DataError, match="got 1 selected and 4 densities"):
        selected_alignment([1], np.zeros(5), np.zeros(4))
