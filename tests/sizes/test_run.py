"""The studies behind `saekit prune` and `saekit progressive`, as library calls."""

from __future__ import annotations

import pytest
import torch

from saekit.errors import ConfigError
from saekit.rows.split import halves
from saekit.sae.model import SAE
from saekit.sizes.progressive import progressive
from saekit.sizes.prune import prune
from saekit.sizes.ranking import rank
from saekit.sizes.result import SizeCurve
from saekit.sizes.run import study_progressive, study_pruning
from saekit.sizes.settings import (
    ProgressiveSettings,
    ProgressiveStudySettings,
    PruneSettings,
    PruningStudySettings,
    SizeSettings,
)
from saekit.sizes.size_curve import measure_sizes

QUICK = {"sample_rows": 60}


def test_it_ranks_on_one_half_and_measures_on_the_other(oracle, synthetic):
    found = study_pruning(oracle, synthetic, sizes=[4, 12], settings=PruningStudySettings(**QUICK))
    first, second = halves(synthetic)
    ranked = rank(oracle, first)
    assert torch.equal(found.ranked.W_dec, ranked.W_dec)
    assert found.curve == measure_sizes(ranked, second, [4, 12, 48], name="SAE", settings=SizeSettings(**QUICK))
    assert [each.n_latents for each in found.saes] == [4, 12]


@pytest.mark.parametrize("how", [{"refit": True}, {"selection": "after"}])
def test_the_curve_is_of_the_small_saes_where_they_are_no_prefixes(oracle, synthetic, how, tmp_path):
    settings = PruningStudySettings(**how, **QUICK)
    found = study_pruning(oracle, synthetic, sizes=[4, 12], settings=settings)
    small = prune(rank(oracle, halves(synthetic)[0]), halves(synthetic)[0], by="unsorted", sizes=[4, 12],
                  settings=PruneSettings(**how))  # fmt: skip
    assert found.curve.sizes == [4, 12]
    assert torch.equal(found.saes[0].W_dec, small[0].W_dec)
    found.save(tmp_path)
    assert SizeCurve.load(tmp_path / "sizes.json") == found.curve
    assert torch.equal(SAE.load(tmp_path / "progressive", latents=4).W_dec, found.ranked.take(4).W_dec)
    assert SAE.load(tmp_path / "12").n_latents == 12
    assert found.to_json(tmp_path)["saes"] == [str(tmp_path / "4"), str(tmp_path / "12")]


def test_an_older_curve_never_lies_beside_newer_saes(oracle, synthetic, tmp_path, monkeypatch):
    found = study_pruning(oracle, synthetic, sizes=[4, 12], settings=PruningStudySettings(**QUICK))
    save = SAE.save
    for n_saved in range(3):
        found.save(tmp_path)
        saved = []

        def stop(sae, path, saved=saved, n_saved=n_saved):
            if len(saved) == n_saved:
                raise KeyboardInterrupt
            saved.append(save(sae, path))

        with monkeypatch.context() as patch:
            patch.setattr(SAE, "save", stop)
            with pytest.raises(KeyboardInterrupt):
                found.save(tmp_path)
        assert not (tmp_path / "sizes.json").exists()
    found.save(tmp_path)
    assert SizeCurve.load(tmp_path / "sizes.json") == found.curve


def test_a_gradient_needs_a_model(oracle, synthetic):
    with pytest.raises(ConfigError, match="`attribution` is a gradient of a language model"):
        study_pruning(oracle, synthetic, sizes=[4], by="attribution")


def test_progressive_on_halves(oracle, synthetic):
    settings = {"by": ("energy",), "latents": False, **QUICK}
    found = study_progressive(oracle, synthetic, sizes=[4, 48], settings=ProgressiveStudySettings(**settings))
    first, second = halves(synthetic)
    assert found == progressive(
        oracle, second, fit=first, sizes=[4, 48], settings=ProgressiveSettings(tokens=0, **settings)
    )
