"""Reading from a hub: only the files of the SAE are asked for, and of large ones only the bytes that are needed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from fixtures.hub import hub as hub
from fixtures.hub import point_to as point_to
from saekit.errors import ConfigError, ModelError
from saekit.sae.model import SAE
from saekit.store.opening import describe

sys.path.insert(0, str(Path(__file__).parent / "formats"))
from layouts import CASES

N, D = 2000, 8


def put(hub, folder, name, inside=""):
    """Write a case and put its files, and many others, into a repository."""
    address, _ = CASES[name](folder / name, N, D)
    files = [address] if address.is_file() else [path for path in address.rglob("*") if path.is_file()]
    base = address.parent if address.is_file() else address
    found = {f"{inside}{path.relative_to(base).as_posix()}": path.read_bytes() for path in files}
    others = {f"{inside}{other}": b"x" * 1000 for other in ("README.md", "notes.txt", "deep/er/x.bin")}
    hub.add("owner/saes", {**others, "other/layer/sae.safetensors": b"", "other/sae.json": b"{}", **found})
    return SAE.load(address), found


@pytest.mark.parametrize("name", ["sparsify", "saelens_standard", "qwen_scope", "gemma_scope", "goodfire"])
def test_only_the_files_of_the_sae_are_asked_for(name, hub, tmp_path):
    case = next(each for each in CASES if each.startswith(name))
    mine, files = put(hub, tmp_path, case, "layers.2/")
    named = next(iter(files)) if len(files) == 1 else "layers.2"
    again = SAE.load(f"hf:owner/saes/{named}", **({"k": mine.rule.k} if name == "qwen_scope" else {}))
    assert again.digest() == mine.digest()
    assert {each.split(" ")[0] for each in hub.served()} == set(files)
    hub.log.clear()
    SAE.load(f"hf:owner/saes/{named}", **({"k": mine.rule.k} if name == "qwen_scope" else {}))
    assert hub.served() == []  # all of it is in the cache


def bytes_of(hub, name):
    """Return the bytes of a file that were sent."""
    spans = [re.search(r"bytes=(\d+)-(\d+)", each) for each in hub.served() if each.startswith(name)]
    assert all(spans), hub.served()
    return sum(int(span[2]) - int(span[1]) + 1 for span in spans)


def test_a_prefix_of_a_foreign_file_is_a_few_ranges_of_it(hub, tmp_path):
    mine, _ = put(hub, tmp_path, "sparsify")
    part = SAE.load("hf:owner/saes", latents=50)
    assert part.digest() == mine.take(50).digest()
    vectors, rows = 4 * (N + D), 2 * 50 * D * 4
    assert bytes_of(hub, "sae.safetensors") < rows + 2 * vectors + 2000  # the header twice, the whole has 2 N D 4


def test_what_a_foreign_file_holds_is_shown_from_its_header(hub, tmp_path):
    mine, _ = put(hub, tmp_path, "sparsify", "deep/layers.2/")
    shown = describe("hf:owner/saes/deep/layers.2")
    assert (shown["n_latents"], shown["d_in"]) == (N, D)
    assert shown["provenance"]["hook"] == "layers.2"
    assert bytes_of(hub, "deep/layers.2/sae.safetensors") < 4 * (N + D) + 2000
    assert describe("hf:owner/saes/deep/layers.2@main")["n_latents"] == mine.n_latents


def test_native_prefix_from_the_hub(hub, tmp_path):
    W = torch.arange(N * D, dtype=torch.float32).view(N, D)
    from saekit.sae.rules import TopKRule

    sae = SAE(W_enc=W, b_enc=W[:, 0].clone(), W_dec=W, b_dec=W[0].clone(), rule=TopKRule(3))
    sae.save(tmp_path / "sae")
    hub.add("me/sae", {path.name: path.read_bytes() for path in (tmp_path / "sae").iterdir()})
    part = SAE.load("hf:me/sae", latents=40)
    assert torch.equal(part.W_enc, W[:40])
    assert bytes_of(hub, "sae.safetensors") < 70 * 1024


def test_what_is_not_there(hub, tmp_path):
    put(hub, tmp_path, "sparsify", "layers.2/")
    with pytest.raises(ModelError, match="no repository `owner/nothing`"):
        SAE.load("hf:owner/nothing")
    with pytest.raises(ConfigError, match=r"no folder or file `layers.3`; it has .*`layers.2`"):
        SAE.load("hf:owner/saes/layers.3")
    with pytest.raises(ModelError, match="no revision `v9`"):
        SAE.load("hf:owner/saes/layers.2@v9")
    with pytest.raises(ConfigError, match=r"holds folders: `layers\.2`, `other`"):
        SAE.load("hf:owner/saes")
