"""The matching is the best there is, and its certificate proves it: against scipy, on families made to be hard."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from saekit import kernels
from saekit.errors import DataError, ShapeError
from saekit.matching import assignment, assignment_numba, matching, top_cosines
from saekit.matching.assignment import Graph, centred, solve
from saekit.matching.matching import match_latents
from saekit.matching.top_cosines import Directions


def unit(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, x / norm, 0.0)


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return unit(a) @ unit(b).T


def check(a: torch.Tensor, b: torch.Tensor, *, either_sign: bool = False) -> matching.Matching:
    """One to one, the largest sum, and prices that hold for all pairs and prove it."""
    found = match_latents(a, b, either_sign=either_sign)
    S = cosines(a, b)
    if either_sign:
        mine = (found.partner >= 0).nonzero().squeeze(1)
        assert torch.equal(found.opposite[mine], S[mine, found.partner[mine]] < 0)
        S = S.abs()
    assert bool(found.opposite.any()) <= either_sign
    rows, columns = linear_sum_assignment(S.numpy(), maximize=True)
    best = float(S[rows, columns].sum())
    n = min(len(a), len(b))
    objective, dual, gap = (getattr(found.certificate, name) for name in ("objective", "dual", "gap"))

    paired = (found.partner >= 0).nonzero().squeeze(1)
    assert len(paired) == n
    assert len(found.partner[paired].unique()) == n
    torch.testing.assert_close(S[paired, found.partner[paired]], found.cosine[paired], atol=1e-12, rtol=0)
    assert bool(found.cosine[found.partner < 0].isnan().all())
    assert objective == pytest.approx(float(found.cosine[paired].sum()), abs=1e-9)

    assert float((found.price_a[:, None] + found.price_b - S).min()) > -1e-12
    free = [found.price_b, found.price_a][len(a) > len(b)]
    assert len(a) == len(b) or float(free.min()) >= 0
    assert dual == pytest.approx(float(found.price_a.sum() + found.price_b.sum()), abs=1e-9)
    assert gap == pytest.approx(dual - objective, abs=1e-12)
    assert -1e-9 <= gap <= 2.0**-32 * (len(a) + len(b)) + 1e-9
    assert abs(objective - best) <= 1e-6 * abs(best) + 1e-9 * n
    return found


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(centres: torch.Tensor, n: int, noise: float, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    which = torch.randint(len(centres), (n,), generator=g)
    return centres[which] + noise * torch.randn(n, centres.shape[1], generator=g)


def zeroed(x: torch.Tensor, every: int) -> torch.Tensor:
    return x.index_fill(0, torch.arange(0, len(x), every), 0.0)


def copied(n: int, m: int, d: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one are noisy rows of the other, in another order."""
    a, b = draw(n, d), draw(m, d, seed=1)
    k = min(n, m)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))[:k]
    return a, torch.cat([a[order] + noise * b[:k], b[k:]])


