"""No option of a configuration is silent: each changes what is trained, or is refused where it would not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from saekit import ArrayRows, Matryoshka, TopK, TrainSettings, train
from saekit.errors import ConfigError
from saekit.training.architectures import ARCHITECTURES, config_from_dict
from saekit.training.config import _NEEDS, Config
from saekit.training.request import STARTED

D, N, ROWS = 8, 24, 384
OTHER: dict[str, Any] = {
    "n_latents": 20,
    "k": 3,
    "lr": 0.003,
    "betas": (0.8, 0.99),
    "warmup_steps": 9,
    "decay_fraction": 0.9,
    "clip": 1e-3,
    "dead_after_rows": 128,
    "encoder_length": 0.7,
    "bias": "zero",
    "scaling": "none",
    "control": "frozen-encoder",
    "mutual": 0.3,
    "aligned": True,
    "l2": 0.1,
    "orthogonal": 0.2,
    "orthogonal_chunk": 5,
    "subspace": 0.5,
    "skip": "zero",
    "aux_coefficient": 0.5,
    "k_aux": 2,
    "multi_topk": 0.5,
    "k_start": 9,
    "k_fraction": 0.7,
    "sign": "magnitude",
    "incoherence": 0.2,
    "levels": (2,),
    "weights": (0.1, 0.9),
    "parts": (3, 5),
    "target_l0": 4.0,
    "sparsity": 1.0,
    "tanh": 0.02,
    "tanh_scale": 1.0,
    "pre_activation": 0.01,
    "bandwidth": 0.7,
    "density": 0.5,
    "density_at": 0.6,
    "l1": 0.5,
    "resample": False,
    "p_end": 0.6,
    "p_start_fraction": 0.7,
    "p_updates": 3,
    "sizes": (5, N),
    "balance": 0.5,
    "sampled": 2,
    "over": "batchtopk",
    "k_per_size": "scaled",
    "detached": True,
    "aux_per_size": True,
}
"""A value of every field that is not its default."""

ENOUGH: dict[str, dict[str, Any]] = {
    "topk": {"k": 2},
    "batchtopk": {"k": 2},
    "hierarchical-topk": {"k": 2},
    "matryoshka": {"k": 2},
    "jumprelu": {"target_l0": 2.0},
    "relu": {"target_l0": 2.0},
    "gated": {"target_l0": 2.0},
    "p-anneal": {"target_l0": 2.0},
}
"""What each architecture must be given."""


def names() -> list[tuple[str, str]]:
    """Every field, those that all architectures have once."""
    common = {f.name for f in dataclasses.fields(Config)}
    return [
        (arch, f.name)
        for arch, row in ARCHITECTURES.items()
        for f in dataclasses.fields(row.config)
        if arch == "topk" or f.name not in common
    ]


def run(arch: str, **settings: Any) -> str:
    """Train and return the digest."""
    given = {"n_latents": N, "dead_after_rows": 64, "lr": 0.03, **ENOUGH[arch], **settings}
    rows = ArrayRows(_rows())
    seeds = [0, 1] if given.get("mutual") else [0]
    saes = train(
        config_from_dict({"arch": arch, **given}), rows, seeds=seeds, settings=TrainSettings(batch_rows=32),
        progress=False,
    )  # fmt: skip
    return saes[0].digest()


def attempt(arch: str, **settings: Any) -> str | ConfigError:
    try:
        return run(arch, **settings)
    except ConfigError as error:
        return error


def _rows() -> torch.Tensor:
    stream = torch.Generator().manual_seed(0)
    codes = torch.randn(ROWS, 12, generator=stream).relu() * (torch.rand(ROWS, 12, generator=stream) < 0.3)
    return codes @ torch.randn(12, D, generator=stream) + 1


@pytest.fixture(scope="module")
def plain() -> dict[str, str]:
    return {arch: run(arch) for arch in ARCHITECTURES}


@pytest.mark.parametrize(("arch", "name"), names())
def test_a_field_changes_the_run_or_is_refused(arch: str, name: str, plain: dict[str, str]):
    about = _NEEDS.get(name)
    if name in ("skip", "parts"):  # of transcoders and crosscoders; other rows refuse them
        with pytest.raises(ConfigError, match=name):
            run(arch, **{name: OTHER[name]})
        return
    base, wanted = {}, plain[arch]
    if name == "weights" and arch == "matryoshka":
        base = {"sizes": OTHER["sizes"]}
        wanted = run(arch, **base)
    if name == "incoherence":
        base = {"sign": "magnitude"}
        wanted = run(arch, **base)
    found = attempt(arch, **base, **{name: OTHER[name]})
    if isinstance(found, ConfigError):
        assert name in str(found)
        if about is None:  # it cannot be had with this architecture at all
            return
        base = {about: OTHER[about]}
        wanted, found = run(arch, **base), run(arch, **base, **{name: OTHER[name]})
    assert found != wanted


@pytest.mark.parametrize("name", STARTED)
def test_what_a_warm_start_brings_itself_is_refused(name: str):
    rows = ArrayRows(_rows())
    config = TopK(N, k=2)
    [sae] = train(config, rows, settings=TrainSettings(batch_rows=32), progress=False)
    with pytest.raises(ConfigError, match=f"`TopK.{name}` must be left out with `start`"):
        train(dataclasses.replace(config, **{name: OTHER[name]}), rows, start=sae, progress=False)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_field_about_one_that_is_left_out_is_refused(arch: str):
    kind = ARCHITECTURES[arch].config
    names = {f.name for f in dataclasses.fields(kind)}
    for name, about in _NEEDS.items():
        if {name, about} <= names:
            with pytest.raises(ConfigError, match=f"`{kind.__name__}.{name}` is about `{about}`, which is"):
                config_from_dict(
                    {
                        "arch": arch,
                        "n_latents": N,
                        **ENOUGH[arch],
                        about: None if about == "k_start" else 0.0,
                        name: OTHER[name],
                    }
                )


def test_a_field_of_another_architecture_is_told_with_its_name():
    with pytest.raises(ConfigError, match="`sign` is a setting of `TopK` only"):
        Matryoshka(N, k=2, sign="magnitude")
    with pytest.raises(ConfigError, match=r"unknown setting `tanh` of TopK\. `tanh` is a setting of `JumpReLU` only"):
        config_from_dict({"arch": "topk", "latents": N, "k": 2, "tanh": 1.0})
