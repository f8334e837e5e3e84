"""Laws of the streamed accumulators."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score

from saekit.errors import DataError, ShapeError
from saekit.measure.accumulators import Fidelity, Moments, Reconstruction, Sparsity, Sums, fvu
from saekit.measure.intervals import Sample
from saekit.sae.codes import Codes
from saekit.variance import SAME_ROWS

ROUNDING = 1e-9  # relative; float64 sums in another order


def merged(accumulators):
    """The first of several accumulators of one kind after merging all others into it."""
    first, *rest = accumulators
    for other in rest:
        first.merge(other)
    return first


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(seed: int = 0, n: int = 97, d: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows with a mean far from zero, a noisy reconstruction, and document groups."""
    x = normal(seed, n, d) * torch.arange(1, d + 1) + 20
    x_hat = x + normal(seed + 1, n, d)
    group = torch.randint(0, 11, (n,), generator=torch.Generator().manual_seed(seed + 2))
    return x, x_hat, group


def some_codes(seed: int = 0, n: int = 97, n_latents: int = 40) -> Codes:
    z = normal(seed, n, n_latents)
    z = torch.where(z > torch.linspace(-1.5, 4.5, n_latents), z.abs() + 0.1, 0.0)
    return Codes.from_dense(z)


# ---------------------------------------------------------------- fvu


def test_fvu_of_the_mean_predictor_is_one():
    x, _, _ = rows()
    assert fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1.0, rel=1e-12)


def test_fvu_of_a_perfect_reconstruction_is_zero():
    x, _, _ = rows()
    assert fvu(x, x.clone()) == 0.0


def test_fvu_does_not_change_with_scale_and_shift():
    x, x_hat, _ = rows()
    shift = normal(9, x.shape[1]) * 1000
    assert fvu(6 * x + shift, 6 * x_hat + shift) == pytest.approx(fvu(x, x_hat), rel=ROUNDING)


def test_fvu_charges_a_constant_bias():
    x, _, _ = rows()
    bias = torch.full((x.shape[1],), 3.0, dtype=torch.float64)
    expected = len(x) * float(bias.square().sum()) / float((x - x.mean(0)).square().sum())
    assert fvu(x, x + bias) == pytest.approx(expected, rel=ROUNDING)


def test_fvu_is_one_minus_the_variance_weighted_r2_of_scikit_learn():
    x, x_hat, _ = rows()
    expected = 1 - r2_score(x.numpy(), x_hat.numpy(), multioutput="variance_weighted")
    assert fvu(x, x_hat) == pytest.approx(expected, rel=ROUNDING)


def test_fvu_survives_a_mean_that_dwarfs_the_variance():
    x, x_hat, _ = rows()
    assert fvu(x + 1e6, x_hat + 1e6) == pytest.approx(fvu(x, x_hat), rel=1e-6)


def test_fvu_of_constant_rows_is_undefined_and_says_so():
    x = torch.ones(5, 3)
    accumulator = Reconstruction(3)
    accumulator.update(x, x)
    estimate = accumulator.compute()["fvu"]
    assert math.isnan(estimate.value)
    assert estimate.reason == f"undefined: {SAME_ROWS}"


# ---------------------------------------------------------------- batching and merging


def reconstruct_in(parts: list[slice], merge: bool) -> dict[str, tuple[float, np.ndarray]]:
    x, x_hat, group = rows()
    centre = x.mean(0)
    accumulators = [Reconstruction(x.shape[1], centre=centre) for _ in (parts if merge else [0])]
    for index, part in enumerate(parts):
        accumulators[index if merge else 0].update(x[part], x_hat[part], group[part])
    estimates = merged(accumulators).compute()
    return {name: (estimate.value, estimate.left_out) for name, estimate in estimates.items()}


def cuts(n: int):
    return st.lists(st.integers(0, n), max_size=6).map(
        lambda ends: [slice(a, b) for a, b in zip([0, *sorted(ends)], [*sorted(ends), n], strict=True)]
    )


@settings(max_examples=15, deadline=None)
@given(cuts(97), st.booleans())
def test_any_batching_and_any_merging_give_the_same_reconstruction_metrics(parts, merge):
    whole = reconstruct_in([slice(0, 97)], merge=False)
    for name, (value, left_out) in reconstruct_in(parts, merge).items():
        assert value == pytest.approx(whole[name][0], rel=ROUNDING), name
        np.testing.assert_allclose(left_out, whole[name][1], rtol=1e-8, err_msg=name)


@settings(max_examples=15, deadline=None)
@given(cuts(97), st.booleans())
def test_any_batching_and_any_merging_give_the_same_sparsity(parts, merge):
    codes, (_, _, group) = some_codes(), rows()
    accumulators = [Sparsity(codes.n_latents) for _ in (parts if merge else [0])]
    for index, part in enumerate(parts):
        accumulators[index if merge else 0].update(codes.rows(part), group[part])
    streamed = merged(accumulators)
    whole = Sparsity(codes.n_latents)
    whole.update(codes, group)
    assert torch.equal(streamed.fires(), whole.fires())
    assert streamed.histogram() == whole.histogram()
    for name, estimate in streamed.compute().items():
        expected = whole.compute()[name]
        assert estimate.value == pytest.approx(expected.value, rel=ROUNDING)
        assert estimate.measured("").low == pytest.approx(expected.measured("").low, rel=ROUNDING)


