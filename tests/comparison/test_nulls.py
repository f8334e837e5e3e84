"""What chance gives: dictionaries without anything in common."""

from __future__ import annotations

import pytest
import torch

from fixtures.known_saes import random_sae
from saekit.comparison.nulls import chance_of, nulls_of
from saekit.comparison.pairs import MatchProgress
from saekit.matching.shared import SharedRule
from saekit.sae.model import SAE

RULE = SharedRule(0.7, True)


def pair(n: int = 40, d: int = 12) -> tuple[SAE, SAE]:
    return random_sae(seed=1, n=n, d=d), random_sae(seed=2, n=n, d=d)


def found(a: SAE, b: SAE, seed: int = 0):
    return nulls_of(a, b, RULE, seed, MatchProgress(None, 4))


def test_random_directions_depend_on_shape_and_seed_alone() -> None:
    (a, b), (c, d) = pair(), (random_sae(seed=3, n=40, d=12), random_sae(seed=4, n=40, d=12))
    assert found(a, b)["random"] == found(c, d)["random"]
    assert found(a, b)["random"] != found(a, b, seed=1)["random"]


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_neither_order_nor_scale_of_latents_changes_what_chance_gives(scale: float) -> None:
    a, b = pair()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    moved = b.permute(order).replace(W_dec=scale * b.W_dec[order], W_enc=scale * b.W_enc[order])
    one, other = found(a, b), found(a, moved)
    assert one["random"] == other["random"]
    for name in ("shared", "equal", "mean_cosine", "max_cosine"):
        assert getattr(one["permuted"], name).value == pytest.approx(getattr(other["permuted"], name).value, abs=1e-5)


def test_an_sae_with_permuted_coordinates_shares_nothing_with_itself() -> None:
    sae = random_sae(seed=5, n=40, d=64)
    nulls = found(sae, sae)
    assert nulls["permuted"].shared.value == nulls["random"].shared.value == 0
    assert nulls["permuted"].max_cosine.value < 0.6


def test_formulas_are_near_what_is_measured() -> None:
    a, b = pair(n=200, d=32)
    null = found(a, b)["random"]
    expected = float(str(null.max_cosine.reason).rsplit(": ", 1)[1])
    assert null.max_cosine.value == pytest.approx(expected, abs=0.03)


def test_chance_without_nulls_is_not_known() -> None:
    assert set(chance_of({}).values()) == {None}
    nulls = found(*pair())
    chance = chance_of(nulls)
    assert chance["shared_null"] == nulls["random"].shared
    assert chance["equal_null"].value == nulls["permuted"].equal.value
