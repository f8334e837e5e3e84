"""The two devices have the same functions, and what they pass on is the same on numpy arrays and on tensors."""

from __future__ import annotations

import importlib
import inspect
from types import FunctionType

import numpy as np
import pytest
import torch

from saekit.kernels import backend
from saekit.kernels.step_interface import Adam, Pairs, StepKernels

MEMBERS = sorted(name for name in vars(StepKernels) if not name.startswith("_"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_devices_have_every_function_with_the_same_signature(device: str) -> None:
    if device == "cpu" and (reason := backend.unavailable()):
        pytest.skip(f"no fast kernels here: {reason}")
    module = importlib.import_module(f"saekit.kernels.{device}.ops")
    for name in MEMBERS:
        wanted = getattr(StepKernels, name)
        if not isinstance(wanted, FunctionType):
            assert hasattr(module, name), name
            continue
        parameters = list(inspect.signature(wanted).parameters.values())[1:]  # without self
        got = inspect.signature(getattr(module, name)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in got] == [(p.name, p.kind, p.default) for p in parameters], name


def test_members_are_those_that_a_step_uses() -> None:
    assert {"encoder_at", "topk_pairs", "pairs_above", "reconstruct", "gradients", "descend"} <= set(MEMBERS)


@pytest.mark.parametrize("kept", ["none", "some", "all", "no pairs"])
def test_a_part_of_the_pairs_is_the_same_on_arrays_and_tensors(kept: str) -> None:
    offsets = np.array([0, 0, 2, 2, 5, 6, 6])
    latents, values = np.array([3, 1, 2, 0, 7, 5]), np.arange(6, dtype=np.float32)
    marked = {"none": [False] * 6, "some": [True, False, False, True, True, False], "all": [True] * 6, "no pairs": []}
    which = np.array(marked[kept], dtype=bool)
    if kept == "no pairs":
        offsets, latents, values = np.zeros(7, np.int64), latents[:0], values[:0]
    mine = Pairs(offsets, latents, values).where(which)
    row = np.repeat(np.arange(6), np.diff(offsets))[which]
    assert mine.offsets.tolist() == [0, *np.bincount(row, minlength=6).cumsum().tolist()]
    assert mine.latents.tolist() == latents[which].tolist()
    assert mine.values.tolist() == values[which].tolist()
    tensors = Pairs(*map(torch.from_numpy, (offsets, latents, values))).where(torch.from_numpy(which))
    for name in ("offsets", "latents", "values"):
        assert getattr(tensors, name).tolist() == getattr(mine, name).tolist()


def test_factors_are_those_of_adam() -> None:
    factors = Adam(lr=0.5, step=3, beta1=0.9, beta2=0.99, rates={"b": 10.0}).factors("b")
    expected = (0.1, 0.01, 5.0 / (1 - 0.9**3), (1 - 0.99**3) ** -0.5, 1e-8)
    assert factors == pytest.approx(expected)
