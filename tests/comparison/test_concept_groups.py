"""Laws of what many seeds share: groups, the falling curve, and stability in the files."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit import compare
from saekit.comparison.concept_groups import concept_groups, fit_law, law, only_in_one, sharing_law
from saekit.comparison.settings import ComparisonSettings
from saekit.comparison.stability import with_stability
from saekit.errors import ConfigError, DataError
from saekit.sae.model import SAE
from saekit.sae.rules import ReLURule
from saekit.sizes.ranking import rank

D = 32


def directions(n: int, seed: int, d: int = D) -> torch.Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def sae_of(rows: torch.Tensor, **provenance) -> SAE:
    n, d = rows.shape
    return SAE(
        W_enc=rows, b_enc=torch.zeros(n), W_dec=rows, b_dec=torch.zeros(d), rule=ReLURule(), provenance=provenance
    )


def order_of(n: int, seed: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def family() -> list[SAE]:
    """Four SAEs: 8 directions in all, 4 in the first two, the others their own; noisy, and shuffled."""
    common, two = directions(8, 0), directions(4, 1)
    saes = []
    for i in range(4):
        own = directions(20 - 8 - 4 * (i < 2), 10 + i)
        rows = torch.cat([common, two, own] if i < 2 else [common, own])
        noisy = rows + 0.04 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(50 + i))
        saes.append(sae_of(noisy[order_of(20, i)], seed=i))
    return saes


def partition(groups) -> set[frozenset]:
    return {frozenset(members) for members in groups.members()}


# ------------------------------------------------------------------ groups


def test_groups_are_the_planted_concepts(family):
    groups = compare(family, settings=ComparisonSettings(controls=False)).groups
    assert groups.count == [4 * 20 - 8 * 4 - 4 * 2, 4, 0, 8]
    assert groups.size == [4] * 8 + [2] * 4
    assert groups.consistency == [1.0] * 12
    assert groups.mean_consistency == 1
    assert groups.contested == 0
    for members in groups.members()[:8]:
        vectors = torch.stack([family[sae].W_dec[latent] for sae, latent in members])
        assert float((vectors @ vectors.T).min()) > 0.7


def test_groups_do_not_depend_on_the_order_of_the_seeds(family):
    expected = partition(compare(family, settings=ComparisonSettings(controls=False)).groups)
    for order in ([3, 1, 0, 2], [2, 3, 1, 0]):
        found = compare([family[i] for i in order], settings=ComparisonSettings(controls=False)).groups
        assert {frozenset((order[sae], latent) for sae, latent in members) for members in partition(found)} == expected


@given(seed=st.integers(0, 1000), m=st.integers(2, 4))
def test_groups_of_random_pairs(seed, m):
    """At most one latent of an SAE in a group; every order of the SAEs gives the same groups."""
    generator = np.random.default_rng(seed)
    n = generator.integers(1, 6, m).tolist()
    shared = []
    for i in range(m):
        for j in range(i + 1, m):
            count = int(generator.integers(0, min(n[i], n[j]) + 1))
            mine, theirs = generator.permutation(n[i])[:count], generator.permutation(n[j])[:count]
            shared.append((i, j, mine, theirs, generator.random(count)))
    groups = concept_groups(n, shared)
    for members in groups.members():
        saes = [sae for sae, _ in members]
        assert len(saes) == len(set(saes)) >= 2
    assert sum(groups.count) == groups.count[0] + groups.n_groups
    assert groups.count[0] + sum(groups.size) == sum(n)
    for order in permutations(range(m)):
        place = {sae: at for at, sae in enumerate(order)}
        moved = [
            (place[i], place[j], a, b, c) if place[i] < place[j] else (place[j], place[i], b, a, c)
            for i, j, a, b, c in shared
        ]
        generator.shuffle(moved)
        other = concept_groups([n[sae] for sae in order], moved)
        found = {frozenset((order[sae], latent) for sae, latent in members) for members in other.members()}
        assert found == partition(groups)


def test_a_chain_that_comes_back_to_another_latent_is_cut_at_its_weakest_pair():
    # 0.0 – 1.0 – 2.0 – 0.1: the last pair would put two latents of SAE 0 together.
    one = np.array([0])
    shared = [
        (0, 1, one, one, np.array([0.9])),
        (1, 2, one, one, np.array([0.8])),
        (0, 2, one + 1, one, np.array([0.75])),
    ]
    groups = concept_groups([2, 1, 1], shared)
    assert groups.members() == [[(0, 0), (1, 0), (2, 0)]]
    assert groups.contested == 1
    assert groups.consistency == [pytest.approx(2 / 3, abs=1e-6)]
    assert groups.count == [1, 0, 1]


def test_nothing_shared():
    groups = concept_groups([3, 2], [(0, 1, np.zeros(0, int), np.zeros(0, int), np.zeros(0))])
    assert (groups.n_groups, groups.count, groups.mean_consistency) == (0, [5, 0], None)


# ------------------------------------------------------------------ the falling curve

PAPER = np.array([0.583, 0.484, 0.436, 0.406, 0.385, 0.370, 0.358, 0.348])


def test_the_law_of_the_paper():
    m = np.arange(2, 10)
    amplitude, exponent, offset = fit_law(m, PAPER)
    assert (amplitude, exponent, offset) == pytest.approx((0.589, 0.916, 0.270), abs=0.006)
    amplitude, exponent, offset = fit_law(m, PAPER, offset=False)
    assert (amplitude, exponent, offset) == pytest.approx((0.725, 0.349, 0), abs=0.01)


@given(a=st.floats(0.1, 0.8), b=st.floats(0.2, 3), c=st.floats(0, 0.4))
def test_an_exact_law_is_found(a, b, c):
    m = np.arange(2, 9)
    fit = fit_law(m, law((a, b, c), m))
    assert law(fit, m) == pytest.approx(law((a, b, c), m), abs=1e-5)


def has_of(chance: np.ndarray, m: int, seed: int) -> list[np.ndarray]:
    """m SAEs whose latents each other SAE has with the chance given."""
    generator = np.random.default_rng(seed)
    has = [generator.random((len(chance), m)) < chance[:, None] for _ in range(m)]
    for base in range(m):
        has[base][:, base] = False
    return has


def test_latents_that_nobody_finds_are_the_offset():
    # Chances drawn evenly from [0, 1]: of a latent that others have, m SAEs leave E[(1 - p)^(m - 1)] = 1 / m.
    chance = np.where(np.arange(8000) < 2400, 0.0, np.random.default_rng(1).random(8000))
    found = sharing_law(has_of(chance, 8, 2))
    assert found.offset.value == pytest.approx(0.3, abs=0.02)
    assert found.exponent.value == pytest.approx(1, abs=0.1)
    assert found.offset.low < 0.3 < found.offset.high
    assert found.error < found.plain_error
    assert found.held_out < found.plain_held_out
    assert found.aic_difference > 0
    assert found.verdict == "undecided"  # of eight: seven points over less than a decade
    assert sharing_law(has_of(chance, 20, 2)).verdict == "offset"


def test_without_such_latents_there_is_none():
    found = sharing_law(has_of(np.random.default_rng(0).random(4000), 8, 3))
    assert found.offset.low in (0, None)
    assert found.verdict == "undecided"
    assert sharing_law(has_of(np.random.default_rng(0).random(4000), 20, 3)).verdict != "offset"


def test_a_fit_on_its_bound_has_no_interval_and_refutes_nothing():
    """All latents are found by half of the others: the offset is 0 in every fit, which is no measured 0."""
    found = sharing_law(has_of(np.full(3000, 0.05), 9, 1))
    assert found.offset.value == 0
    assert (found.offset.low, found.offset.high) == (None, None)
    assert "bound of the fit" in found.offset.reason
    assert found.verdict == "undecided"


def test_the_law_needs_five_saes(family):
    assert compare(family, settings=ComparisonSettings(controls=False)).law is None
    with pytest.raises(ConfigError, match="needs at least 5 SAEs; got 4"):
        sharing_law(has_of(np.ones(3), 4, 0))
    with pytest.raises(DataError, match="at least two points of finite shares"):
        fit_law(np.array([2]), np.array([0.5]))


def test_leaving_an_sae_out_is_the_curve_of_the_others():
    has = has_of(np.linspace(0, 1, 50), 5, 4)
    part = [np.delete(each, 2, axis=1) for at, each in enumerate(has) if at != 2]
    assert only_in_one(has, [0, 1, 3, 4]) == pytest.approx(only_in_one(part))


# ------------------------------------------------------------------ stability


def test_an_sae_among_copies_of_itself_is_stable():
    sae = sae_of(directions(24, 3))
    copies = [sae, *(sae.permute(order_of(24, seed)) for seed in range(3))]
    result = compare(copies, settings=ComparisonSettings(controls=False))
    for each in result.saes:
        assert each.stability == [1.0] * 24
        assert each.alignment == pytest.approx([1.0] * 24, abs=1e-6)
    assert result.groups.count == [0, 0, 0, 24]


def test_alignment_is_the_mean_cosine_with_the_partners(family):
    result = compare(family, settings=ComparisonSettings(controls=False))
    base = family[2]
    expected = torch.zeros(20, dtype=torch.float64)
    for pair, (i, j) in zip(result.pairs, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], strict=True):
        for side in (pair.decoder, pair.encoder):
            if i == 2:
                expected += torch.tensor(side.cosine, dtype=torch.float64)
            if j == 2:
                expected[torch.tensor(side.partner)] += torch.tensor(side.cosine, dtype=torch.float64)
    assert base.n_latents == 20
    assert result.saes[2].alignment == pytest.approx((expected / 6).tolist(), abs=1e-5)


def test_written_stability_stays_with_the_latents(family, tmp_path):
    paths = []
    for i, sae in enumerate(family):
        sae.save(tmp_path / f"seed{i}")
        paths.append(tmp_path / f"seed{i}" / ("sae.json" if i == 1 else ""))
    result = compare(paths, write=True, settings=ComparisonSettings(controls=False))
    for i, (sae, compared) in enumerate(zip(family, result.saes, strict=True)):
        stored = SAE.load(tmp_path / f"seed{i}")
        assert torch.equal(stored.W_dec, sae.W_dec)
        assert stored.scores["stability"].tolist() == pytest.approx(compared.stability)
        assert stored.scores["alignment"].tolist() == pytest.approx(compared.alignment, abs=1e-6)
        about = stored.provenance["stability"]
        assert about["mean"] == pytest.approx(np.mean(compared.stability), abs=1e-5)
        assert [other["seed"] for other in about["compared_with"]] == [j for j in range(4) if j != i]
        ranked = rank(stored, by="stability")
        assert ranked.scores["stability"].tolist() == sorted(stored.scores["stability"].tolist(), reverse=True)
    assert (
        compare(paths, settings=ComparisonSettings(controls=False)).saes[0].stability == result.saes[0].stability
    )  # writing changed no weight


def test_latents_without_a_partner_are_no_seed_found_them():
    wide = sae_of(directions(20, 0))
    narrow = wide.take(8)
    result = compare([wide, narrow], settings=ComparisonSettings(controls=False))
    assert result.saes[0].alignment[8:] == [None] * 12
    assert with_stability([wide, narrow], result)[0].scores["alignment"][8:].tolist() == [-1.0] * 12


def test_saes_that_began_alike_do_not_count_as_other_seeds():
    shared, own = directions(10, 0), directions(10, 1)
    a, b = sae_of(torch.cat([shared, own]), seed=0), sae_of(torch.cat([shared, own]), seed=0)
    c = sae_of(torch.cat([shared, directions(10, 2)]), seed=1)
    assert compare([a, b, c], settings=ComparisonSettings(controls=False)).saes[0].stability == [1.0] * 10 + [0.0] * 10
    assert compare([a, b], settings=ComparisonSettings(controls=False)).saes[0].stability == [1.0] * 20


def test_what_cannot_be_written(family, tmp_path):
    with pytest.raises(ConfigError, match="must be local folders; got an SAE in memory"):
        compare(family, write=True)
    family[0].save(tmp_path)
    with pytest.raises(ConfigError, match="must be local folders; got `hf:a/b/c`"):
        compare([tmp_path, "hf:a/b/c"], write=True)
    result = compare(family[:2], settings=ComparisonSettings(controls=False))
    with pytest.raises(ConfigError, match="SAE 0 must be `relu-20-seed0` of the comparison"):
        with_stability(family[1::-1], result)
    with pytest.raises(ConfigError, match="all 2 SAEs compared must be given; got 1"):
        with_stability(family[:1], result)
