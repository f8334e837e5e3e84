"""Which SAEs an address stands for."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from saekit.sae.model import SAE
from saekit.sae.naming import given_saes, named_saes
from saekit.sae.rules import ReLURule
from saekit.store.address import sae_paths


def test_a_run_stands_for_its_saes_in_order(tmp_path):
    for name in ("b", "a"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "sae.json").touch()
    assert sae_paths(tmp_path / "run") == [str(tmp_path / "run" / name) for name in "ab"]
    one = str(tmp_path / "run" / "a")
    assert sae_paths([one, str(tmp_path / "run")]) == [one, one, str(tmp_path / "run" / "b")]


def test_what_is_not_there_and_what_is_on_the_hub_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert sae_paths(["nowhere", "empty", "hf:a/b/c"]) == ["nowhere", "empty", "hf:a/b/c"]


def test_a_folder_of_another_librarys_saes_stands_for_all_of_them(tmp_path):
    for layer in (10, 2):
        torch.save({"W": torch.zeros(3)}, tmp_path / f"layer{layer}.sae.pt")
        (tmp_path / "run" / f"layers.{layer}").mkdir(parents=True)
        save_file({"W": torch.zeros(3)}, tmp_path / "run" / f"layers.{layer}" / "sae.safetensors")
    (tmp_path / "notes.txt").touch()
    assert sae_paths(tmp_path) == [str(tmp_path / f"layer{layer}.sae.pt") for layer in (2, 10)]
    assert sae_paths(tmp_path / "run") == [str(tmp_path / "run" / f"layers.{layer}") for layer in (2, 10)]


def test_a_folder_that_is_one_sae_with_several_files_of_weights_is_one(tmp_path):
    for name in ("sae_weights.safetensors", "optimizer.safetensors"):
        save_file({"W": torch.zeros(3)}, tmp_path / name)
    (tmp_path / "cfg.json").write_text("{}")
    assert sae_paths(tmp_path) == [str(tmp_path)]


def test_functions_take_a_run_as_all_its_saes(tmp_path):
    W = torch.eye(3)
    for name in ("a", "b"):
        SAE(W_enc=W, b_enc=W[0], W_dec=W, b_dec=W[0], rule=ReLURule()).save(tmp_path / name)
    assert [name for name, _ in named_saes(tmp_path, "evaluate")] == ["a", "b"]
    assert len(given_saes([tmp_path, tmp_path / "a"])) == 3