def test_moments_equal_the_direct_formula():
    x, _, group = rows()
    moments = Moments(x.shape[1])
    for start in range(0, len(x), 10):
        moments.update(x[start : start + 10], group[start : start + 10])
    assert moments.n_rows == len(x)
    torch.testing.assert_close(moments.mean, x.mean(0))
    assert moments.total() == pytest.approx(float((x - x.mean(0)).square().sum()), rel=ROUNDING)


def test_what_is_left_recomputes_the_denominator_about_its_own_mean():
    x, x_hat, group = rows()
    accumulator = Reconstruction(x.shape[1])
    accumulator.update(x, x_hat, group)
    sample = Sample.over(accumulator.moments.rows_per_group)
    left_out = accumulator.compute(sample)["fvu"].left_out
    assert sample.weights is not None
    assert left_out is not None
    for weight, value in zip(sample.weights, left_out, strict=True):
        chosen = torch.cat([(group == g).nonzero().squeeze(1).repeat(int(w)) for g, w in enumerate(weight) if w])
        assert value == pytest.approx(fvu(x[chosen], x_hat[chosen]), rel=1e-8)


def test_shared_moments_give_what_own_moments_give():
    x, x_hat, group = rows()
    own, moments = Reconstruction(x.shape[1]), Moments(x.shape[1])
    shared = Reconstruction(x.shape[1], moments=moments)
    own.update(x, x_hat, group)
    moments.update(x, group)
    shared.update(x, x_hat, group)
    assert shared.compute()["fvu"].value == own.compute()["fvu"].value


def test_inputs_are_not_changed():
    x, x_hat, group = rows()
    before = x.clone(), x_hat.clone(), group.clone()
    accumulator = Reconstruction(x.shape[1], centre=x.mean(0))
    accumulator.update(x, x_hat, group)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, x_hat, group), strict=True))


# ---------------------------------------------------------------- the other formulas


def test_other_reconstruction_metrics_equal_their_formulas():
    x, x_hat, _ = rows()
    accumulator = Reconstruction(x.shape[1], centre=x.mean(0))
    accumulator.update(x, x_hat)
    got = {name: estimate.value for name, estimate in accumulator.compute().items()}
    sse = (x - x_hat).square().sum(1)
    assert got["mse"] == pytest.approx(float(sse.mean()), rel=ROUNDING)
    assert got["cosine"] == pytest.approx(float(torch.cosine_similarity(x, x_hat).mean()), rel=ROUNDING)
    assert got["l2_ratio"] == pytest.approx(float(x_hat.norm(dim=1).sum() / x.norm(dim=1).sum()), rel=ROUNDING)
    bias = float(x_hat.square().sum() / (x * x_hat).sum())
    assert got["relative_reconstruction_bias"] == pytest.approx(bias, rel=ROUNDING)
    legacy = float((1 - sse / (x - x.mean(0)).square().sum(1)).mean())
    assert got["ev_legacy"] == pytest.approx(legacy, rel=ROUNDING)


def test_legacy_explained_variance_is_not_one_minus_fvu():
    x, x_hat, _ = rows()
    x[0] *= 30  # a heavy tail tells them apart
    accumulator = Reconstruction(x.shape[1], centre=x.mean(0))
    accumulator.update(x, x_hat)
    got = accumulator.compute()
    assert abs(got["ev_legacy"].value - (1 - got["fvu"].value)) > 0.1


def test_shrinking_a_perfect_reconstruction_shows_in_both_shrinkage_metrics():
    x, _, _ = rows()
    accumulator = Reconstruction(x.shape[1])
    accumulator.update(x, 0.5 * x)
    got = accumulator.compute()
    assert got["l2_ratio"].value == pytest.approx(0.5)
    assert got["relative_reconstruction_bias"].value == pytest.approx(0.5)
    assert got["cosine"].value == pytest.approx(1.0)


def test_cosine_of_a_zero_row_counts_as_zero():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    accumulator = Reconstruction(2)
    accumulator.update(x, x)
    assert accumulator.compute()["cosine"].value == 0.5


def test_density_divides_by_the_rows_really_seen():
    z = torch.zeros(3, 4)
    z[0, 0] = z[1, 0] = z[2, 0] = z[1, 2] = 1.0
    sparsity = Sparsity(4)
    sparsity.update(Codes.from_dense(z[:2]))
    sparsity.update(Codes.from_dense(z[2:]))  # a short last batch
    assert sparsity.n_rows == 3
    assert sparsity.density().tolist() == pytest.approx([1, 0, 1 / 3, 0])
    got = sparsity.compute()
    assert got["l0"].value == pytest.approx(4 / 3)
    assert got["dead_fraction"].value == 0.5
    assert got["dense_fraction"].value == 0.5


