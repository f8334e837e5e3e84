"""The sources of a crosscoder: planted latents, latent scaling against plain least squares, the null, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fixtures.row_checks import whole
from saekit import SAE, ArrayRows, BatchTopK, TrainSettings, compare, evaluate, train
from saekit.comparison.settings import ComparisonSettings, SourceSettings
from saekit.comparison.sources import SourceComparison, compare_sources
from saekit.errors import ConfigError, DataError, FormatError, ShapeError
from saekit.evaluation.settings import EvaluationSettings
from saekit.provenance import place_of
from saekit.report.page import sections_of
from saekit.rows.joined import join_rows, null_rows
from saekit.rows.shards import open_rows
from saekit.sae.rules import ReLURule
from saekit.sae.scaling import Scaling

NAMES = ("base", "tuned")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def crosscoder(decoder: torch.Tensor, widths: tuple[int, int], encoder: torch.Tensor | None = None) -> SAE:
    n, d = decoder.shape
    parts = [{"name": name, "width": width} for name, width in zip(NAMES, widths)]
    return SAE(
        W_enc=decoder if encoder is None else encoder, b_enc=-0.1 * torch.ones(n), W_dec=decoder,
        b_dec=0.1 * randn(d, seed=9), rule=ReLURule(), provenance={"parts": parts},
    )  # fmt: skip


def rows_of(x: torch.Tensor, width: int) -> ArrayRows:
    return join_rows(dict(zip(NAMES, x.split((width, x.shape[1] - width), 1))))


# ---------------------------------------------------------------- planted latents


@pytest.fixture(scope="module")
def planted() -> ArrayRows:
    """Rows of 22 features: 16 in both sources, three in the first alone, three in the second alone; and noise."""
    chance = torch.full((22,), 0.1)
    chance[16:] = 0.04
    chosen = torch.rand(4000, 22, generator=torch.Generator().manual_seed(1)) < chance
    codes = chosen * (0.5 + randn(4000, 22, seed=2).abs())
    a = torch.linalg.qr(randn(32, 32, seed=3))[0][:22].clone()
    b = a.clone()
    a[19:], b[16:19] = 0, 0
    base, tuned = (codes @ each + 0.01 * randn(4000, 32, seed=seed) for each, seed in ((a, 5), (b, 6)))
    return join_rows({"base": base, "tuned": 7 + 3 * tuned})


@pytest.fixture(scope="module")
def compared(planted) -> SourceComparison:
    config, settings = BatchTopK(n_latents=24, k=2), TrainSettings(batch_rows=64)
    # One of the seeds whose SAE finds all 22 features: of 8, three do (with other learning rates half).
    [found] = train(config, planted, seeds=[0], tokens=20_000, settings=settings)
    [null] = train(config, null_rows(planted), tokens=20_000, settings=settings)
    return compare_sources(found, planted, null=null)


def test_planted_latents_are_found_in_their_sources_and_the_null_flags_none(compared):
    counts = {name: round(value.value * compared.n_alive) for name, value in compared.found.kinds.items()}
    assert {name: counts[name] for name in ("only in base", "only in tuned")} == {"only in base": 3, "only in tuned": 3}
    assert counts["shared"] == compared.n_alive - 6
    specific = {name: round(value.value * compared.n_alive) for name, value in compared.found.specific.items()}
    assert specific == {"base": 3, "tuned": 3}
    assert compared.null is not None
    assert [value.value for value in compared.null.specific.values()] == [0, 0]


def test_the_result_is_read_back_and_shown(compared, tmp_path):
    compared.save(tmp_path / "source_comparison.json")
    assert SourceComparison.load(tmp_path / "source_comparison.json") == compared
    main, *_ = sections_of(compared.to_json())
    assert [row[0].text for row in main.tables[0].rows][:2] == ["only in base", "mostly in base"]
    assert f"{compared.n_alive} latents fire" in compared.caption()
    with pytest.raises(FormatError, match="of two sources"):
        dataclasses.replace(compared, sources=["a"]).check()


# ---------------------------------------------------------------- latent scaling


def test_latent_scaling_is_that_of_plain_least_squares():
    decoder, x = randn(20, 12), randn(300, 12, seed=1)
    sae = crosscoder(decoder, (6, 6), randn(20, 12, seed=2))
    found = compare_sources(sae, rows_of(x, 6), settings=SourceSettings(batch_rows=77))
    z = sae.encode(x).to_dense().double().numpy()
    D = decoder.double().numpy()
    written = z @ D
    error = x.double().numpy() - written - sae.b_dec.double().numpy()
    for j in range(20):
        parts = [D[j, :6], D[j, 6:]]
        norms = [np.linalg.norm(part) for part in parts]
        own = int(norms[1] > norms[0])
        assert found.relative_norm[j] == pytest.approx(norms[1] / sum(norms), rel=1e-5)
        betas = []
        for y in (error, written):
            each = []
            for part, at in enumerate((slice(0, 6), slice(6, 12))):
                wanted = y[:, at] + (np.outer(z[:, j], parts[part]) if y is error else 0)
                atoms = np.outer(z[:, j], parts[own]).ravel()
                each.append(float(np.linalg.lstsq(atoms[:, None], wanted.ravel(), rcond=None)[0][0]))
            betas.append(each)
        for each, nu in zip(betas, (found.nu_error[j], found.nu_reconstruction[j])):
            if each[own] > 0:
                assert nu == pytest.approx(each[1 - own] / each[own], rel=1e-3, abs=1e-4)
            else:
                assert nu is None


def test_shrunk_and_decoupled_latents_are_not_specific():
    # Feature 0 is in both sources. Shrunk: a latent writes it into the second alone, and the first keeps it as error.
    z = randn(500, 1, seed=1).abs() + 0.2
    basis = torch.eye(4)
    x = torch.cat([z * basis[0], z * basis[0] + 1e-6 * randn(500, 4)], 1)
    only = torch.cat([torch.zeros(4), basis[0]])[None]
    shrunk = dataclasses.replace(crosscoder(only, (4, 4)), b_dec=torch.zeros(8), b_enc=torch.zeros(1))
    found = compare_sources(shrunk, rows_of(x, 4))
    assert found.found.kinds["only in tuned"].value == 1
    assert found.nu_error[0] == pytest.approx(1, rel=1e-4)
    assert found.found.specific["tuned"].value == 0
    # Decoupled: another latent, which fires with it, writes it into the first.
    other = torch.cat([torch.cat([basis[0], torch.zeros(4)])[None], only])
    decoupled = dataclasses.replace(crosscoder(other, (4, 4)), b_dec=torch.zeros(8), b_enc=torch.zeros(2))
    found = compare_sources(decoupled, rows_of(x, 4))
    assert found.nu_reconstruction == pytest.approx([1, 1], rel=1e-4)
    assert [value.value for value in found.found.specific.values()] == [0, 0]
    # What is in the second alone is specific to it.
    alone = compare_sources(shrunk, rows_of(torch.cat([0.01 * randn(500, 4), z * basis[0]], 1), 4))
    assert alone.found.specific["tuned"].value == 1


def test_sources_of_different_widths_have_kinds_alone():
    sae = crosscoder(randn(20, 10), (4, 6), randn(20, 10, seed=2))
    rows = rows_of(randn(300, 10, seed=1), 4)
    found = compare_sources(sae, rows)
    assert (found.found.specific, found.nu_error) == ({}, [])
    assert sum(value.value for value in found.found.kinds.values()) == pytest.approx(1)
    with pytest.raises(ConfigError, match="no null for others"):
        compare_sources(sae, rows, null=sae)


# ---------------------------------------------------------------- the null


def test_the_null_holds_the_first_source_and_noise_as_large_as_the_difference():
    a, b = randn(4000, 3), randn(4000, 3, seed=1)
    null = null_rows(join_rows({"base": 5 * a + 2, "tuned": 0.1 * b}))
    first, second = whole(null).x.split(3, 1)
    torch.testing.assert_close(first, 5 * a + 2)
    # both scaled to variance 1 per dimension they differ by sqrt 2, which is 5 sqrt 2 in the units of the first
    torch.testing.assert_close((second - first).std(0), torch.full((3,), 5 * 2**0.5), rtol=0.1, atol=0)
    again = null_rows(join_rows({"base": 5 * a + 2, "tuned": 0.1 * b}))
    assert again.info["digest"] == null.info["digest"]
    assert null_rows(join_rows({"base": a, "tuned": b}), seed=1).info["digest"] != null.info["digest"]


# ---------------------------------------------------------------- refusals and addresses


def test_what_cannot_be_compared_is_refused():
    sae, rows = crosscoder(randn(20, 12), (6, 6)), rows_of(randn(300, 12, seed=1), 6)
    with pytest.raises(ConfigError, match="crosscoder of two sources; it is one of 1"):
        compare_sources(dataclasses.replace(sae, provenance={}), rows)
    with pytest.raises(ConfigError, match="same names in the same order"):
        compare_sources(sae, whole(rows).x)
    with pytest.raises(ConfigError, match="same names in the same order"):
        compare_sources(sae, join_rows({"tuned": whole(rows).x[:, :6], "base": whole(rows).x[:, 6:]}))
    with pytest.raises(ShapeError, match="must have the width"):
        compare_sources(sae, rows_of(randn(300, 10, seed=1), 5))
    with pytest.raises(ShapeError, match="same shape"):
        compare_sources(sae, rows, null=sae.take(3))
    silent = dataclasses.replace(sae, b_enc=torch.full((20,), -1e6))
    with pytest.raises(DataError, match="some latent must fire"):
        compare_sources(silent, rows)
    with pytest.raises(ConfigError, match="`error_limit`"):
        SourceSettings(error_limit=-1.0)


def captured(hooks, x, model="digest-1", **more) -> ArrayRows:
    """Joined rows that say which modules they come from."""
    rows = rows_of(x, x.shape[1] // 2)
    parts = [
        {**part, "model": "m", "model_digest": model, "hook": hook, **more}
        for part, hook in zip(rows.info["parts"], hooks)
    ]
    return ArrayRows(x, info={"parts": parts})


def test_sources_are_those_of_the_training():
    x = randn(300, 12, seed=1)
    rows = captured(("layers.1", "layers.2"), x)
    sae = crosscoder(randn(20, 12), (6, 6)).replace(provenance={"parts": rows.info["parts"]})
    assert compare_sources(sae, rows).warnings == []
    with pytest.raises(ConfigError, match=r"rows of `layers.1` as `base`; there these are rows of `layers.2`"):
        compare_sources(sae, captured(("layers.2", "layers.1"), x))
    [warned, _] = compare_sources(sae, captured(("layers.1", "layers.2"), x, model="digest-2")).warnings
    assert warned.code == "other_model"
    [warned] = compare_sources(sae, rows_of(x, 6)).warnings
    assert warned.code == "unknown_rows"
    assert [each.code for each in evaluate(sae, captured(("layers.2", "layers.1"), x), progress=False).warnings] == [
        "other_hook", "other_hook",
    ]  # fmt: skip


def test_the_null_is_one_and_the_sae_is_none():
    rows = rows_of(randn(300, 12, seed=1), 6)
    sae = crosscoder(randn(20, 12), (6, 6))
    null = sae.replace(provenance={"parts": null_rows(rows).info["parts"]})
    assert compare_sources(sae, rows, null=null).null is not None
    with pytest.raises(ConfigError, match="the null must be a crosscoder of rows whose sources hold the same"):
        compare_sources(sae, rows, null=sae)
    with pytest.raises(ConfigError, match="the SAE must be of the sources themselves"):
        compare_sources(null, rows)
    with pytest.raises(ConfigError, match="the rows must be of the sources themselves"):
        compare_sources(sae, null_rows(rows))


def test_a_decoder_row_of_length_0_is_in_neither_source():
    decoder, rows = randn(20, 12), rows_of(randn(300, 12, seed=1), 6)
    encoder = decoder.clone()
    decoder[:5] = 0
    found = compare_sources(crosscoder(decoder, (6, 6), encoder), rows)
    assert found.n_alive == 15
    assert sum(value.value for value in found.found.kinds.values()) == pytest.approx(1)
    assert found.relative_norm[:5] == [None] * 5


def test_a_crosscoder_has_no_one_place():
    with pytest.raises(ConfigError, match="explain: the SAE must belong to one place in a model; it is a crosscoder"):
        place_of(crosscoder(randn(20, 12), (6, 6)), where="explain")


def test_only_crosscoders_of_the_same_sources_are_compared():
    one, other = (crosscoder(randn(20, 12, seed=seed), (6, 6)) for seed in (0, 1))
    rows = rows_of(randn(300, 12, seed=2), 6)
    assert compare([one, other], rows, settings=ComparisonSettings(controls=False)).shared.value < 1
    for parts in ([], one.provenance["parts"][::-1]):
        with pytest.raises(ConfigError, match="compare: all crosscoders must have the same sources in the same order"):
            compare([one, dataclasses.replace(other, provenance={"parts": parts})])
    with pytest.raises(ConfigError, match="compare: the rows must be joined ones"):
        compare([one, other], join_rows({"tuned": whole(rows).x[:, :6], "base": whole(rows).x[:, 6:]}))


def test_no_source_outweighs_the_others_in_what_partners_and_pursuit_cost():
    """Making one source a thousand times louder, and the crosscoders' scales fit, changes no FVU."""
    x = randn(400, 12, seed=2)
    x[:, 6:] += x[:, :6]
    found = []
    for loud in (1.0, 1000.0):
        by = torch.cat([torch.ones(6), torch.full((6,), loud)])
        saes = [
            crosscoder(randn(20, 12, seed=seed), (6, 6)).replace(
                scaling=Scaling("standardize", scale=1 / by, mean=torch.zeros(12))
            )
            for seed in (0, 1)
        ]
        rows = rows_of(x * by, 6)
        compared = compare(saes, rows, settings=ComparisonSettings(controls=False))
        settings = EvaluationSettings(controls=False, pursuit_rows=100)
        pursued = evaluate(saes[0], rows, settings=settings, progress=False).entries[0].pursuit
        found.append([compared.function[name].value for name in ("fvu_own", "fvu_partners", "fvu_random")])
        found[-1] += [pursued["fvu_encoder"].value, pursued["fvu_pursuit"].value]
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_addresses_of_joined_rows(tmp_path):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", randn(300, 4, seed=ord(name)).numpy())
    rows = open_rows(f"joined:base={tmp_path}/a.npy,tuned={tmp_path}/b.npy")
    assert [part["name"] for part in rows.info["parts"]] == ["base", "tuned"]
    assert rows.d_in == 8
    null = open_rows(f"joined-null:base={tmp_path}/a.npy,tuned={tmp_path}/b.npy")
    torch.testing.assert_close(whole(null).x[:, :4], whole(rows).x[:, :4])
    for wrong in ("joined:", "joined:a", "joined:a=x,a=y", "joined:=x,b=y"):
        with pytest.raises(ConfigError, match="a name and a path"):
            open_rows(wrong)
