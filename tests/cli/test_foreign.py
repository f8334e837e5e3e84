"""SAEs of other libraries on the command line: shown, converted, compared; the catalog."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from saekit import SAE
from saekit.sae.rules import ReLURule
from saekit.store.native import save


@pytest.fixture(scope="module")
def real(shared_data: Path) -> Path:
    """Folder of five seeds of one real TopK SAE, made by others."""
    return shared_data / "sae_files" / "rf_topk_5seeds"


def test_catalog(call):
    status, out, _ = call("catalog", "gemma-2-2b", "residual")
    assert status == 0
    assert "hf:google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82" in out
    status, out, _ = call("catalog", "qwen", "--json")
    assert {release["format"] for release in json.loads(out)["releases"]} == {
        "qwen_scope",
        "circuit_tracer",
        "dictionary_learning",
    }
    status, _, err = call("catalog", "mamba")
    assert (status, "no release fits `mamba`" in err) == (2, True)


def test_convert_refuses_what_the_format_lacks(call, tmp_path):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(16, 6, generator=g)
    save(SAE(W, torch.zeros(16), W, torch.zeros(6), ReLURule()), tmp_path / "sae")
    status, out, err = call("convert", tmp_path / "sae", tmp_path / "out", "--to", "saelens")
    assert status == 0, err
    assert "read back: codes differ by" in out
    status, _, err = call("convert", tmp_path / "sae", tmp_path / "no", "--to", "sparsify")
    assert (status, "the format sparsify has no rule relu" in err) == (2, True)
    assert not (tmp_path / "no").exists()
    status, _, err = call("convert", tmp_path / "sae", tmp_path / "out", "--to", "saelens")
    assert (status, "must not exist, or be an empty folder" in err) == (2, True)


def test_real_files_are_shown_converted_and_compared(call, tmp_path, real):
    first, second = real / "seed_0.sae.pt", real / "seed_1.sae.pt"
    status, out, err = call("show", first)
    assert status == 0, err
    assert "single_file" in out
    status, out, err = call("convert", first, tmp_path / "native", "--json")
    assert status == 0, err
    assert max(json.loads(out)["differences"].values()) < 1e-6
    status, out, err = call("compare", first, second, "--json")
    assert status == 0, err
    a, b = (torch.nn.functional.normalize(SAE.load(path).W_dec, dim=1).double().numpy() for path in (first, second))
    cosines = a @ b.T
    rows, columns = linear_sum_assignment(-cosines)
    assert json.loads(out)["mean_cosine"]["value"] == pytest.approx(np.mean(cosines[rows, columns]), abs=1e-6)


def test_folder_with_several_foreign_saes_stands_for_all_of_them(call, real):
    status, out, err = call("show", real, "--json")
    assert status == 0, err
    assert [Path(facts["path"]).name for facts in json.loads(out)["saes"]] == [f"seed_{i}.sae.pt" for i in range(5)]
    status, _, err = call("convert", real, real / "no")  # one SAE is needed
    assert status == 2
    assert "`seed_0.sae.pt`, `seed_1.sae.pt`" in err