def test_a_stored_zero_has_not_fired():
    codes = Codes(torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([0.0, 2.0]), 3)
    sparsity = Sparsity(3)
    sparsity.update(codes)
    assert sparsity.fires().tolist() == [0, 1, 0]
    assert sparsity.compute()["l0"].value == 1.0


def test_histogram_holds_every_latent_once():
    codes = some_codes()
    sparsity = Sparsity(codes.n_latents)
    sparsity.update(codes)
    histogram = sparsity.histogram()
    assert sum(histogram.counts) + histogram.dead == codes.n_latents
    assert histogram.dead == int((sparsity.fires() == 0).sum()) > 0
    edges = np.array(histogram.log10_edges)
    assert edges[-1] == 0
    assert edges[0] <= math.log10(1 / 97)
    assert len(edges) == len(histogram.counts) + 1
    alive = sparsity.density()[sparsity.fires() > 0].log10().numpy()
    expected, _ = np.histogram(alive, bins=edges)
    assert histogram.counts == expected.tolist()


def test_dead_fraction_interval_widens_with_latents_that_one_document_alone_keeps_alive():
    def interval(z: torch.Tensor) -> float:
        sparsity = Sparsity(z.shape[1])
        sparsity.update(Codes.from_dense(z), torch.arange(len(z)))
        measured = sparsity.compute()["dead_fraction"].measured("fraction")
        assert measured.low is not None
        assert measured.high is not None
        assert measured.low <= measured.value <= measured.high
        return measured.high - measured.low

    everywhere = torch.ones(20, 10)
    once = everywhere.clone()
    once[1:, :5] = 0
    assert interval(everywhere) == 0.0
    assert interval(once) > 0.1


# ---------------------------------------------------------------- language-model fidelity


def losses(n: int = 60) -> dict[str, torch.Tensor]:
    clean = normal(0, n).abs()
    return {"clean": clean, "sae": clean + 0.3, "zero": clean + 2, "mean": clean + 1, "kl": normal(1, n).abs()}


def test_recovered_fractions_are_ratios_of_sums():
    fidelity, group, values = Fidelity(), torch.arange(60) % 7, losses()
    for start in range(0, 60, 13):
        fidelity.update(group[start : start + 13], **{k: v[start : start + 13] for k, v in values.items()})
    got = fidelity.compute()
    assert got["ce_clean"].value == pytest.approx(float(values["clean"].mean()))
    assert got["ce_recovered_zero"].value == pytest.approx(1.7 / 2)
    assert got["ce_recovered_mean"].value == pytest.approx(0.7)
    assert got["kl"].value == pytest.approx(float(values["kl"].mean()))


def test_recovered_is_one_for_identity_and_zero_for_the_ablation_itself():
    values = losses()
    for sae, expected in ((values["clean"], 1.0), (values["zero"], 0.0)):
        fidelity = Fidelity()
        fidelity.update(torch.arange(60) % 7, **{**values, "sae": sae})
        assert fidelity.compute()["ce_recovered_zero"].measured("").low == pytest.approx(expected)


def test_recovered_is_undefined_where_ablation_costs_nothing():
    values = losses()
    fidelity = Fidelity()
    fidelity.update(torch.arange(60) % 7, **{**values, "zero": values["clean"]})
    estimate = fidelity.compute()["ce_recovered_zero"]
    assert math.isnan(estimate.value)
    assert "costs the model nothing" in (estimate.reason or "")


# ---------------------------------------------------------------- refusals


def test_rows_with_nan_are_refused():
    x = torch.ones(4, 3)
    x[2, 1] = math.nan
    with pytest.raises(DataError, match="row 2 of this batch"):
        Reconstruction(3).update(x, x)


def test_a_reconstruction_with_nan_is_refused():
    x = torch.ones(4, 3)
    with pytest.raises(DataError, match="Check the weights"):
        Reconstruction(3).update(x, x * math.nan)


def test_shapes_that_differ_are_refused():
    x = torch.ones(4, 3)
    with pytest.raises(ShapeError, match=r"rows must have shape \(n, 5\)"):
        Reconstruction(5).update(x, x)
    with pytest.raises(ShapeError, match="Reconstruct the same rows"):
        Reconstruction(3).update(x, x[:2])
    with pytest.raises(ShapeError, match="codes must have 5 latents"):
        Sparsity(5).update(Codes.from_dense(x))


def test_nothing_added_is_refused():
    with pytest.raises(DataError, match="at least one row"):
        Reconstruction(3).compute()
    with pytest.raises(DataError, match="at least one row"):
        Sparsity(3).compute()
    with pytest.raises(DataError, match="at least one predicted token"):
        Fidelity().compute()


def test_sums_merge_names_that_only_the_other_has():
    one, other = Sums(3), Sums(3)
    one.update(torch.tensor([0]), a=torch.tensor([1.0]))
    other.update(torch.tensor([2]), b=torch.tensor([5.0]))
    one.merge(other)
    assert one["a"].tolist() == [1, 0, 0]
    assert one["b"].tolist() == [0, 0, 5]
    assert one["n"].tolist() == [1, 0, 1]
