"""How alike SAEs act on the same rows: the same in any order and scale of latents, from either side, in any batches."""

from __future__ import annotations

import pytest
import torch

from fixtures.known_saes import random_sae
from saekit import ArrayRows
from saekit.comparison.on_rows import Activity, act_on
from saekit.comparison.pairs import MatchProgress, match_all
from saekit.comparison.settings import ComparisonSettings
from saekit.errors import DataError
from saekit.matching.shared import SharedRule
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule

RULE = SharedRule(0.7, True)
X = torch.randn(700, 6, generator=torch.Generator().manual_seed(0))


def acted(*saes: SAE, x: torch.Tensor = X, **settings: int) -> Activity:
    matched = match_all([(str(at), sae) for at, sae in enumerate(saes)], MatchProgress(None, 2))
    return act_on(list(saes), matched, RULE, ArrayRows(x), ComparisonSettings(**settings), None)


def numbers(found: Activity) -> list[float]:
    [pair] = found.on_rows
    return [each.value for each in (pair.correlation, pair.cka, pair.rsa, pair.shared_alive)]


def test_an_sae_acts_like_itself_in_any_order() -> None:
    sae = random_sae()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    found = acted(sae, sae.permute(order))
    assert numbers(found) == pytest.approx([1, 1, 1, 1], abs=1e-5)
    assert [found.frequency[0][at] for at in order.tolist()] == pytest.approx(found.frequency[1])


def test_signed_latents_turned_round_do_the_same() -> None:
    sae = random_sae().replace(rule=TopKRule(3, sign="magnitude"))
    signs = torch.tensor([1.0, -1.0, -1.0] * 8)
    turned = sae.replace(W_enc=signs[:, None] * sae.W_enc, b_enc=signs * sae.b_enc, W_dec=signs[:, None] * sae.W_dec)
    other = random_sae(seed=1).replace(rule=TopKRule(3, sign="magnitude"))
    assert numbers(acted(turned, other)) == pytest.approx(numbers(acted(sae, other)), abs=1e-5)
    found = acted(sae, turned)
    assert numbers(found) == pytest.approx([1, 1, 1, 1], abs=1e-5)
    [does] = found.function
    for name in ("fvu_recovered", "top_overlap", "coactivation", "coactivation_agrees"):
        assert does[name].value == pytest.approx(1, abs=1e-5), name


def test_scale_of_codes_changes_no_similarity() -> None:
    a, b = random_sae(seed=0, rule="relu"), random_sae(seed=1, rule="relu")
    louder = b.replace(W_enc=4 * b.W_enc, b_enc=4 * b.b_enc, W_dec=b.W_dec / 4)
    assert numbers(acted(a, louder)) == pytest.approx(numbers(acted(a, b)), abs=1e-5)


def test_both_sides_and_any_batches_give_the_same() -> None:
    a, b = random_sae(seed=0), random_sae(seed=1)
    expected = numbers(acted(a, b))
    assert numbers(acted(b, a)) == pytest.approx(expected, abs=1e-6)
    assert numbers(acted(a, b, batch_rows=61)) == pytest.approx(expected, abs=1e-6)


def test_frequency_is_the_fraction_of_the_rows_seen() -> None:
    sae = random_sae()
    found = acted(sae, random_sae(seed=1), max_rows=100)
    assert found.n_rows == 100
    assert found.frequency[0] == pytest.approx((sae.encode(X[:100]).to_dense() > 0).double().mean(0).tolist())


def test_latents_that_never_fire_have_no_correlation() -> None:
    sae = random_sae(rule="relu")
    [pair] = acted(sae, sae.replace(b_enc=sae.b_enc - 1e3)).on_rows
    assert (pair.n_pairs, pair.correlation.is_defined, pair.shared_alive.is_defined) == (0, False, False)


def test_no_rows_are_refused() -> None:
    class Empty:
        d_in, n_rows, info = 6, 0, {}

        def batches(self, batch_rows, *, seed=None, start=(0, 0)):
            return iter(())

    sae = random_sae()
    matched = match_all([("a", sae), ("b", sae)], MatchProgress(None, 2))
    with pytest.raises(DataError, match="at least one row"):
        act_on([sae, sae], matched, RULE, Empty(), ComparisonSettings(), None)
