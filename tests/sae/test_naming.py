"""What tables call SAEs, and which can be measured together."""

from __future__ import annotations

import math

import pytest
import torch

from saekit.errors import ConfigError, DataError, ShapeError
from saekit.rows.synthetic import SyntheticRows
from saekit.sae.model import SAE
from saekit.sae.naming import as_sae, common_width, name_of, named_saes, shape_of
from saekit.sae.rules import ReLURule, TopKRule
from saekit.sizes.families import name_saes
from saekit.training.config import (
    BatchTopK,
    Gated,
    HierarchicalTopK,
    JumpReLU,
    Matryoshka,
    PAnneal,
    ReLU,
    TopK,
)
from saekit.training.loop import train
from saekit.training.settings import TrainSettings


def sae_of(n: int = 6, d: int = 4, rule=None, **provenance) -> SAE:
    W = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
    return SAE(
        W_enc=W, b_enc=torch.zeros(n), W_dec=W, b_dec=torch.zeros(d), rule=rule or TopKRule(2), provenance=provenance
    )


@pytest.mark.parametrize(
    ("sae", "name"),
    [
        (sae_of(), "topk-6-k2"),
        (sae_of(rule=ReLURule()), "relu-6"),
        (sae_of(seed=0, config={"arch": "batchtopk", "k": 8}), "batchtopk-6-k8-seed0"),
        (sae_of(seed=1, rows_seen=0), "topk-6-k2-untrained-seed1"),
        (sae_of(config={"control": "frozen-decoder"}), "topk-6-k2-frozen-decoder"),
        (sae_of(consensus={"of": []}), "topk-6-k2-consensus"),
        (sae_of(config="unreadable"), "topk-6-k2"),
    ],
)
def test_names_say_what_is_known(sae, name):
    assert name_of(sae) == name


def test_names_are_unique_and_paths_are_called_by_their_folder(tmp_path):
    sae_of().save(tmp_path / "mine")
    named = named_saes([sae_of(), sae_of(), tmp_path / "mine", str(tmp_path / "mine")], "here")
    assert [name for name, _ in named] == ["topk-6-k2", "topk-6-k2 (2)", "mine", "mine (2)"]
    assert named_saes(sae_of(), "here")[0][0] == "topk-6-k2"
    assert torch.equal(as_sae(tmp_path / "mine").W_dec, sae_of().W_dec)
    with pytest.raises(ConfigError, match="here: at least one SAE must be given"):
        named_saes([], "here")


def test_saes_that_cannot_be_measured_together_are_refused():
    assert common_width([("a", sae_of()), ("b", sae_of(9))], "here") == 4
    with pytest.raises(ShapeError, match="here: all SAEs must have one width; `b` has 5, others 4"):
        common_width([("a", sae_of()), ("b", sae_of(6, 5))], "here")
    transcoder = sae_of().replace(W_dec=torch.ones(6, 3), b_dec=torch.zeros(3))
    assert common_width([("a", transcoder)], "here") == 4
    with pytest.raises(ShapeError, match="`b` has 4 in and 3 out, others 4"):
        common_width([("a", sae_of()), ("b", transcoder)], "here")
    other = sae_of().replace(provenance={"hook": "layers.1.mlp.input", "hook_out": "layers.1.mlp"})
    assert common_width([("a", other), ("b", other)], "here") == 4
    with pytest.raises(ConfigError, match=r"`b` is a transcoder to `layers.1.mlp`, the first is an SAE"):
        common_width([("a", sae_of()), ("b", other)], "here")
    with pytest.raises(DataError, match="`b_dec` holds NaN"):
        common_width([("a", sae_of().replace(b_dec=torch.full((4,), math.nan)))], "here")


def test_the_shape_is_plain():
    assert shape_of(sae_of()) == {"n_latents": 6, "d_in": 4, "rule": {"name": "topk", "k": 2}}


@pytest.mark.parametrize(
    "config",
    [
        TopK(8, k=2), TopK(8, k=2, control="frozen-decoder"), TopK(8, k=2, mutual=0.1), ReLU(8, target_l0=2),
        ReLU(8, l1=0.5), JumpReLU(8, target_l0=2), BatchTopK(8, k=2), Matryoshka(8, k=2), Gated(8, target_l0=2.5),
        HierarchicalTopK(8, k=2), PAnneal(8, target_l0=2),
    ],
    ids=repr,
)  # fmt: skip
def test_an_sae_has_one_name_as_a_value_in_a_folder_and_in_every_table(config, tmp_path):
    rows = SyntheticRows(d_in=4, n_features=8, n_rows=256)
    seeds = [3, 4] if config.mutual else [3]
    sae = train(config, rows, seeds=seeds, settings=TrainSettings(batch_rows=128), out=tmp_path / "run")[0]
    [folder] = [path.parent.name for path in (tmp_path / "run").glob("*-seed3/sae.json")]
    assert name_of(sae) == folder
    assert name_of(SAE.load(tmp_path / "run" / folder)) == folder
    [(named, _)] = named_saes(sae, "evaluate")
    assert named == folder
    if not config.control:
        assert [*name_saes(sae)] == [folder]
