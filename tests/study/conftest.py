"""SAEs whose behaviour is known, and rows to evaluate them on."""

from __future__ import annotations

import pytest
import torch

from saekit.data import SyntheticRows
from saekit.sae import SAE
from saekit.sae.rules import JumpReLU, ReLU, TopK


@pytest.fixture(scope="session")
def synthetic() -> SyntheticRows:
    """Rows with a known dictionary: 48 directions in 24 dimensions, 2 at a time."""
    return SyntheticRows(d_in=24, n_features=48, l0=2, n_rows=3000, mean=1.0, rows_per_document=30)


@pytest.fixture(scope="session")
def rows(synthetic: SyntheticRows) -> torch.Tensor:
    """The same rows ``[3000, 24]`` in memory."""
    return torch.cat([batch.x for batch in synthetic.batches(4096)])


@pytest.fixture(scope="session")
def oracle(synthetic: SyntheticRows) -> SAE:
    """An SAE whose decoder is the true dictionary."""
    D, offset = synthetic.dictionary, synthetic.offset
    return SAE(W_enc=D, b_enc=torch.zeros(len(D)), W_dec=D, b_dec=offset, b_pre=offset, rule=TopK(2))


@pytest.fixture(scope="session")
def thresholded(oracle: SAE) -> SAE:
    """The same with a threshold for each latent."""
    return oracle.replace(rule=JumpReLU(torch.full((oracle.n_latents,), 0.7)))


@pytest.fixture(scope="session")
def identity():
    """Makes an SAE with latents for both directions of every axis: it reconstructs anything, exactly."""

    def make(d: int) -> SAE:
        W = torch.cat([torch.eye(d), -torch.eye(d)])
        return SAE(W_enc=W, b_enc=torch.zeros(2 * d), W_dec=W, b_dec=torch.zeros(d), rule=ReLU())

    return make


@pytest.fixture(scope="session")
def constant():
    """Makes an SAE that always answers the given row."""

    def make(row: torch.Tensor) -> SAE:
        W = torch.eye(len(row))
        return SAE(W_enc=W, b_enc=torch.zeros(len(row)), W_dec=torch.zeros_like(W), b_dec=row, rule=ReLU())

    return make
