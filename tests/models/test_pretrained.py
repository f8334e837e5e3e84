"""Finding and reading model files: digests, number types, hub names without network, damaged folders."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from saekit.errors import ConfigError, ModelError, OfflineError
from saekit.models import deferred, pretrained
from saekit.models.loading import load_model


def test_digest_follows_the_weights(folders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folders["llama"], copy)
    first = load_model(folders["llama"]).digest
    assert load_model(copy).digest == first
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert load_model(copy).digest != first


@pytest.mark.parametrize("dtype", ["bf16", "float16", torch.bfloat16])
def test_dtype(folders, dtype):
    expected = {"bf16": torch.bfloat16, "float16": torch.float16}.get(dtype, dtype)
    assert load_model(folders["llama"], dtype=dtype).dtype == expected


def test_a_hub_name_without_network():
    with pytest.raises(OfflineError, match=r"`google/gemma-2-2b` must be downloaded .*--model PATH"):
        load_model("google/gemma-2-2b")


class _Api:
    """The hub, as far as one question goes."""

    def __init__(self, error=None, gated=False):
        self.error, self.gated, self.sha = error, gated, "abc"

    def __call__(self):
        return self

    def model_info(self, name, timeout):
        if self.error and not self.gated:
            raise self.error
        return self

    def auth_check(self, name):
        raise self.error


def test_gated_and_missing_models(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    # their constructors want a response of the hub
    gated, missing = (kind.__new__(kind, "no") for kind in (GatedRepoError, RepositoryNotFoundError))
    monkeypatch.setattr(huggingface_hub, "HfApi", _Api(gated, gated=True))
    with pytest.raises(ModelError, match=r"`meta/secret` is gated.*hf auth login.*--model PATH"):
        load_model("meta/secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", _Api(missing))
    with pytest.raises(ModelError, match=r"`meta/nothing` must exist on the hub.*--model PATH"):
        load_model("meta/nothing")


@pytest.mark.parametrize(
    ("name", "message"),
    [("./nowhere", "no such folder"), ("/a/b/c", "no such folder"), ("a/b/c", "no such folder")],
)
def test_missing_folders(name, message):
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_damaged_folders(folders, tmp_path):
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        load_model(tmp_path)
    truncated = tmp_path / "truncated"
    shutil.copytree(folders["llama"], truncated)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ModelError, match=r"`.*truncated` cannot be loaded"):
        load_model(truncated)
    other = tmp_path / "other"
    shutil.copytree(folders["llama"], other)
    shutil.copy(folders["neox"] / "model.safetensors", other / "model.safetensors")
    with pytest.raises(ModelError, match="must be complete"):
        load_model(other)


def test_bad_settings(folders):
    with pytest.raises(ConfigError, match="`dtype` must be one of"):
        load_model(folders["llama"], dtype="int7")
    with pytest.raises(ConfigError, match="`device` must be a device of this machine"):
        load_model(folders["llama"], device="quantum")
    with pytest.raises(ConfigError, match="exclude each other"):
        load_model(folders["llama"], device="cpu", device_map="auto")


def test_a_missing_builtin_model(monkeypatch, tmp_path):
    monkeypatch.setattr("saekit.models.pretrained.BUILTIN_FOLDER", tmp_path)
    with pytest.raises(ModelError, match="built-in model must lie"):
        load_model("builtin")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_the_files_is_neither_run_nor_asked_for(folders, tmp_path, monkeypatch, capfd, file):
    folder = tmp_path / "own"
    shutil.copytree(folders["llama"], folder)
    ran = folder / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    found = json.loads((folder / file).read_text())
    if file == "config.json":
        found |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}}
    else:
        found |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    (folder / file).write_text(json.dumps(found))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    with pytest.raises(ModelError, match=r"needs code that lies with its files, and such code is never run"):
        load_model(folder)
    assert not ran.exists()
    assert "trust_remote_code" not in "".join(capfd.readouterr())


def test_a_hub_model_has_one_digest_with_and_without_network(folders, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--owner--tiny"
    shutil.copytree(folders["llama"], place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "ask_hub", lambda *_: SimpleNamespace(sha=commit, gated=False))
    online = pretrained.find_model("owner/tiny")
    told = deferred.defer_model("owner/tiny").about

    def unreachable(*_):
        raise pretrained.Unreachable("no network")

    monkeypatch.setattr(pretrained, "ask_hub", unreachable)
    offline = pretrained.find_model("owner/tiny")
    assert not online.is_local
    assert offline.is_local
    assert (online.digest, online.revision) == (offline.digest, commit)
    assert online.digest == load_model(folders["llama"]).digest
    assert deferred.defer_model("owner/tiny").about == told


def test_files_in_the_cache_that_are_not_all_there_have_no_digest(folders, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--owner--tiny" / "snapshots" / commit
    folder.mkdir(parents=True)
    shutil.copy(folders["llama"] / "config.json", folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert pretrained.ModelFiles("owner/tiny", "owner/tiny", commit, False).stored is None
