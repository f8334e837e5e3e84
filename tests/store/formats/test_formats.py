"""Every format: what is read computes what its library documents; what cannot be read is refused with the reason."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saekit import SAE
from saekit.errors import ConfigError, FormatError
from saekit.store.formats import FORMATS
from saekit.store.formats.canonical import hook_of

from .layouts import CASES, K, Weights, t, write_json, write_pt, write_tensors

SHAPES = [(24, 8), (8, 8), (6, 8)]  # wide, square, narrow: orientation is never guessed from the size


def rows(d, norm):
    x = np.random.default_rng(5).standard_normal((40, d)) + 0.3
    return (norm * x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_codes_and_reconstructions_are_those_of_the_documented_formula(name, shape, tmp_path):
    n, d = shape
    if "groupmax" in name and n % 4:
        pytest.skip("groups of equal size need a multiple of 4 latents")
    address, formula = CASES[name](tmp_path, n, d)
    sae = SAE.load(address)
    for norm in (1.0, 30.0):
        x = rows(d, norm)
        codes, x_hat = formula(x.astype(np.float64))
        assert np.abs(sae.encode(t(x)).to_dense().numpy() - codes).max() <= 1e-5 * max(np.abs(codes).max(), 1)
        assert np.abs(sae.reconstruct(t(x)).numpy() - x_hat).max() <= 1e-5 * max(np.abs(x_hat).max(), 1)
    assert np.count_nonzero(codes), "a formula under which nothing fires proves nothing"


def test_every_format_has_a_case():
    prefixes = {"openai": "openai_", "single_file": "goodfire", "mlsae": "mlsae"}
    for name in FORMATS:
        assert any(case.startswith(prefixes.get(name, name)) for case in CASES), name


@pytest.mark.parametrize("name", CASES)
def test_native_folder_keeps_what_was_read(name, tmp_path):
    address, _ = CASES[name](tmp_path, 24, 8)
    sae = SAE.load(address)
    sae.save(tmp_path / "native")
    again = SAE.load(tmp_path / "native")
    assert again.digest() == sae.digest()
    x = t(rows(8, 3.0))
    assert torch.equal(again.reconstruct(x), sae.reconstruct(x))
    assert again.provenance == sae.provenance


@pytest.mark.parametrize("name", CASES)
def test_prefix_of_a_foreign_file_is_take(name, tmp_path):
    address, _ = CASES[name](tmp_path, 24, 8)
    assert SAE.load(address, latents=12).digest() == SAE.load(address).take(12).digest()


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_weights_are_read_as_they_are(name, tmp_path):
    address, _ = CASES[name](tmp_path, 24, 8)
    sae = SAE.load(address, dtype="bfloat16")
    assert {tensor.dtype for tensor in sae.tensors().values() if tensor.is_floating_point()} == {torch.bfloat16}


def test_place_of_the_releases(tmp_path):
    def place(name):
        known = SAE.load(CASES[name](tmp_path / name, 24, 8)[0]).provenance
        return known.get("model"), known.get("hook"), known.get("layer")

    for name in CASES:
        (tmp_path / name).mkdir()
    assert place("gemma_scope") == ("google/gemma-2-2b", "layers.12", 12)
    assert place("saelens_standard") == ("gemma-2-2b", "layers.12", 12)
    assert place("saelens_before_6") == ("gemma-2-2b", "layers.12", 12)
    assert place("sparsify") == (None, "layers.2", 2)
    assert place("qwen_scope") == ("Qwen/Qwen3-8B-Base", "layers.7", 7)
    assert place("openai_topk") == ("gpt2", "layers.6", 6)
    assert place("llama_scope") == ("meta-llama/Llama-3.1-8B", "layers.15", 15)
    assert place("goodfire") == ("meta-llama/Llama-3.1-8B-Instruct", "layers.19", 19)
    assert place("batchtopk_jumprelu_unit_norm") == ("gpt2-small", "layers.7", 7)
    assert place("e2e_sae") == (None, "layers.5", 5)


@pytest.mark.parametrize(
    ("word", "hook"),
    [
        ("blocks.12.hook_resid_post", "layers.12"), ("blocks.12.hook_resid_pre", "layers.11"),
        ("blocks.0.hook_resid_pre", "layers.0.input"), ("blocks.3.hook_mlp_out", "layers.3.mlp"),
        ("blocks.3.hook_attn_out", "layers.3.attn"), ("blocks.3.attn.hook_z", None), ("blocks.3.hook_resid_mid", None),
        ("model.layers.12.output", "layers.12"), ("transformer.h.3", "layers.3"), ("gpt_neox.layers.7", "layers.7"),
        ("layers.10.mlp", "layers.10.mlp"), ("model.layers.3.mlp.input", "layers.3.mlp.input"),
        ("blocks.3.mlp.hook_in", "layers.3.mlp.input"), ("blocks.3.mlp.hook_out", "layers.3.mlp"),
        ("blocks.3.ln2.hook_normalized", None), ("layers.3.mlp.gate_proj", None),
        ("model.layers.3.post_feedforward_layernorm.output", "layers.3.post_feedforward_layernorm"),
        ("model.layers.3.self_attn.o_proj.input", "layers.3.self_attn.o_proj.input"), ("", None), (None, None),
    ],
)  # fmt: skip
def test_hooks_are_translated_or_left_unnamed(word, hook):
    assert hook_of(word) == hook


# --------------------------------------------------------------------------------------------------------- refusals


def refused(address, match, error=FormatError, **stated):
    with pytest.raises(error, match=match):
        SAE.load(address, **stated)


def test_square_matrix_without_evidence_names_the_two_choices(tmp_path):
    w = Weights(8, 8)
    tensors = {"W_enc": w.enc, "W_dec": w.dec.T, "b_enc": w.b_enc, "b_dec": w.b_dec}
    write_pt(tmp_path / "sae.pt", {name: t(v) for name, v in tensors.items()})
    refused(tmp_path / "sae.pt", "latents_first.*width_first", ConfigError, k=K)
    first = SAE.load(tmp_path / "sae.pt", k=K, orientation="latents_first")
    other = SAE.load(tmp_path / "sae.pt", k=K, orientation="width_first")
    assert torch.equal(first.W_enc, t(w.enc))
    assert torch.equal(other.W_enc, t(w.enc.T))
    assert torch.equal(first.W_dec, t(w.dec))
    assert torch.equal(other.W_dec, t(w.dec.T))


def test_two_linear_layers_without_a_rule_must_be_stated(tmp_path):
    w = Weights(24, 8)
    tensors = {"encoder.weight": w.enc, "encoder.bias": w.b_enc, "decoder.weight": w.dec.T, "decoder.bias": w.b_dec}
    write_pt(tmp_path / "sae.pt", {name: t(v) for name, v in tensors.items()})
    refused(tmp_path / "sae.pt", "nothing that says which latents fire", ConfigError)
    assert SAE.load(tmp_path / "sae.pt", k=3).rule.settings() == {"k": 3}
    assert SAE.load(tmp_path / "sae.pt", format="single_file").rule.name == "relu"


def test_k_that_only_the_path_knew_must_be_stated(tmp_path):
    address, _ = CASES["qwen_scope"](tmp_path, 24, 8)
    shutil.copy(address, tmp_path / "layer7.sae.pt")
    refused(tmp_path / "layer7.sae.pt", r"k is not in the file.*SAE.load\(…, k=64\)", ConfigError)


def test_threshold_that_was_never_set_is_refused_unless_k_is_stated(tmp_path):
    address, _ = CASES["dictionary_learning_batchtopk"](tmp_path, 24, 8)
    state = torch.load(address / "ae.pt", weights_only=True)
    torch.save({**state, "threshold": torch.tensor(-1.0)}, address / "ae.pt")
    refused(address, "threshold of this BatchTopKSAE was never set")
    assert SAE.load(address, k=5).rule.settings() == {"k": 5}


@pytest.mark.parametrize("architecture", ["temporal", "matching_pursuit", "batchtopk", "matryoshka_batchtopk"])
def test_architectures_of_saelens_that_are_no_product_and_rule(architecture, tmp_path):
    address, _ = CASES["saelens_standard"](tmp_path, 24, 8)
    config = json.loads((address / "cfg.json").read_text())
    write_json(address / "cfg.json", {**config, "architecture": architecture})
    refused(address, f"architecture `{architecture}` cannot be read")


@pytest.mark.parametrize(
    ("normalize", "match"),
    [
        ("expected_average_only_in", "one factor that is not in the file"),
        ("covariance_whitening", "by a matrix that is not folded"),
    ],
)
def test_scaling_that_is_not_in_the_file(normalize, match, tmp_path):
    address, _ = CASES["saelens_standard"](tmp_path, 24, 8)
    config = json.loads((address / "cfg.json").read_text())
    write_json(address / "cfg.json", {**config, "normalize_activations": normalize})
    refused(address, match)


def test_crosscoders_and_their_kind_are_refused_by_name(tmp_path):
    for name, files, match in [
        ("clt", {"W_enc_0.safetensors": {"W_enc_0": np.zeros((4, 2), np.float32)}}, "cross-layer transcoder"),
        ("cc", {"model.safetensors": {"encoder.weight": np.zeros((2, 3, 4), np.float32)}}, "crosscoder"),
        ("temporal", {"latest_ckpt.safetensors": {"D": np.zeros((4, 2), np.float32)}}, "temporal SAE"),
        ("lookup", {"x.safetensors": {"lookup.W_lookup.weight": np.zeros((4, 2), np.float32)}}, "tokenized SAE"),
    ]:
        for file, tensors in files.items():
            write_tensors(tmp_path / name / file, tensors)
        if name == "temporal":
            (tmp_path / name / "conf.yaml").write_text("a: 1\n")
        refused(tmp_path / name, match)
    write_json(tmp_path / "lorsa" / "config.json", {"sae_type": "lorsa", "hook_point_in": "blocks.0.hook_resid_pre"})
    write_tensors(tmp_path / "lorsa" / "sae_weights.safetensors", {"W_E": np.zeros((2, 3), np.float32)})
    refused(tmp_path / "lorsa", "Lorsa")


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"encoder.weight": Evil()}, tmp_path / "sae.pt")
    refused(
        tmp_path / "sae.pt", r"plain values \(`.*open`\); saekit unpickles nothing, because unpickling runs code\. Save"
    )
    np.savez(tmp_path / "params.npz", W_enc=np.array([Evil()], dtype=object), W_dec=np.zeros(2))
    refused(tmp_path / "params.npz", "Python objects")
    assert not (tmp_path / "ran").exists()


def test_file_that_expands_a_thousandfold_is_not_read(tmp_path):
    np.savez_compressed(tmp_path / "params.npz", W_enc=np.zeros((4000, 4000), np.float32), W_dec=np.zeros(4))
    refused(tmp_path / "params.npz", "would expand to")


def test_configuration_that_contradicts_the_tensors(tmp_path):
    address, _ = CASES["sparsify"](tmp_path, 24, 8)
    config = json.loads((address / "cfg.json").read_text())
    write_json(address / "cfg.json", {**config, "num_latents": 48})
    refused(address, "says num_latents=48, and the tensors have 24")
    write_json(address / "cfg.json", {**config, "k": 25})
    refused(address, "must be at most the number of latents, and the tensors have 24")


def test_tensors_that_nobody_would_read_are_refused(tmp_path):
    address, _ = CASES["sparsify"](tmp_path, 24, 8)
    tensors = load_file(address / "sae.safetensors")
    save_file({**tensors, "post_scale": torch.ones(24)}, address / "sae.safetensors")
    refused(address, "`post_scale`, which saekit does not know")
    save_file({**tensors, "b_dec": torch.full((8,), torch.nan)}, address / "sae.safetensors")
    refused(address, "NaN or infinite")


def test_folder_with_several_lists_them(tmp_path):
    for layer in range(3):
        write_tensors(tmp_path / f"layer_{layer}.safetensors", {"W_enc": np.zeros((4, 2), np.float32)})
    refused(tmp_path, r"holds 3 files of weights: `layer_0.safetensors`", ConfigError)
    for layer in range(3):
        CASES["saelens_standard"](tmp_path / "run" / f"blocks.{layer}", 24, 8)
    refused(tmp_path / "run", r"holds folders: `blocks.0`, `blocks.1`", ConfigError)


def test_link_out_of_the_folder_is_not_followed(tmp_path):
    address, _ = CASES["saelens_standard"](tmp_path / "elsewhere", 24, 8)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "cfg.json").symlink_to(address / "cfg.json")
    (tmp_path / "here" / "sae_weights.safetensors").symlink_to(address / "sae_weights.safetensors")
    refused(tmp_path / "here", "it is a link to")


def test_misspelt_statement_is_suggested(tmp_path):
    address, _ = CASES["saelens_standard"](tmp_path, 24, 8)
    with pytest.raises((ConfigError, TypeError), match="orientation"):
        SAE.load(address, orientatoin="latents_first")
    refused(address, "`format` must be one of", ConfigError, format="sparsefy")
