"""Looking at a file without reading its weights, and reading the rows of some latents alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saekit.errors import SaekitError
from saekit.sae.model import SAE
from saekit.store import tensorfile
from saekit.store.hollow import Hollow
from saekit.store.opening import describe

sys.path.insert(0, str(Path(__file__).parent / "formats"))
from layouts import CASES


def facts_of(sae: SAE) -> dict:
    return {
        "n_latents": sae.n_latents,
        "d_in": sae.d_in,
        "d_out": sae.d_out,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "rule": {"name": sae.rule.name, **sae.rule.settings()},
        "scaling": sae.scaling.settings(),
        "tensors": {name: list(tensor.shape) for name, tensor in sae.tensors().items()},
        "provenance": sae.provenance,
    }


@pytest.fixture
def read(monkeypatch):
    """Rows of each tensor that were read, with its shape."""
    seen = []
    rows = tensorfile.read_rows

    def record(stream, entry, count=None):
        seen.append((entry.shape, count))
        return rows(stream, entry, count)

    monkeypatch.setattr(tensorfile, "read_rows", record)
    return seen


@pytest.mark.parametrize("name", CASES)
def test_what_is_shown_without_the_weights_is_what_they_make(name, tmp_path, read):
    address, _ = CASES[name](tmp_path, 24, 8)
    shown = describe(address)
    assert all(len(shape) < 2 for shape, _ in read)
    expected = facts_of(SAE.load(address))
    assert {key: shown[key] for key in expected} == expected
    json.dumps(shown)


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_no_matrix_of_other_containers_is_read_either(suffix, tmp_path, monkeypatch):
    """A file in which the weights are not finite is shown; loading it is refused."""
    name = {".pt": "goodfire", ".npz": "gemma_scope"}[suffix]
    address, _ = CASES[name](tmp_path, 24, 8)
    file = next(path for path in tmp_path.rglob("*") if path.suffix in (suffix, ".pth"))
    if suffix == ".pt":
        value = torch.load(file, weights_only=True)
        value[next(key for key in value if key.endswith("weight"))][0, 0] = torch.nan
        torch.save(value, file)
    else:
        import numpy as np

        arrays = dict(np.load(file))
        arrays["W_enc"][0, 0] = np.nan
        np.savez(file, **arrays)
    assert describe(address)["n_latents"] == 24
    with pytest.raises(SaekitError, match="NaN or infinite"):
        SAE.load(address)


def test_weights_of_many_gigabytes_are_shown_at_once(tmp_path, read):
    """20 GB each, which are holes in the file."""
    n, d = 1_000_000, 5_000
    shapes = {"W_enc": [d, n], "W_dec": [n, d], "b_enc": [n], "b_dec": [d]}
    table, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table).encode()
    with open(tmp_path / "sae_weights.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": d, "d_sae": n}))
    shown = describe(tmp_path)
    assert (shown["n_latents"], shown["d_in"], shown["rule"]["name"]) == (n, d, "relu")
    assert sorted(shape for shape, _ in read) == [(d,), (n,)]


@pytest.mark.parametrize("name", ["sparsify", "saelens_standard", "circuit_tracer", "llamascopium_transcoder"])
def test_a_prefix_reads_the_rows_of_its_latents(name, tmp_path, read):
    case = next(each for each in CASES if each.startswith(name))
    address, _ = CASES[case](tmp_path, 24, 8)
    whole = SAE.load(address)
    read.clear()
    part = SAE.load(address, latents=6)
    assert part.digest() == whole.take(6).digest()
    matrices = [count for shape, count in read if shape == (24, 8)]
    assert matrices
    assert set(matrices) == {6}


def test_rows_that_are_not_wanted_are_not_looked_at(tmp_path):
    """They may even be damaged; those that are wanted may not."""
    address, _ = CASES["sparsify"](tmp_path, 24, 8)
    tensors = load_file(address / "sae.safetensors")
    tensors["encoder.weight"][20, 0] = torch.nan
    save_file(tensors, address / "sae.safetensors")
    assert SAE.load(address, latents=20).n_latents == 20
    with pytest.raises(SaekitError, match="NaN"):
        SAE.load(address, latents=21)


def test_a_square_file_is_read_whole(tmp_path, read):
    address, _ = CASES["sparsify"](tmp_path, 8, 8)
    assert SAE.load(address, latents=4).digest() == SAE.load(address).take(4).digest()
    assert all(count is None for _, count in read)


def test_operations_on_tensors_without_numbers():
    hollow = Hollow((6, 4), torch.float32)
    assert hollow.T.shape == (4, 6)
    assert (hollow * torch.ones(6)[:, None]).norm(dim=1).shape == (6,)
    assert hollow.to(torch.bfloat16).dtype == torch.bfloat16
    assert bool(hollow.isfinite().all())
    assert repr(hollow) == "Hollow((6, 4), torch.float32)"
