"""``saekit prune`` from end to end, and the curve that ``saekit show`` draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit import SAE, SyntheticRows
from saekit.files import read_sealed
from saekit.sae.rules import ReLURule, TopKRule
from saekit.sizes.result import SizeCurve

WIDTH = 12
QUICK = ("--set", "sample_rows=60")


@pytest.fixture
def rows(tmp_path) -> Path:
    source = SyntheticRows(d_in=WIDTH, n_features=24, l0=2, n_rows=2048, seed=0)
    np.save(tmp_path / "rows.npy", next(iter(source.batches(2048))).x.numpy())
    return tmp_path / "rows.npy"


@pytest.fixture
def sae(tmp_path) -> Path:
    source = SyntheticRows(d_in=WIDTH, n_features=24, l0=2, n_rows=64, seed=0)
    D = source.dictionary[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    value = SAE(W_enc=D, b_enc=torch.zeros(24), W_dec=D, b_dec=source.offset, b_pre=source.offset, rule=TopKRule(2))
    value.save(tmp_path / "sae")
    return tmp_path / "sae"


def test_prune_writes_every_size_and_one_file_for_all(call, sae, rows):
    status, out, err = call("prune", sae, "--by", "energy", "--sizes", "4,12", "--rows", rows, "--out", "small", *QUICK)
    assert status == 0, err
    lines = out.partition("Note: ")[0].splitlines()
    assert lines[0].split()[:1] == ["latents"]
    assert [line.split()[0] for line in lines[1:4]] == ["4", "12", "24"]
    assert "█" in lines[3]
    for size in (4, 12):
        assert SAE.load(f"small/{size}").n_latents == size
    curve = SizeCurve.load("small/sizes.json")
    assert curve.rows["part"].startswith("odd")
    assert curve.n_rows == 1024
    target = curve.values("fvu")[1].value
    assert SAE.load("small/progressive", fvu=target).n_latents == 12
    assert torch.equal(SAE.load("small/progressive", latents=4).W_dec, SAE.load("small/4").W_dec)

    status, out, err = call("show", "small/progressive")
    assert status == 0, err
    assert "latent order  energy" in out
    assert out.splitlines()[-4:] == lines[:4]
    assert call("show", "small/4")[1].count("█") == 0

    status, out, err = call("report", "small")
    assert status == 0, err
    assert "What each size is worth" in Path("small/report.html").read_text()


def test_json_is_one_object(call, sae, rows):
    status, out, err = call("prune", sae, "--sizes", "4", "--rows", rows, "--out", "small", "--json", *QUICK)
    assert status == 0
    assert err == ""
    found = json.loads(out)
    assert found["saes"] == ["small/4"]
    assert found["progressive"] == "small/progressive"
    assert found["by"] == "energy"
    assert found["curve"] == read_sealed("small/sizes.json")
    assert set(found["curve"]["points"][0]["metrics"]["fvu"]) >= {"value", "low", "high", "unit"}


def test_refit_measures_the_refitted_and_keeps_the_prefixes_in_the_file(call, sae, rows):
    options = ("--sizes", "4,12", "--by", "backward", "--rows", rows, "--out", "small", "--json", *QUICK)
    status, out, err = call("prune", sae, *options, "--refit")
    assert status == 0, err
    fitted = SizeCurve.from_json(json.loads(out)["curve"])
    assert fitted.sizes == [4, 12]
    status, out, err = call("prune", sae, *options)
    plain = SizeCurve.from_json(json.loads(out)["curve"])
    assert plain.sizes == [4, 12, 24]
    assert fitted.values("fvu")[0].value < plain.values("fvu")[0].value


def test_scores_from_a_file(call, sae, rows):
    np.save("scores.npy", np.arange(24))
    status, _, err = call("prune", sae, "--by", "scores.npy", "--sizes", "2", "--rows", rows, "--out", "small", *QUICK)
    assert status == 0, err
    assert torch.equal(SAE.load("small/2").W_dec, SAE.load(sae).W_dec[[23, 22]])


def test_rows_from_the_model_that_the_sae_was_trained_on(call, stories, tmp_path):
    Path("texts.txt").write_text("\n".join("Once upon a time there was a little dog who ran." for _ in range(40)))
    W = torch.cat([torch.eye(64), -torch.eye(64)])
    value = SAE(W_enc=W, b_enc=torch.zeros(128), W_dec=W, b_dec=torch.zeros(64), rule=ReLURule())
    value.save("plain")
    known = {"model": str(stories), "hook": "layers.1", "data": "texts.txt"}
    value.replace(provenance=known).save("sae")
    options = ("--sizes", "64", "--tokens", "300", "--out", "small", "--json", *QUICK)
    given = ("--model", stories, "--data", "texts.txt", "--layer", "1")
    found = []
    for arguments in (("sae", *options), ("plain", *options, *given)):
        status, out, err = call("prune", *arguments)
        assert status == 0, err
        found.append(json.loads(out)["curve"]["points"])
    assert found[0] == found[1]
    assert "ce_sae" in found[0][0]["metrics"]
    status, _, err = call("prune", "plain", *options, "--model", stories, "--data", "texts.txt")
    assert status == 2
    assert "`layer` or `hook` must say" in err
    assert "`plain` does not say where in the model it belongs" in err
    status, out, err = call("prune", "plain", *options, *given, "--by", "attribution")
    assert status == 0, err
    found = json.loads(out)
    assert found["by"] == "attribution"
    assert found["curve"]["language_model"]["data"] == "texts.txt"
    scores = SAE.load("small/progressive").scores
    assert set(scores) == {"attribution", "cross_entropy"}
    assert (scores["attribution"].diff() <= 0).all()
    status, _, err = call("prune", "plain", *options, "--model", stories)
    assert (status, "`data` must be given with `model`" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sizes", "4,25"), "must lie within 1..24"),
        (("--sizes", "4,x"), "--sizes must be whole numbers"),
        (("--sizes", "4", "--by", "enrgy"), "Did you mean `energy`"),
        (("--sizes", "4", "--by", "atribution"), "Did you mean `attribution`"),
        (("--sizes", "4", "--by", "none.npy"), "cannot be read"),
        (("--sizes", "4", "--by", "attribution"), "`model` and `data` must be given: `attribution` is a gradient"),
        (("--sizes", "4", "--selection", "amid"), "must be 'before' or 'after'"),
        (("--by", "energy"), "`--sizes` must be given"),
        (("--sizes", "4", "--set", "size=3"), "unknown setting `size`"),
    ],
)
def test_wrong_calls(call, sae, rows, arguments, message):
    status, out, err = call("prune", sae, *arguments, "--rows", rows, "--out", "small")
    assert status == 2
    assert message in err
    assert out == ""
    assert not Path("small").exists()


def test_ties_of_a_score_in_the_file_are_told_before_any_row_is_read(call, sae):
    scored = SAE.load(sae).with_scores(stability=(torch.arange(24) < 3).float(), alignment=torch.arange(24.0))
    scored.save(sae)
    status, _, err = call("prune", sae, "--by", "stability", "--sizes", "4", "--rows", "nowhere", "--out", "small")
    assert status == 2
    assert "4 latents cannot be chosen by `stability`: only 3 have more of it than 0" in err
    assert "rank by `alignment`" in err


def test_no_rows_at_all(call, sae):
    status, _, err = call("prune", sae, "--sizes", "4", "--out", "small")
    assert status == 2
    assert "`rows`, or `model` and `data`, must be given" in err


# ------------------------------------------------------------------ progressive


@pytest.fixture
def run(call, rows) -> Path:
    arguments = ("--arch", "topk,matryoshka", "--latents", 16, "--k", 2, "--seeds", "0,1", "--set", "batch_rows=256")
    status, _, err = call("train", "--rows", rows, *arguments, "--out", "run")
    assert status == 0, err
    return Path("run")


def test_progressive_compares_the_saes_of_a_run(call, run, rows):
    status, out, err = call("progressive", run, "--rows", rows, "--out", "run", *QUICK)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["fvu", "2", "4", "8", "16"]
    assert any(line.startswith("topk pruned by energy") for line in lines)
    assert "exponent" in out
    assert "ce_sae" not in out
    status, out, err = call("report", "run")
    assert status == 0, err
    assert "Small SAEs from large ones" in Path("run/report.html").read_text()


def test_progressive_finds_the_rows_of_the_run(call, run, rows):
    options = ("--sizes", "4,16", "--by", "energy", "--json", *QUICK)
    status, out, err = call("progressive", run, *options)
    assert status == 0, err
    found = json.loads(out)
    assert found == json.loads(call("progressive", run, *options, "--rows", rows)[1])
    assert {(point["name"], point["size"]) for point in found["curves"]} == {
        (name, size) for name in ("matryoshka", "topk pruned by energy") for size in (4, 16)
    }
    np.save(rows, np.zeros((4, WIDTH)))  # no longer the rows that the digest is of
    status, _, err = call("progressive", run, *options)
    assert status == 2
    assert "`rows`, or `model` and `data`, must be given" in err


def test_progressive_refuses(call, run, rows):
    for arguments, message in (
        (("--sizes", "4,17"), "within 1..16"),
        (("--by", "enrgy"), "Did you mean `energy`"),
        (("--by", "attribution"), "is a gradient of a language model; got none"),
        (("--set", "sizs=3"), "unknown setting `sizs`"),
    ):
        status, out, err = call("progressive", run, "--rows", rows, *arguments)
        assert (status, out) == (2, "")
        assert message in err
