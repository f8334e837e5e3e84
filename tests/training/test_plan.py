"""What a distributed run costs, against the numbers of the table that the formulas were made for."""

from __future__ import annotations

import json

import pytest

from saekit.cli import app
from saekit.errors import ConfigError
from saekit.training.plan import bytes_per_step, cost_of, meshes
from saekit.training.settings import PlanSettings

GEMMA = PlanSettings()


@pytest.mark.parametrize(
    ("data_size", "latent_size", "compute", "sent", "wire"),
    [
        (1, 1, 22.4, 0, 0),
        (8, 1, 13.1, 6.58, 14.6),
        (4, 2, 7.2, 2.84, 6.3),
        (2, 4, 4.3, 0.99, 2.2),
        (1, 8, 2.8, 0.11, 0.24),
    ],
)
def test_one_layer_of_gemma_2_9b(data_size, latent_size, compute, sent, wire):
    cost = cost_of(GEMMA, 1, data_size, latent_size)
    assert 1e3 * cost.compute_seconds == pytest.approx(compute, abs=0.1)
    assert cost.sent / 1e9 == pytest.approx(sent, abs=0.02)
    assert 1e3 * cost.wire_seconds == pytest.approx(wire, abs=0.1)
    assert cost.sent == bytes_per_step(131072, 3584, 64, 4096, data_size, latent_size)


def test_the_best_mesh_splits_the_latents_of_a_node_and_spreads_layers():
    assert next((each.data_size, each.latent_size) for each in meshes(GEMMA)) == (1, 8)
    many = PlanSettings(gpus=64, layers=42)
    best = meshes(many)[0]
    assert best.groups >= 8
    assert all(each.memory <= many.memory for each in meshes(many))
    assert all(each.groups * each.data_size * each.latent_size == 64 for each in meshes(many))


def test_the_network_counts_between_nodes():
    assert cost_of(PlanSettings(gpus=64), 1, 64, 1).wire_seconds > 9 * cost_of(GEMMA, 1, 8, 1).wire_seconds


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gpus": 0}, "`gpus` must be a whole number from 1"),
        ({"k": 9, "n_latents": 8}, "`k` must be at most n_latents=8; got 9"),
        ({"flops": 0}, "`flops` must be a positive number; got 0"),
        ({"model_parameters": -1}, "`model_parameters` must be a number from 0; got -1"),
    ],
)
def test_plans_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        PlanSettings(**wrong)


def test_the_command_prints_the_fastest_first(capsys):
    assert app.run(["plan", "--gpus", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["meshes"]
    assert found[0]["latent_size"] == 8
    assert [each["seconds"] for each in found] == sorted(each["seconds"] for each in found)
    assert app.run(["plan", "--gpus", "7"]) == 2  # divides neither latents nor rows
    assert "none does" in capsys.readouterr().err
