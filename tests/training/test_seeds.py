"""Seeds per configuration: a list for each, in the same one pass."""

from __future__ import annotations

import pytest
import torch

from saekit.errors import ConfigError
from saekit.rows.synthetic import SyntheticRows
from saekit.training.config import ReLU, TopK
from saekit.training.loop import train
from saekit.training.settings import TrainSettings

ROWS = SyntheticRows(d_in=8, n_features=16, n_rows=1024)
CONFIGS = [TopK(n_latents=16, k=4), ReLU(n_latents=16)]


def test_each_configuration_gets_its_own_seeds_and_nothing_else_changes(tmp_path):
    some = train(CONFIGS, ROWS, seeds=[[0, 1], [3]], settings=TrainSettings(batch_rows=128), out=tmp_path / "a")
    assert [sae.provenance["seed"] for sae in some] == [0, 1, 3]
    assert [sae.rule.name for sae in some] == ["topk", "topk", "relu"]
    assert sorted(p.parent.name[-5:] for p in (tmp_path / "a").glob("*/sae.json")) == ["seed0", "seed1", "seed3"]
    alone = train(CONFIGS[1], ROWS, seeds=3, settings=TrainSettings(batch_rows=128))[0]
    assert torch.equal(some[2].W_dec, alone.W_dec)
    again = train(
        CONFIGS, ROWS, seeds=[[0, 1], [3]], settings=TrainSettings(batch_rows=128), out=tmp_path / "a", resume=True
    )
    assert torch.equal(again[1].W_enc, some[1].W_enc)


@pytest.mark.parametrize("seeds", [[[0]], [[0], 1], [[0], [1], [2]]])
def test_lists_that_do_not_fit_the_configurations(seeds):
    with pytest.raises(ConfigError, match="one list of them for each of the 2 configurations"):
        train(CONFIGS, ROWS, seeds=seeds, settings=TrainSettings(batch_rows=128))


@pytest.mark.parametrize("seeds", [[[0, 0], [1]], [[], [1]], [["a"], [1]]])
def test_seeds_of_one_configuration_must_differ(seeds):
    with pytest.raises(ConfigError, match="`seeds` must be different whole numbers"):
        train(CONFIGS, ROWS, seeds=seeds, settings=TrainSettings(batch_rows=128))
