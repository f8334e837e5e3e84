"""The catalog: every example is an address, its format exists, and SAELens' own names resolve where it is installed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fixtures.hub import hub as hub
from fixtures.hub import point_to as point_to
from saekit.errors import ConfigError, FormatError, MissingExtraError
from saekit.sae.model import SAE
from saekit.store import catalog
from saekit.store.formats import FORMATS
from saekit.store.hub import parse
from saekit.store.opening import describe

sys.path.insert(0, str(Path(__file__).parent / "formats"))
from layouts import CASES


def test_every_release_can_be_asked_for():
    found = catalog.releases()
    assert len(found) > 50
    for release in found:
        repository, inside, _ = parse(re.sub(r"[{}\[\],]", "", release.example))
        assert repository.count("/") == 1
        assert inside
        assert release.format in FORMATS


def test_words_narrow_the_list():
    gemma = catalog.find_releases("gemma-2-2b", "transcoder")
    assert [release.model for release in gemma] == ["google/gemma-2-2b"]
    assert len(catalog.find_releases("QWEN")) == len(catalog.find_releases("qwen")) > 3
    assert catalog.find_releases("no such thing") == []


@pytest.fixture
def installed(tmp_path, monkeypatch):
    (tmp_path / "pretrained_saes.yaml").write_text(
        "gpt2-small-res-jb:\n  repo_id: jbloom/GPT2-Small-SAEs-Reformatted\n  model: gpt2-small\n  saes:\n"
        "  - id: blocks.8.hook_resid_pre\n    path: blocks.8.hook_resid_pre\n"
        "mistral-7b-res-wg:\n  repo_id: owner/saes\n  model: mistral-7b\n"
        "  config_overrides:\n    normalize_activations: constant_norm_rescale\n"
        "  saes:\n  - id: blocks.8\n    path: layer_8\n"
        "gpt2-small-mlp-tm:\n  repo_id: owner/saes\n"
        "  config_overrides:\n    normalize_activations: expected_average_only_in\n"
        "  saes:\n  - id: blocks.8\n    path: layer_8\n    norm_scaling_factor: 2.5\n"
        "gemma-clt:\n  repo_id: owner/clt\n  conversion_func: mntss_clt_layer_transcoder\n"
        "  saes:\n  - id: layer_0\n    path: 0\n"
    )
    monkeypatch.setattr(catalog, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    catalog.registry.cache_clear()
    yield
    catalog.registry.cache_clear()


def test_names_of_the_registry_of_saelens(installed):
    address = catalog.resolve("saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert address == "hf:jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre"
    assert catalog.resolve("run/topk") == "run/topk"
    with pytest.raises(ConfigError, match=r"has no release `gpt2-small-res-jbb`.*gpt2-small-res-jb"):
        catalog.resolve("saelens:gpt2-small-res-jbb/blocks.8.hook_resid_pre")
    with pytest.raises(ConfigError, match=r"has no SAE `blocks\.9\.hook_resid_pre`"):
        catalog.resolve("saelens:gpt2-small-res-jb/blocks.9.hook_resid_pre")
    assert "sae_lens" not in sys.modules


def test_saes_of_the_registry_are_read_as_it_says(installed, hub, tmp_path):
    """Scaling that only the registry knows is part of the SAE."""
    address, _ = CASES["saelens_standard"](tmp_path / "x", 24, 8)
    hub.add("owner/saes", {f"layer_8/{path.name}": path.read_bytes() for path in address.iterdir()})
    plain = SAE.load("hf:owner/saes/layer_8")
    assert plain.scaling.kind == "none"
    rescaled = SAE.load("saelens:mistral-7b-res-wg/blocks.8")
    assert rescaled.scaling.kind == "row_norm"
    assert torch.equal(rescaled.W_enc, plain.W_enc)
    assert describe("saelens:mistral-7b-res-wg/blocks.8")["scaling"]["kind"] == "row_norm"
    scaled = SAE.load("saelens:gpt2-small-mlp-tm/blocks.8")
    assert float(scaled.scaling.scale) == 2.5
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaled.encode(x).to_dense(), plain.encode(2.5 * x).to_dense())
    with pytest.raises(FormatError, match="cross-layer transcoder"):
        SAE.load("saelens:gemma-clt/layer_0")


def test_registry_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(catalog, "find_spec", lambda name: None)
    catalog.registry.cache_clear()
    with pytest.raises(MissingExtraError, match="pip install sae-lens"):
        catalog.resolve("saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre")
