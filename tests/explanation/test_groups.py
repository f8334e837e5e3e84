"""Groups of latents come from results about the same SAE, and each has the means of its own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from saekit import SAE
from saekit.errors import ConfigError
from saekit.explanation.groups import (
    groups_of,
    other_explanations,
    place_of_explanation,
    scores_by_group,
    scores_of_others,
)
from saekit.explanation.nulls import Scored
from saekit.sae.naming import shape_of
from saekit.sae.rules import ReLURule, TopKRule

N = 6


@pytest.fixture(scope="module")
def sae():
    W = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
    return SAE(W, torch.zeros(N), W, torch.zeros(4), TopKRule(2))


def results(sae):
    digest = sae.digest()
    return {
        "comparison": {
            "saes": [{"sae": {"digest": "x"}}, {"sae": {"digest": digest}, "stability": [1, 0.5, 0, 0, 1, 0.4]}]
        },
        "size_curve": {"sae": {"digest": digest}, "points": [{"size": 2}, {"size": 4}, {"size": N}]},
        "classification": {
            "saes": [{"name": "a", "digest": digest}],
            "arms": [
                {"source": "a", "selected": [0, 3]},
                {"source": "a", "selected": list(range(N))},
                {"source": "other", "selected": [1]},
            ],
        },
    }  # fmt: skip


def test_groups_of_each_kind_of_result(sae, tmp_path):
    for kind, rest in results(sae).items():
        (tmp_path / f"{kind}.json").write_text(json.dumps({"kind": kind, **rest}))
    found = groups_of(sae, [tmp_path])
    told = {by: {name: np.flatnonzero(mask).tolist() for name, mask in named.items()} for by, named in found.items()}
    assert told == {
        "sharing": {"shared": [0, 1, 4], "orphan": [2, 3, 5]},
        "size": {"1–2": [0, 1], "3–4": [2, 3], "5–6": [4, 5]},
        "selection": {"selected": [0, 3], "not selected": [1, 2, 4, 5]},
    }
    scored = Scored(np.array([3, 3, 0, 3, 3, 3]), {"detection": np.arange(6) / 10})
    groups = {(each.by, each.name): each for each in scores_by_group(scored, found)}
    assert groups["sharing", "orphan"].n_latents == 2
    assert groups["sharing", "orphan"].scores["detection"].value == pytest.approx(0.4)


def test_results_about_other_saes_are_refused(sae, tmp_path):
    other = sae.replace(b_enc=torch.ones(N))
    for kind, rest in results(other).items():
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps({"kind": kind, **rest}))
        with pytest.raises(ConfigError, match="it holds none"):
            groups_of(sae, [path])
    with pytest.raises(ConfigError, match="does not exist"):
        groups_of(sae, [tmp_path / "nowhere"])
    assert groups_of(sae, []) == {}


def test_explanations_of_other_saes_are_groups_of_their_architecture(sae, tmp_path):
    W = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    provenance = {"config": {"arch": "relu", "target_l0": 2.0}, "seed": 5}
    other = SAE(W, torch.zeros(3), W, torch.zeros(4), ReLURule(), provenance=provenance)
    value = {"value": 0.75, "low": 0.7, "high": 0.8, "unit": "AUC", "reason": ""}
    plain = {
        "kind": "explanation", "sae": {**shape_of(other), "digest": other.digest(), "provenance": provenance},
        "model": {"model_digest": "m"}, "data": {"digest": "d"}, "hook": "layers.1", "settings": {"tokens": 10},
        "scores": [{"name": "detection", "value": value}], "fired_fraction": 2 / 3,
    }  # fmt: skip
    mine = {**plain, "sae": {**plain["sae"], "digest": sae.digest()}}  # an earlier one of the same SAE
    for name, each in {"other": plain, "mine": mine}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(each))
    assert groups_of(sae, [tmp_path]) == {}
    others = other_explanations(sae, place_of_explanation(plain), [tmp_path])
    scored = Scored(np.array([3, 3, 0, 3, 3, 3]), {"detection": np.arange(6) / 10})
    groups = scores_of_others(sae, scored, others)
    assert [(each.by, each.name, each.n_latents) for each in groups] == [
        ("architecture", "topk-6-k2", 5), ("architecture", "relu-3-l0-2-seed5", 2)
    ]  # fmt: skip
    assert [each.scores["detection"].value for each in groups] == pytest.approx([0.26, 0.75])
    assert scores_of_others(sae, scored, []) == []
    with pytest.raises(ConfigError, match=r"another hook: layers\.1, not layers\.2"):
        other_explanations(sae, place_of_explanation({**plain, "hook": "layers.2"}), [tmp_path])
    with pytest.raises(ConfigError, match="must hold a result about this SAE"):
        groups_of(sae, [tmp_path / "mine.json"])
