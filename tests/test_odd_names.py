"""A name stands for the file or folder that is called so, in every room: no patterns, addresses or home folders."""

from __future__ import annotations

import contextlib
import shutil

import numpy as np
import pytest

import saekit as sk
from fixtures.known_saes import random_sae
from fixtures.tiny_models import folders as folders
from saekit.assets import builtin_model_path
from saekit.classification.settings import ClassifierSettings
from saekit.errors import SaekitError, StorageError
from saekit.evaluation.result import Evaluation
from saekit.files import write_json
from saekit.report.results_folder import load_result, saved_classifier, write_report
from saekit.rows.opening import as_source
from saekit.rows.shards import ShardRows, open_rows
from saekit.store.address import sae_paths
from saekit.training.settings import TrainSettings

ODD = ("a[1]", "a*", "a?", "~b", "~", "x::y", "p%20q", "a@main", "{c}", "s3:x", "with space", "#h", "ü", "-o", "a;b")


@pytest.fixture(params=ODD)
def place(request, tmp_path):
    """The path of a folder with an odd name, beside one that a pattern of that name would find, spelled absolutely."""
    (tmp_path / "a1").mkdir()
    with contextlib.chdir(tmp_path):
        yield tmp_path / request.param


def spellings(path):
    return (path, str(path), f"./{path.name}", path.name)


def test_saes(place):
    sae, decoy = random_sae(seed=0), random_sae(seed=1)
    decoy.save(place.parent / "a1")
    sae.save(place)
    for spelled in spellings(place):
        assert sk.SAE.load(spelled).digest() == sae.digest(), spelled
    sae.save(place.name)
    run = place.parent / f"{place.name}run"
    sae.save(run / "one")
    for spelled in spellings(run):
        assert [sk.SAE.load(path).digest() for path in sae_paths([spelled])] == [sae.digest()]


def test_rows(place, folders):
    rows = sk.capture(folders["llama"], ["the cat sat on a mat"], layer=1, out=place)
    for spelled in spellings(place):
        assert ShardRows(spelled).info["digest"] == rows.info["digest"]
        assert as_source(spelled, 16, "test").n_rows == rows.n_rows
    sk.capture(folders["llama"], ["the cat sat on a mat"], layer=1, out=place.name)
    np.save(f"{place}.npy", np.ones((4, 16), np.float32))
    for spelled in spellings(place.with_name(f"{place.name}.npy")):
        assert as_source(spelled, 16, "test").n_rows == 4


def test_models(place, folders):
    shutil.copytree(folders["llama"], place)
    digest = sk.load_model(folders["llama"]).digest
    for spelled in spellings(place):
        assert sk.load_model(spelled).digest == digest


def test_images(place):
    import PIL.Image

    place.mkdir()
    PIL.Image.fromarray(np.full((4, 4), 7, np.uint8)).save(place / "x.png")
    for spelled in spellings(place):
        assert np.asarray(sk.read_images(spelled)[0])[0, 0] == 7


def test_runs_and_reports(place):
    rows = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    sk.train(sk.TopK(n_latents=16, k=2), rows, tokens=128, settings=TrainSettings(batch_rows=32), out=place)
    for spelled in spellings(place):
        assert write_report(spelled).parent.resolve() == place
        assert len(sae_paths([spelled])) == 1


def as_source_of_16(name):
    return as_source(name, 16, "test")


READERS = (sk.load_model, sk.read_texts, sk.read_images)
OTHERS = (sk.SAE.load, as_source_of_16, write_report, open_rows)
LOADERS = (load_result, saved_classifier, Evaluation.load)  # which raise FileNotFoundError where nothing is there


def save_sae(place):
    random_sae(seed=0).save(place)


def save_rows(place):
    sk.capture("builtin", ["the cat sat"], layer=1, out=place)


def save_run(place):
    rows = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    sk.train(sk.TopK(n_latents=16, k=2), rows, tokens=128, settings=TrainSettings(batch_rows=32), out=place)


def save_features(place):
    data = ([f"text {i}" for i in range(40)], [i % 3 % 2 for i in range(40)])
    sk.classify(random_sae(d=192), model="builtin", data=data, settings=SMALL, out=place)


SMALL = ClassifierSettings(arms=("dense",), layer=1)
WRITERS = (save_sae, save_rows, save_run, save_features)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a\0b", "\udc80", "", "x" * 5000, "a/" * 3000])
def test_names_that_cannot_be_paths_are_refused(name):
    for read in READERS if len(name) > 1000 else (*READERS, *OTHERS):
        with pytest.raises(SaekitError):
            read(name)


def save_model(place):
    shutil.copytree(builtin_model_path(), place, dirs_exist_ok=True)


@pytest.mark.parametrize("save", [*WRITERS, save_model])
def test_no_name_is_not_the_folder_of_now(save, tmp_path):
    """An unset variable of a shell is an empty name: refused, whatever lies here, and nothing is written here."""
    with contextlib.chdir(tmp_path):
        save(".")
        before = sorted(tmp_path.rglob("*"))
        for use in (*READERS, *OTHERS, *LOADERS, *WRITERS):
            with pytest.raises(SaekitError):
                use("")
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [".", "..", "folder", "folder/"])
def test_a_file_does_not_take_the_place_of_a_folder(name, tmp_path):
    (tmp_path / "folder").mkdir()
    with (
        contextlib.chdir(tmp_path / "folder" if name == ".." else tmp_path),
        pytest.raises(StorageError, match="folder"),
    ):
        write_json(name, {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder"]
