"""Edits change the codes they name, and no others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit.errors import ConfigError
from saekit.explanation.edits import AblateTop, Edit, checked_edits, columns_of, difference_of, written_by
from saekit.sae.codes import Codes
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule
from saekit.sae.scaling import Scaling

N = 12


def random_codes(seed: int, n_rows: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n_rows, N, generator=generator)
    return z * (torch.rand(n_rows, N, generator=generator) < 0.4)


EDITS = {
    "set": (Edit.set(2.5), lambda z: torch.full_like(z, 2.5)),
    "add": (Edit.add(-1.5), lambda z: z - 1.5),
    "scale": (Edit.scale(3), lambda z: 3 * z),
    "clamp": (Edit.clamp(-0.5, 0.25), lambda z: z.clamp(-0.5, 0.25)),
    "floor": (Edit.clamp(low=0.5), lambda z: z.clamp(min=0.5)),
    "ablate": (Edit.ablate(), torch.zeros_like),
}


@pytest.mark.parametrize("name", EDITS)
@given(seed=st.integers(0, 50))
def test_an_edit_changes_its_latent_alone(name, seed):
    edit, expected = EDITS[name]
    z = random_codes(seed)
    changed = z.clone()
    changed[:, 7] = expected(z[:, 7])
    difference = difference_of(Codes.from_dense(z), {7: edit})
    torch.testing.assert_close(difference.to_dense(), changed - z)
    assert difference.nnz == int((changed != z).sum())


@given(seed=st.integers(0, 50), m=st.integers(1, N + 2))
def test_ablating_the_top_leaves_the_rest(seed, m):
    z = random_codes(seed)
    left = Codes.from_dense(z).to_dense() + difference_of(Codes.from_dense(z), AblateTop(m)).to_dense()
    for before, after in zip(z, left, strict=True):
        order = before.abs().argsort(descending=True)
        expected = before.clone()
        expected[order[:m]] = 0
        assert torch.equal(after, expected)


@given(seed=st.integers(0, 20))
def test_columns_are_those_of_the_dense_array(seed):
    z = random_codes(seed)
    latents = torch.tensor([11, 0, 3])
    assert torch.equal(columns_of(Codes.from_dense(z), latents), z[:, latents])


@pytest.mark.parametrize(
    "scaling",
    [Scaling(), Scaling("scalar", scale=torch.tensor(0.3)), Scaling("layer_norm"), Scaling("row_norm")],
    ids=lambda each: each.kind,
)
def test_what_is_written_is_the_difference_of_two_reconstructions(scaling):
    generator = torch.Generator().manual_seed(0)
    W, b_enc, W_dec, b_dec, x = (
        torch.randn(*shape, generator=generator) for shape in ((N, 6), (N,), (N, 6), (6,), (9, 6))
    )
    sae = SAE(W, b_enc, W_dec, b_dec, TopKRule(4), scaling=scaling)
    x = 5 * x
    codes = sae.encode(x)
    edits = checked_edits(sae, {2: 3.0, 5: Edit.ablate(), 9: Edit.add(1)})
    difference = difference_of(codes, edits)
    edited = Codes.from_dense(codes.to_dense() + difference.to_dense())
    expected = sae.decode(edited, x) - sae.decode(codes, x)
    torch.testing.assert_close(written_by(sae, difference, x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("8", Edit.set(8)),
        ("-8", Edit.set(-8)),
        ("+2", Edit.add(2)),
        ("+-2", Edit.add(-2)),
        ("*0.5", Edit.scale(0.5)),
        ("0..3", Edit.clamp(0, 3)),
        ("..3", Edit.clamp(high=3)),
        ("1..", Edit.clamp(low=1)),
        (" ablate ", Edit.ablate()),
    ],
)
def test_texts_that_mean_an_edit(text, edit):
    assert Edit.parse(text) == edit


def test_edits_are_numbers_texts_or_edits():
    W = torch.eye(N)
    sae = SAE(W, torch.zeros(N), W, torch.zeros(N), TopKRule(2))
    assert checked_edits(sae, {1: 2, 3: "*2", 5: Edit.ablate()}) == {1: Edit.set(2), 3: Edit.scale(2), 5: Edit.ablate()}


@pytest.mark.parametrize("text", ["", "ablat", "3..1", "nan", "inf", "+", "*x", "1..2..3", "nan..2", ".."])
def test_texts_that_mean_none(text):
    with pytest.raises(ConfigError):
        Edit.parse(text)


@pytest.mark.parametrize(
    "edits", [{12: 1.0}, {-1: 1.0}, {True: 1.0}, {"3": 1.0}, {3: "ablat"}, {3: math.nan}, {3: None}, [3], 3]
)
def test_edits_that_cannot_be(edits):
    W = torch.eye(N)
    sae = SAE(W, torch.zeros(N), W, torch.zeros(N), TopKRule(2))
    with pytest.raises(ConfigError):
        checked_edits(sae, edits)


@pytest.mark.parametrize("m", [0, -1, 1.5, True])
def test_a_number_of_top_latents_that_cannot_be(m):
    with pytest.raises(ConfigError):
        AblateTop(m)
