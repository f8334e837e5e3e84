"""The catalog: every example is an address, its format exists, and SAELens' own names resolve where it is installed."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest

from saekit.errors import ConfigError, MissingExtraError
from saekit.store import catalog
from saekit.store.formats import FORMATS
from saekit.store.hub import parse


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


def test_registry_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(catalog, "find_spec", lambda name: None)
    catalog.registry.cache_clear()
    with pytest.raises(MissingExtraError, match="pip install sae-lens"):
        catalog.resolve("saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre")
