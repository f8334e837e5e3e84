"""Controls are as large as the edit, elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit.errors import DataError
from saekit.explanation.directions import covariance_directions, other_latents, with_directions, written_rows
from saekit.explanation.edits import Edit, difference_of, written_by
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule
from saekit.sae.scaling import Scaling

N, D = 20, 6


def made(seed=0, scaling=None):
    generator = torch.Generator().manual_seed(seed)
    W, W_dec = (torch.randn(N, D, generator=generator) for _ in range(2))
    return SAE(W, torch.zeros(N), W_dec, torch.zeros(D), TopKRule(4), scaling=scaling or Scaling())


SCALINGS = [
    Scaling(),
    Scaling("layer_norm"),
    Scaling("standardize", scale=torch.linspace(0.5, 3, D), mean=torch.zeros(D)),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda each: each.kind)
@given(seed=st.integers(0, 20))
def test_a_control_adds_as_much_at_the_same_rows(scaling, seed):
    generator = torch.Generator().manual_seed(seed)
    sae, x = made(seed, scaling), torch.randn(11, D, generator=generator)
    control = with_directions(sae, [3, 7], torch.randn(2, D, generator=generator))
    codes = sae.encode(x)
    assert torch.equal(control.encode(x).to_dense(), codes.to_dense())
    for edits in ({3: Edit.set(2)}, {7: Edit.ablate()}):
        difference = difference_of(codes, edits)
        mine, its = (written_by(each, difference, x) for each in (sae, control))
        torch.testing.assert_close(its.norm(dim=1), mine.norm(dim=1), atol=1e-5, rtol=1e-4)


def test_a_control_writes_along_the_direction_given():
    sae = made(scaling=SCALINGS[2])
    direction = torch.randn(1, D, generator=torch.Generator().manual_seed(1))
    written = written_rows(with_directions(sae, [5], direction), [5])
    torch.testing.assert_close(torch.cosine_similarity(written, direction), torch.ones(1))
    with pytest.raises(DataError):
        with_directions(sae, [5], torch.zeros(1, D))


def test_other_latents_fire_about_as_often():
    density = np.logspace(-4, -0.5, N)
    density[2] = 0
    sae = made()
    W_dec = sae.W_dec.clone()
    W_dec[11] = 0
    sae = sae.replace(W_dec=W_dec)
    found = other_latents(sae, [10], 3, 0, density)
    nearest = sorted((j for j in range(N) if j not in (2, 10, 11)), key=lambda j: abs(np.log(density[j] / density[10])))
    assert len(set(found)) == 3
    assert set(found) <= set(nearest[:12])
    assert set(other_latents(sae, [10], 100, 0)) == set(range(N)) - {10, 11}
    assert list(other_latents(sae, [10], 3, 0, density)) == list(found)


def test_directions_have_the_covariance_of_the_rows():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([10.0, 3, 1, 0.3, 0.1, 0])
    rows = torch.randn(2000, D, generator=generator) * scales + 50
    drawn = covariance_directions(rows, 500, 1)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(500, dtype=torch.float64))
    assert float((drawn[:, 0].abs() > 0.5).double().mean()) > 0.7
    assert float(drawn[:, 5].abs().max()) < 1e-12
    assert torch.equal(covariance_directions(rows, 500, 1), drawn)
    assert not torch.equal(covariance_directions(rows, 500, 2), drawn)
