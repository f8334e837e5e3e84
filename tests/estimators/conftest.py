"""The built-in model, and an SAE for it."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # libraries that change warning filters do so when they are first imported; here, before the guard looks
    import datasets  # noqa: F401
    import sympy  # noqa: F401

import pytest
import torch

from saekit.models.language import LanguageModel
from saekit.models.loading import load_model
from saekit.sae import rules
from saekit.sae.model import SAE

LAYER = 1


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    """The built-in model."""
    return load_model("builtin")


@pytest.fixture(scope="session")
def sae(lm: LanguageModel) -> SAE:
    """An SAE with random directions, enough to tell texts apart."""
    W = torch.randn(300, lm.d_model, generator=torch.Generator().manual_seed(0)) / lm.d_model**0.5
    return SAE(
        W, torch.zeros(300), W, torch.zeros(lm.d_model), rules.TopKRule(8), provenance={"hook": f"layers.{LAYER}"}
    )


@pytest.fixture
def texts() -> list[str]:
    """Forty short texts of two kinds, see `labels`."""
    returns = [
        f"Return the {word} of an array of {n} numbers." for n in range(5) for word in ("sum", "mean", "sign", "rank")
    ]
    raises = [
        f"Raises an error if the {word} is missing, {n} times."
        for n in range(5)
        for word in ("file", "key", "axis", "name")
    ]
    return [text for pair in zip(returns, raises) for text in pair]


@pytest.fixture
def labels() -> list[str]:
    """What each text is about."""
    return ["returns", "raises"] * 20
