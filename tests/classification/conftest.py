"""Fixtures of these tests."""

from __future__ import annotations

import pytest
import torch

from fixtures.worded_classes import COMMON, plan_of, table
from saekit import SAE, load_model
from saekit.classification.run import run_plan
from saekit.sae.rules import TopKRule


@pytest.fixture(scope="session")
def lm():
    return load_model("builtin")


@pytest.fixture(scope="session")
def sae(lm) -> SAE:
    generator = torch.Generator().manual_seed(5)
    W = torch.randn(64, lm.d_model, generator=generator)
    return SAE(
        W_enc=W, b_enc=torch.zeros(64), W_dec=W, b_dec=torch.zeros(lm.d_model), rule=TopKRule(6),
        provenance={"hook": "layers.1", "seed": 5},
    )  # fmt: skip


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    return table(160)


@pytest.fixture(scope="session")
def full_run(lm, sae, rows, tmp_path_factory):
    """Every kind of arm, with low-data curves, in a folder."""
    out = tmp_path_factory.mktemp("classify")
    plan = plan_of(
        lm, sae, rows, label="label", group="pair", **{**COMMON, "pools": ("sum", "count")}, train_sizes=(40,), out=out
    )
    return plan, run_plan(plan)