FAMILIES = {
    "random": lambda n, m, d: (draw(n, d), draw(m, d, seed=1)),
    "clustered": lambda n, m, d: (near(draw(9, d), n, 0.1, 1), near(draw(9, d), m, 0.1, 2)),
    "strongly clustered": lambda n, m, d: (near(draw(7, d), n, 0.003, 1), near(draw(7, d), m, 0.003, 2)),
    "duplicates": lambda n, m, d: (near(draw(5, d), n, 0.0, 1), near(draw(5, d), m, 0.0, 2)),
    "all equal": lambda n, m, d: (torch.ones(n, d), 3 * torch.ones(m, d)),
    "all opposite": lambda n, m, d: (torch.ones(n, d), -torch.ones(m, d)),
    "zero rows": lambda n, m, d: (zeroed(draw(n, d), 3), zeroed(draw(m, d, seed=1), 2)),
    "all zero": lambda n, m, d: (torch.zeros(n, d), torch.zeros(m, d)),
    "negative": lambda n, m, d: (draw(n, d).abs(), -draw(m, d, seed=1).abs()),
    "permuted copy": lambda n, m, d: copied(n, m, d, 0.0),
    "noisy copy": lambda n, m, d: copied(n, m, d, 0.8),
    "cone": lambda n, m, d: (draw(n, 2) @ draw(2, d, seed=5) + 4, draw(m, 2, seed=1) @ draw(2, d, seed=5) + 4),
    "plane": lambda n, m, d: (draw(n, 2) @ draw(2, d, seed=5), draw(m, 2, seed=1) @ draw(2, d, seed=5)),
}
SHAPES = [(1, 1, 3), (1, 6, 3), (6, 1, 3), (90, 90, 8), (60, 150, 8), (300, 260, 24)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("family", FAMILIES)
def test_best_and_proven(family, shape):
    check(*FAMILIES[family](*shape))


@pytest.fixture
def narrow(monkeypatch):
    """Few candidates and small blocks, so that small problems go through everything that large ones do."""
    for name, value in {"CANDIDATES": 5, "COLUMN_CANDIDATES": 3, "MORE": 3, "LOOSE_SHARE": 8}.items():
        monkeypatch.setattr(matching, name, value)
    for name, value in {"BLOCK_ROWS": 48, "BLOCK_COLUMNS": 70, "TILE_ROWS": 37, "PAIRS": 500}.items():
        monkeypatch.setattr(top_cosines, name, value)


@pytest.mark.parametrize("mode", ["auto", "plain"])
@pytest.mark.parametrize("shape", [(110, 110, 6), (60, 130, 6)], ids=["square", "rectangular"])
@pytest.mark.parametrize("family", FAMILIES)
def test_best_and_proven_with_few_candidates(narrow, family, shape, mode):
    with kernels.using(mode):
        check(*FAMILIES[family](*shape))


@pytest.mark.parametrize("mode", ["auto", "plain"])
@pytest.mark.parametrize("shape", [(110, 110, 6), (60, 130, 6)], ids=["square", "rectangular"])
@pytest.mark.parametrize("family", FAMILIES)
def test_best_and_proven_where_either_sign_will_do(narrow, family, shape, mode):
    with kernels.using(mode):
        check(*FAMILIES[family](*shape), either_sign=True)


def test_turning_directions_round_changes_only_which_are_opposite():
    a, b = FAMILIES["noisy copy"](60, 80, 8)
    signs = [(torch.rand(len(x), generator=torch.Generator().manual_seed(len(x))) < 0.5) * 2.0 - 1 for x in (a, b)]
    one, other = check(a, b, either_sign=True), check(signs[0][:, None] * a, signs[1][:, None] * b, either_sign=True)
    assert torch.equal(one.partner, other.partner)
    torch.testing.assert_close(one.cosine, other.cosine)
    turned = signs[0] * signs[1][one.partner] < 0
    assert torch.equal(other.opposite, one.opposite ^ turned)
    assert torch.equal(other.inverse().inverse().opposite, other.opposite)


def test_ties_beyond_every_list_of_candidates(narrow):
    """One direction 400 times over: any row may have any column, and each list holds 5."""
    a, b = torch.ones(400, 4), torch.ones(400, 4)
    a[:3], b[7:10] = draw(3, 4), draw(3, 4)
    found = check(a, b)
    assert found.partner[:3].tolist() == [7, 8, 9]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_small_integers(data):
    n, m, d = (data.draw(st.integers(1, most)) for most in (12, 12, 3))
    entries = st.lists(st.integers(-2, 2), min_size=d, max_size=d)
    a, b = (data.draw(st.lists(entries, min_size=rows, max_size=rows)) for rows in (n, m))
    check(torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_best_and_proven_at_512(family):
    check(*FAMILIES[family](512, 512, 48))


@pytest.mark.parametrize("family", ["random", "clustered", "noisy copy"])
def test_best_and_proven_at_2048(family):
    check(*FAMILIES[family](1600, 2048, 64))


@pytest.mark.parametrize("family", ["clustered", "plane", "zero rows"])
def test_without_bids_left_augmenting_paths_finish(monkeypatch, family):
    monkeypatch.setattr(assignment, "BIDS_PER_ROW", 1)
    check(*FAMILIES[family](120, 120, 8))
    check(*FAMILIES[family](70, 120, 8))


def test_compiled_and_plain_are_the_same():
    """The interpreted loops give the very same prices, the plain products the same pairs."""
    a, b = FAMILIES["clustered"](80, 100, 8)
    S = cosines(a, b).numpy()
    graph = Graph(80, 100, np.arange(8000), S.ravel())
    one = solve(graph)
    with kernels.using("plain"):
        other = solve(graph)
        plain = match_latents(a, b)
    assert (one.mate == other.mate).all()
    assert (one.v == other.v).all()
    found = match_latents(a, b)
    assert plain.certificate.objective == pytest.approx(found.certificate.objective, abs=1e-9)
    assert (plain.partner == found.partner).all()


def test_products_agree_with_the_whole_matrix(narrow):
    a, b = Directions.of(draw(90, 7), "a"), Directions.of(draw(160, 7, seed=1), "b")
    S = cosines(a.x, b.x)
    prices = draw(160, seed=3).double()
    for mode in ("auto", "plain"):
        with kernels.using(mode):
            found = top_cosines.best_both_ways(a, b, 4, 6)
            torch.testing.assert_close(S.gather(1, found.columns), S.topk(4, dim=1).values, atol=1e-6, rtol=0)
            torch.testing.assert_close(found.bound, S.topk(4, dim=1).values[:, -1], atol=1e-5, rtol=0)
            kept = S.T.gather(1, found.rows).sort(dim=1, descending=True).values
            torch.testing.assert_close(kept, S.T.topk(6, dim=1).values, atol=1e-6, rtol=0)
            some = torch.tensor([3, 88, 41])
            for exact in (False, True):
                values, columns = top_cosines.best(a, some, b, prices, 5, exact=exact)
                wanted = (S - prices)[some].topk(5, dim=1)
                error = top_cosines.reach(7, float(prices.abs().max()), exact)
                assert float((values.double() - wanted.values).abs().max()) <= error
                assert (columns == wanted.indices).all()
            i, j = torch.arange(90), torch.arange(90) + 60
            torch.testing.assert_close(top_cosines.cosines(a, i, b, j), S[i, j], atol=1e-14, rtol=0)
    tops = top_cosines.extremes(a, b)
    for found, wanted in zip(tops, (S.amax(1), S.amin(1), S.amax(0), S.amin(0)), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    limit = torch.full((3,), 0.3, dtype=torch.float64)
    place, column = top_cosines.scattered(a, some, limit, b, prices, 200, seed=0)
    everything = {(p, c) for p, c in zip(place.tolist(), column.tolist())}
    above = (S - prices)[some] > 0.3
    assert everything == {(p, c) for p, c in above.nonzero().tolist()}


@pytest.fixture
def coarse(monkeypatch):
    """The first product in bf16, whatever the size and the processor."""
    monkeypatch.setattr(top_cosines, "COARSE_PAIRS", 0)
    monkeypatch.setattr(top_cosines, "_multiplies_bf16", lambda: True)


@pytest.mark.skipif(not assignment.is_compiled(), reason="only the compiled loops multiply in bf16")
@pytest.mark.parametrize("family", FAMILIES)
def test_best_and_proven_from_a_coarse_product(narrow, coarse, family):
    a, b = FAMILIES[family](110, 140, 24)
    check(a, b)
    found = top_cosines.best_both_ways(Directions.of(a, "a"), Directions.of(b, "b"), 5, 3)
    outside = cosines(a, b).scatter(1, found.columns, -2.0).amax(1)
    assert bool((outside <= found.bound).all())
    assert float((found.bound - cosines(a, b).topk(5, dim=1).values[:, -1]).abs().max()) < 0.03


def test_rounding_is_bounded_more_widely_where_factors_are_rounded():
    before = torch.get_float32_matmul_precision()
    sure = top_cosines.reach(768, 1.0, exact=False)
    try:
        torch.set_float32_matmul_precision("medium")
        assert top_cosines.reach(768, 1.0, exact=False) > sure + 2.0**-8
    finally:
        torch.set_float32_matmul_precision(before)
    assert top_cosines.reach(768, 1.0, exact=True) < 1e-12


def test_centring_keeps_the_matching_and_every_edge_below_its_prices():
    S = cosines(draw(50, 5), draw(50, 5, seed=1)).numpy()
    graph = Graph(50, 50, np.arange(2500), S.ravel())
    before = solve(graph)
    after = centred(graph, before, sweeps=3)
    assert (after.mate == before.mate).all()
    assert (after.u[:, None] + after.v >= S - 1e-12).all()
    assert after.u.sum() + after.v.sum() <= before.u.sum() + before.v.sum() + 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_layouts(dtype):
    a, b = draw(40, 6).to(dtype), draw(6, 55, seed=1).to(dtype).T
    check(a, b)


def test_lengths_do_not_matter():
    a, b = draw(50, 6), draw(50, 6, seed=1)
    scale = torch.logspace(-30, 30, 50)[:, None]
    assert (match_latents(a, b).partner == match_latents(a * scale, b * scale.flip(0)).partner).all()


def test_seen_from_the_other_side():
    a, b = draw(20, 6), draw(33, 6, seed=1)
    found, turned = match_latents(a, b), match_latents(b, a)
    assert (found.inverse().partner == turned.partner).all()
    assert (turned.partner >= 0).sum() == 20
    back = found.inverse().inverse()
    assert (back.partner == found.partner).all()
    torch.testing.assert_close(back.cosine, found.cosine)
    assert found.inverse().mean_cosine == found.mean_cosine


def test_progress_and_repr():
    seen = []
    found = match_latents(draw(20, 6), draw(20, 6, seed=1), progress=lambda *told: seen.append(told))
    assert seen[-1] == ("match", 20, None)
    assert re_gap(repr(found)) < 1e-6


def re_gap(text: str) -> float:
    return abs(float(text.split("gap ")[1].split(" of")[0]))


def test_gains_of_a_row_with_one_edge():
    """Row 0 has one column, which row 1 wants more."""
    graph = Graph(2, 2, np.array([0, 2, 3]), np.array([0.1, 0.9, 0.2]))
    assert solve(graph).mate.tolist() == [0, 1]


def test_tighten_leaves_every_match_tight():
    starts, columns, gains = [0, 2, 4], [0, 1, 0, 1], [10, 12, 5, 1]
    mate, worth = [0, -1], [0, 0]
    assignment_numba.tighten(starts, columns, gains, [0, 0], mate, worth)
    assert worth == [10, 5]
    assert gains == [10, 10, 5, 1]


def test_what_is_refused():
    with pytest.raises(ShapeError, match=r"`a` must be a matrix \[n_latents, d\] that is not empty; got \(3,\)"):
        match_latents(torch.ones(3), torch.ones(2, 2))
    with pytest.raises(ShapeError, match=r"`b` must be a matrix .* got \(0, 2\)"):
        match_latents(torch.ones(2, 2), torch.ones(0, 2))
    with pytest.raises(ShapeError, match="`a` and `b` must have one width; they have 2 and 3"):
        match_latents(torch.ones(2, 2), torch.ones(2, 3))
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match="`b` must be finite; it holds NaN or infinity"):
            match_latents(torch.ones(2, 2), torch.tensor([[1.0, bad]]))
