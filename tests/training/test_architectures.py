"""The table of architectures: names, files, initial values."""

import pytest
import torch

from fixtures.learners import new, rows
from saekit.errors import ConfigError
from saekit.training.architectures import ARCHITECTURES, config_from_dict, config_to_dict, name_of
from saekit.training.config import BatchTopK, Gated, HierarchicalTopK, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from saekit.training.step import plain_step

EXAMPLES = [
    TopK(64, k=4, multi_topk=0.125),
    BatchTopK(64, k=4, control="frozen-decoder"),
    JumpReLU(64, target_l0=4),
    ReLU(64, l1=3.0),
    Gated(64, target_l0=8),
    PAnneal(64, p_end=0.5),
    Matryoshka(64, k=4, sizes=(16, 64), weights=(1.0, 2.0), over="batchtopk"),
    HierarchicalTopK(64, k=12, levels=(3, 12), weights=(1.0, 2.0)),
]


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda c: c.arch)
def test_dict_round_trip(config):
    settings = config_to_dict(config)
    assert settings["arch"] == config.arch
    assert config_from_dict(settings) == config
    assert hash(config_from_dict(settings)) == hash(config)


def test_files_say_latents_and_python_says_n_latents():
    assert config_to_dict(TopK(n_latents=8, k=2))["latents"] == 8
    for name in ("latents", "n_latents"):
        assert config_from_dict({"arch": "topk", name: 8, "k": 2}) == TopK(n_latents=8, k=2)
    with pytest.raises(ConfigError, match="both"):
        config_from_dict({"arch": "topk", "latents": 8, "n_latents": 8, "k": 2})


def test_every_architecture_is_in_the_table():
    assert set(ARCHITECTURES) == {
        "relu",
        "topk",
        "batchtopk",
        "jumprelu",
        "gated",
        "p-anneal",
        "matryoshka",
        "hierarchical-topk",
    }
    assert {config.arch for config in EXAMPLES} == set(ARCHITECTURES)


def test_names_say_what_sets_the_sparsity():
    assert [name_of(config) for config in EXAMPLES] == [
        "topk-64-k4", "batchtopk-64-k4-frozen-decoder", "jumprelu-64-l0-4", "relu-64-l1-3", "gated-64-l0-8",
        "p-anneal-64-l1-2", "matryoshka-64-k4", "hierarchical-topk-64-k12",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"arch": "topk", "latents": 8, "k": 2, "lerning_rate": 1}, r"unknown setting `lerning_rate` of TopK"),
        ({"arch": "topk", "latents": 8, "k": 2, "warmup_step": 1}, r"Did you mean `warmup_steps`"),
        (
            {"arch": "topq", "latents": 8},
            r"`arch` must be the name of an architecture; got 'topq'. Did you mean `topk`",
        ),
        ({"latents": 8}, r"`arch` must be the name of an architecture; got None"),
        ({"arch": "topk", "latents": 8}, r"`TopK.k` must be given"),
    ],
)
def test_refused_settings(settings, match):
    with pytest.raises(ConfigError, match=match):
        config_from_dict(settings)


@pytest.mark.parametrize("kind", [ReLU, Gated, PAnneal])
def test_penalized_learners_start_near_their_target_l0(kind):
    # Half of 256 latents would fire from a bias of 0; the start is twice the target.
    statistics = plain_step(new(kind(256, target_l0=6)), torch.cat(rows(4)))
    assert 6 < float(statistics.fired) / statistics.rows < 20
