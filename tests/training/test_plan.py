"""What a distributed run costs, against the numbers of the table that the formulas were made for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from saekit import kernels
from saekit.cli import app
from saekit.errors import ConfigError
from saekit.kernels import reference
from saekit.training import dense_autograd
from saekit.training.config import BatchTopK, Gated, HierarchicalTopK, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from saekit.training.defaults import resolve
from saekit.training.learner import initialize_learner
from saekit.training.plan import bytes_per_step, cost_of, held_bytes, meshes
from saekit.training.settings import PlanSettings
from saekit.training.step import plain_step

GEMMA = PlanSettings()


class Counted(TorchDispatchMode):
    """The most bytes that tensors hold at a time in the block, and the largest of them that the block made."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self.alive = {each.untyped_storage()._cdata: self.of(each) for each in held}
        self.peak, self.largest, self.before = 0, 0, set(self.alive)

    @staticmethod
    def of(tensor):
        storage = tensor.untyped_storage()
        return StorageWeakRef(storage), storage.nbytes()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for each in torch.utils._pytree.tree_leaves(out):
            if isinstance(each, torch.Tensor):
                key = each.untyped_storage()._cdata
                self.alive[key] = self.of(each)
                self.largest = max(self.largest, 0 if key in self.before else self.alive[key][1])
        self.alive = {key: each for key, each in self.alive.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def counted_step(config, d, rows):
    """Return what a step of a learner with moments holds."""
    x = torch.randn(rows, d, generator=torch.Generator().manual_seed(0))
    with kernels.using("plain"):
        how = resolve(config, d, 10, rows)
        learner = initialize_learner(config, 0, how, bias=x.mean(0), scale=None, sample=x, device="cpu")
        learner.step = 4  # P-anneal takes powers
        plain_step(learner, x)
        held = [learner.parameters, learner.first_moments, learner.second_moments]
        with Counted([each for group in held for each in group.values()]) as counted:
            plain_step(learner, x)
    return counted


@pytest.mark.parametrize(
    "config",
    [TopK(8192, k=8), BatchTopK(8192, k=8), Matryoshka(8192, k=8, over="batchtopk"), HierarchicalTopK(8192, k=8)],
    ids=lambda config: f"{config.arch} {getattr(config, 'over', '')}",
)
def test_a_step_holds_the_bytes_of_the_formula_and_no_array_of_all_rows_and_latents(monkeypatch, config):
    n, d, rows, block = 8192, 64, 256, 2**18
    monkeypatch.setattr(reference, "BLOCK_BYTES", block)
    counted = counted_step(config, d, rows)
    assert counted.largest < 4 * rows * n
    assert counted.peak == pytest.approx(held_bytes(n, d, rows, 1, block), rel=0.05)


@pytest.mark.parametrize("dead", [None, 512])
@pytest.mark.parametrize(
    "config",
    [
        ReLU(4096),
        PAnneal(4096, p_start_fraction=0.0),
        Gated(4096, target_l0=8),
        JumpReLU(4096, target_l0=8, density=0.1),
        JumpReLU(4096, target_l0=8, tanh=0.1, pre_activation=0.1),
    ],
    ids=lambda config: f"{config.arch} {getattr(config, 'tanh', '')}",
)
def test_dense_codes_are_a_few_blocks(monkeypatch, config, dead):
    n, d, rows, block = config.n_latents, 64, 512, 2**21
    monkeypatch.setattr(reference, "BLOCK_BYTES", block)
    monkeypatch.setattr(dense_autograd, "LEAST_ROWS", 10**6)  # blocks as large as may be, as on a GPU
    counted = counted_step(replace(config, dead_after_rows=dead), d, rows)
    bound = held_bytes(n, d, rows, 1, block, dense=True)
    assert counted.largest <= block < 4 * rows * n
    assert counted.peak <= 1.05 * bound
    if config.arch == "gated":  # which has the most
        assert counted.peak >= 0.95 * bound


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
