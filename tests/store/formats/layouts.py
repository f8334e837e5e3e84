"""Files in the documented layout of each library, made from random weights, with an independent formula in numpy.

A case writes one SAE and returns what its own library would compute: ``write(folder, n, d) -> (address, formula)`` with
``formula(x) -> (codes, reconstruction)`` in float64.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Formula = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
Written = tuple[Path, Formula]
CASES: dict[str, Callable[[Path, int, int], Written]] = {}
K = 3


def case(write: Callable[[Path, int, int], Written]) -> Callable[[Path, int, int], Written]:
    CASES[write.__name__] = write
    return write


class Weights:
    """Random weights by name; every name has its own numbers, the same in each run."""

    def __init__(self, n: int, d: int) -> None:
        self.n, self.d = n, d
        self.enc, self.dec = self.of("enc", n, d), self.of("dec", n, d)
        self.b_enc, self.b_dec = self.of("b_enc", n) * 0.3, self.of("b_dec", d) * 0.3
        self.skip = self.of("skip", d, d) * 0.2
        self.threshold = np.abs(self.of("threshold", n)) * 0.5 + 0.05

    def of(self, name: str, *shape: int) -> np.ndarray:
        rng = np.random.default_rng([len(name), *name.encode(), *shape])
        return rng.standard_normal(shape).astype(np.float32)


def t(array: np.ndarray | float) -> torch.Tensor:
    return torch.tensor(array).contiguous()


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t(value) for name, value in tensors.items()}, path)


def write_pt(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


# --------------------------------------------------------------------------------------------------------- formulas


def relu(p: np.ndarray) -> np.ndarray:
    return np.maximum(p, 0)


def largest(p: np.ndarray, k: int, by: np.ndarray | None = None) -> np.ndarray:
    """Keep the k largest of each row (of `by`, where given) as they are, zero elsewhere."""
    order = np.argsort(-(p if by is None else by), axis=1, kind="stable")[:, :k]
    kept = np.zeros_like(p)
    np.put_along_axis(kept, order, np.take_along_axis(p, order, 1), 1)
    return kept


def above(p: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    return relu(p) * (p > threshold)


def layer_norm(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    return (x - mean) / (std + 1e-5), mean, std


# ------------------------------------------------------------------------------------------------------------ cases


def _sparsify(folder: Path, n: int, d: int, config: dict[str, Any], activate: Callable[[np.ndarray], np.ndarray],
              *, transcode: bool = False, skip: bool = False) -> Written:  # fmt: skip
    w = Weights(n, d)
    write_json(folder / "layers.2" / "cfg.json", {"expansion_factor": 32, "normalize_decoder": True, "num_latents": n,
               "k": K, "d_in": d, "transcode": transcode, "skip_connection": skip, **config})  # fmt: skip
    tensors = {"encoder.weight": w.enc, "encoder.bias": w.b_enc, "W_dec": w.dec, "b_dec": w.b_dec}
    write_tensors(folder / "layers.2" / "sae.safetensors", tensors | ({"W_skip": w.skip} if skip else {}))

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = activate((x if transcode else x - w.b_dec) @ w.enc.T + w.b_enc)
        return codes, codes @ w.dec + w.b_dec + (x @ w.skip.T if skip else 0)

    return folder / "layers.2", formula


@case
def sparsify(folder: Path, n: int, d: int) -> Written:
    return _sparsify(folder, n, d, {"num_latents": 0}, lambda p: largest(relu(p), K))


@case
def sparsify_groupmax(folder: Path, n: int, d: int) -> Written:
    def groupmax(p: np.ndarray) -> np.ndarray:
        groups = relu(p).reshape(len(p), 4, n // 4)
        return (groups * (groups == groups.max(2, keepdims=True))).reshape(p.shape)

    return _sparsify(folder, n, d, {"activation": "groupmax", "k": 4}, groupmax)


@case
def sparsify_transcoder(folder: Path, n: int, d: int) -> Written:
    return _sparsify(folder, n, d, {"activation": "topk"}, lambda p: largest(relu(p), K), transcode=True, skip=True)


@case
def sparsify_skip(folder: Path, n: int, d: int) -> Written:
    return _sparsify(folder, n, d, {"activation": "topk"}, lambda p: largest(relu(p), K), skip=True)


def _saelens(folder: Path, w: Weights, config: dict[str, Any], tensors: dict[str, np.ndarray], formula: Formula,
             *, old: bool = False) -> Written:  # fmt: skip
    place = {"model_name": "gemma-2-2b", "hook_name": "blocks.12.hook_resid_post", "context_size": 1024,
             "prepend_bos": True, "dataset_path": "monology/pile"}  # fmt: skip
    common = {"d_in": w.d, "d_sae": w.n, "dtype": "float32", "device": "cuda:0"}
    if old:
        renamed = {"hook_point": place["hook_name"], "hook_point_layer": 12, **place}
        value = {**common, **{k: v for k, v in renamed.items() if k != "hook_name"}, **config}
    else:
        value = {
            **common,
            "reshape_activations": "none",
            "metadata": {**place, "sae_lens_version": "6.54.12"},
            **config,
        }
    write_json(folder / "cfg.json", value)
    write_tensors(folder / "sae_weights.safetensors", tensors)
    return folder, formula


def _plain(w: Weights) -> dict[str, np.ndarray]:
    return {"W_enc": w.enc.T, "b_enc": w.b_enc, "W_dec": w.dec, "b_dec": w.b_dec}


def _linear(w: Weights, activate: Callable[[np.ndarray], np.ndarray], *, subtract: bool = True,
            skip: bool = False) -> Formula:  # fmt: skip
    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = activate((x - w.b_dec if subtract else x) @ w.enc.T + w.b_enc)
        return codes, codes @ w.dec + w.b_dec + (x @ w.skip.T if skip else 0)

    return formula


@case
def saelens_standard(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    config = {"architecture": "standard", "apply_b_dec_to_input": True, "normalize_activations": "none"}
    return _saelens(folder, w, config, _plain(w), _linear(w, relu))


@case
def saelens_without_input_bias(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    config = {"architecture": "standard", "apply_b_dec_to_input": False, "normalize_activations": "none"}
    return _saelens(folder, w, config, _plain(w), _linear(w, relu, subtract=False))


@case
def saelens_before_6(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    tensors = {**_plain(w), "scaling_factor": np.ones(n, np.float32)}
    return _saelens(folder, w, {"activation_fn_str": "relu", "normalize_activations": False}, tensors,
                    _linear(w, relu), old=True)  # fmt: skip


@case
def saelens_before_6_topk(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    config = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": "none"}
    return _saelens(folder, w, config, _plain(w), _linear(w, lambda p: relu(largest(p, K))), old=True)


@case
def saelens_topk(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    config = {"architecture": "topk", "k": K, "apply_b_dec_to_input": True, "normalize_activations": "none",
              "rescale_acts_by_decoder_norm": False}  # fmt: skip
    return _saelens(folder, w, config, _plain(w), _linear(w, lambda p: relu(largest(p, K))))


@case
def saelens_topk_rescaled(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    norms = np.linalg.norm(w.dec, axis=1)
    config = {"architecture": "topk", "k": K, "apply_b_dec_to_input": True, "normalize_activations": "none",
              "rescale_acts_by_decoder_norm": True}  # fmt: skip

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = relu(largest(((x - w.b_dec) @ w.enc.T + w.b_enc) * norms, K))
        return codes, (codes / norms) @ w.dec + w.b_dec

    return _saelens(folder, w, config, _plain(w), formula)


@case
def saelens_abstopk(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    config = {"architecture": "abstopk", "k": K, "apply_b_dec_to_input": True, "normalize_activations": "none"}
    return _saelens(folder, w, config, _plain(w), _linear(w, lambda p: largest(p, K, by=np.abs(p))))


@case
def saelens_jumprelu(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    config = {"architecture": "jumprelu", "apply_b_dec_to_input": False, "normalize_activations": "none"}
    tensors = {**_plain(w), "threshold": w.threshold}
    return _saelens(folder, w, config, tensors, _linear(w, lambda p: above(p, w.threshold), subtract=False))


@case
def saelens_gated(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    b_gate, b_mag, r_mag = (w.of(name, n) * 0.3 for name in ("b_gate", "b_mag", "r_mag"))
    tensors = {"W_enc": w.enc.T, "W_dec": w.dec, "b_dec": w.b_dec, "b_gate": b_gate, "b_mag": b_mag, "r_mag": r_mag}

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u = x - w.b_dec
        codes = ((u @ w.enc.T + b_gate) > 0) * relu(u @ (w.enc.T * np.exp(r_mag)) + b_mag)
        return codes, codes @ w.dec + w.b_dec

    config = {"architecture": "gated", "apply_b_dec_to_input": True, "normalize_activations": "none"}
    return _saelens(folder, w, config, tensors, formula)


@case
def saelens_layer_norm(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, mean, std = layer_norm(x)
        codes = relu((u - w.b_dec) @ w.enc.T + w.b_enc)
        return codes, (codes @ w.dec + w.b_dec) * std + mean

    config = {"architecture": "standard", "apply_b_dec_to_input": True, "normalize_activations": "layer_norm"}
    return _saelens(folder, w, config, _plain(w), formula)


@case
def saelens_constant_norm(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        c = np.sqrt(d) / np.linalg.norm(x, axis=1, keepdims=True)
        codes = relu((x * c - w.b_dec) @ w.enc.T + w.b_enc)
        return codes, (codes @ w.dec + w.b_dec) / c

    config = {"apply_b_dec_to_input": True, "normalize_activations": "constant_norm_rescale"}
    return _saelens(folder, w, config, _plain(w), formula, old=True)


@case
def saelens_skip_transcoder(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    config = {"architecture": "skip_transcoder", "d_out": d, "apply_b_dec_to_input": False,
              "normalize_activations": "none"}  # fmt: skip
    return _saelens(folder, w, config, {**_plain(w), "W_skip": w.skip}, _linear(w, relu, subtract=False, skip=True))


@case
def saelens_jumprelu_transcoder(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    config = {"architecture": "jumprelu_transcoder", "d_out": d, "apply_b_dec_to_input": False,
              "normalize_activations": "none"}  # fmt: skip
    tensors = {**_plain(w), "threshold": w.threshold}
    return _saelens(folder, w, config, tensors, _linear(w, lambda p: above(p, w.threshold), subtract=False))


def _dictionary(folder: Path, w: Weights, kind: str, tensors: Mapping[str, Any], formula: Formula) -> Written:
    write_json(folder / "config.json", {"trainer": {"dict_class": kind, "activation_dim": w.d, "dict_size": w.n,
               "layer": 8, "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_8", "seed": 1},
               "buffer": {"ctx_len": 128, "d_submodule": w.d}})  # fmt: skip
    write_pt(folder / "ae.pt", {name: v if torch.is_tensor(v) else t(v) for name, v in tensors.items()})
    return folder, formula


def _layers(w: Weights) -> dict[str, np.ndarray]:
    return {"encoder.weight": w.enc, "encoder.bias": w.b_enc, "decoder.weight": w.dec.T}


@case
def dictionary_learning_autoencoder(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    return _dictionary(folder, w, "AutoEncoder", {**_layers(w), "bias": w.b_dec}, _linear(w, relu))


@case
def dictionary_learning_new(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    tensors = {**_layers(w), "decoder.bias": w.b_dec}
    return _dictionary(folder, w, "AutoEncoderNew", tensors, _linear(w, relu, subtract=False))


@case
def dictionary_learning_gated(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    gate_bias, mag_bias, r_mag = (w.of(name, n) * 0.3 for name in ("gate", "mag", "r"))
    tensors = {"encoder.weight": w.enc, "decoder.weight": w.dec.T, "decoder_bias": w.b_dec, "r_mag": r_mag,
               "gate_bias": gate_bias, "mag_bias": mag_bias}  # fmt: skip

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pre = (x - w.b_dec) @ w.enc.T
        codes = (pre + gate_bias > 0) * relu(np.exp(r_mag) * pre + mag_bias)
        return codes, codes @ w.dec + w.b_dec

    return _dictionary(folder, w, "GatedAutoEncoder", tensors, formula)


@case
def dictionary_learning_jumprelu(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    threshold = w.threshold - 0.2  # some are negative: those latents fire when they are positive
    tensors = {**_plain(w), "threshold": threshold}
    return _dictionary(folder, w, "JumpReluAutoEncoder", tensors,
                       _linear(w, lambda p: above(p, threshold), subtract=False))  # fmt: skip


@case
def dictionary_learning_topk(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    tensors = {**_layers(w), "b_dec": w.b_dec, "k": torch.tensor(K), "threshold": torch.tensor(-1.0)}
    return _dictionary(folder, w, "AutoEncoderTopK", tensors, _linear(w, lambda p: largest(relu(p), K)))


@case
def dictionary_learning_batchtopk(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    tensors = {**_layers(w), "b_dec": w.b_dec, "k": torch.tensor(K), "threshold": torch.tensor(0.8)}
    return _dictionary(folder, w, "BatchTopKSAE", tensors, _linear(w, lambda p: above(p, np.float32(0.8))))


@case
def dictionary_learning_matryoshka(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    tensors = {**_plain(w), "k": torch.tensor(K), "threshold": torch.tensor(0.8),
               "group_sizes": torch.tensor([n // 2, n - n // 2])}  # fmt: skip
    return _dictionary(folder, w, "MatryoshkaBatchTopKSAE", tensors, _linear(w, lambda p: above(p, np.float32(0.8))))


@case
def batchtopk_jumprelu_unit_norm(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    write_json(folder / "config.json", {"sae_type": "jumprelu", "act_size": str(d), "dict_size": str(n),
               "input_unit_norm": "True", "model_name": "gpt2-small",
               "hook_point": "blocks.8.hook_resid_pre"})  # fmt: skip
    tensors = {**_plain(w), "jumprelu.log_threshold": np.log(w.threshold)}
    write_pt(folder / "sae.pt", {name: t(v) for name, v in tensors.items()})

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, mean, std = layer_norm(x)
        codes = above((u - w.b_dec) @ w.enc.T + w.b_enc, w.threshold)
        return codes, (codes @ w.dec + w.b_dec) * std + mean

    return folder, formula


@case
def batchtopk_matryoshka(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    write_json(folder / "config.json", {"sae_type": "global-matryoshka-topk", "act_size": str(d), "dict_size": str(n),
               "input_unit_norm": "False", "top_k": "3"})  # fmt: skip
    tensors = {**_plain(w), "b_enc": np.zeros(n, np.float32), "threshold": np.float32(0.7)}
    write_pt(folder / "sae.pt", {name: t(v) for name, v in tensors.items()})

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = above((x - w.b_dec) @ w.enc.T, np.float32(0.7))
        return codes, codes @ w.dec + w.b_dec

    return folder, formula


@case
def gemma_scope(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    path = folder / "google" / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **_plain(w), threshold=w.threshold)
    return path, _linear(w, lambda p: above(p, w.threshold), subtract=False)


@case
def gemma_scope_embedding(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    (folder / "embedding").mkdir()
    np.savez(folder / "embedding" / "params.npz", w_enc=w.enc.T, w_dec=w.dec, b_enc=w.b_enc, b_dec=w.b_dec,
             threshold=w.threshold)  # fmt: skip

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = above(x @ (w.enc.T / np.sqrt(d)) + w.b_enc, w.threshold)
        return codes, codes @ (w.dec * np.sqrt(d)) + w.b_dec

    return folder / "embedding", formula


@case
def gemma_scope_2_transcoder(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    path = folder / "gemma-scope-2-1b-pt" / "transcoder_all" / "layer_3_width_16k_l0_big_affine"
    write_json(path / "config.json", {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "width": n, "l0": 50,
               "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
               "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output",
               "affine_connection": True})  # fmt: skip
    tensors = {"w_enc": w.enc.T, "w_dec": w.dec, "b_enc": w.b_enc, "b_dec": w.b_dec, "threshold": w.threshold,
               "affine_skip_connection": w.skip.T}  # fmt: skip
    write_tensors(path / "params.safetensors", tensors)
    return path, _linear(w, lambda p: above(p, w.threshold), subtract=False, skip=True)


@case
def llama_scope(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    path, s = folder / "Llama3_1-8B-Base-L15R-8x", np.sqrt(d) / 5.0
    write_json(path / "hyperparams.json", {"d_model": d, "d_sae": n, "hook_point_in": "blocks.15.hook_resid_post",
               "hook_point_out": "blocks.15.hook_resid_post", "act_fn": "jumprelu", "norm_activation": "dataset-wise",
               "sparsity_include_decoder_norm": True, "jump_relu_threshold": 0.9,
               "dataset_average_activation_norm": {"in": 5.0, "out": 5.0}})  # fmt: skip
    write_tensors(path / "checkpoints" / "final.safetensors", {**_layers(w), "decoder.bias": w.b_dec})
    norms = np.linalg.norm(w.dec, axis=1)

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pre = x @ w.enc.T + w.b_enc / s
        codes = relu(pre) * (pre * norms > 0.9)
        return codes, codes @ w.dec + w.b_dec / s

    return path, formula


@case
def llama_scope_r1(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    write_json(folder / "config.json", {"d_model": d, "expansion_factor": n / d, "norm_activation": "inference",
               "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post",
               "sparsity_include_decoder_norm": False, "act_fn": "jumprelu"})  # fmt: skip
    tensors = {**_layers(w), "decoder.bias": w.b_dec, "log_jumprelu_threshold": np.log(w.threshold)}
    write_tensors(folder / "sae_weights.safetensors", tensors)
    return folder, _linear(w, lambda p: above(p, w.threshold), subtract=False)


@case
def llamascopium_transcoder(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    hook_in, hook_out = "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"
    write_json(folder / "config.json", {"sae_type": "sae", "d_model": d, "expansion_factor": n / d, "top_k": 5,
               "hook_point_in": hook_in, "hook_point_out": hook_out, "act_fn": "jumprelu",
               "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True,
               "use_decoder_bias": True, "use_glu_encoder": False})  # fmt: skip
    norm = "dataset_average_activation_norm."
    write_tensors(folder / "sae_weights.safetensors", {
        "W_E": w.enc.T, "b_E": w.b_enc, "W_D": w.dec, "b_D": w.b_dec,
        "activation_function.log_jumprelu_threshold": np.log(w.threshold),
        f"{norm}{hook_in}": np.float32(5.0), f"{norm}{hook_out}": np.float32(2.0)})  # fmt: skip
    s_in, s_out, norms = np.sqrt(d) / 5.0, np.sqrt(d) / 2.0, np.linalg.norm(w.dec, axis=1)

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # The codes of the file's SAE are those of raw rows times s_in: a fold keeps what is reconstructed.
        codes = above(((x * s_in) @ w.enc.T + w.b_enc) * norms, w.threshold) / norms
        return codes / s_in, (codes @ w.dec + w.b_dec) / s_out

    return folder, formula


@case
def llamascopium_topk_tokenwise(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    hook = "blocks.3.hook_resid_post"
    write_json(folder / "config.json", {"sae_type": "sae", "d_model": d, "expansion_factor": n / d, "top_k": K,
               "hook_point_in": hook, "hook_point_out": hook, "act_fn": "topk", "norm_activation": "token-wise",
               "sparsity_include_decoder_norm": True, "use_decoder_bias": True})  # fmt: skip
    tensors = {"W_E": w.enc.T, "b_E": w.b_enc, "W_D": w.dec, "b_D": w.b_dec}
    write_pt(folder / "sae_weights.pt", {"sae": {name: t(v) for name, v in tensors.items()}, "version": "2.0"})
    norms = np.linalg.norm(w.dec, axis=1)

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        c = np.sqrt(d) / np.linalg.norm(x, axis=1, keepdims=True)
        codes = largest(relu(((x * c) @ w.enc.T + w.b_enc) * norms), K) / norms
        return codes, (codes @ w.dec + w.b_dec) / c

    return folder, formula


@case
def openai_topk(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    path = folder / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders" / "6.pt"
    tensors = {"pre_bias": w.b_dec, "encoder.weight": w.enc, "latent_bias": w.b_enc, "decoder.weight": w.dec.T,
               "stats_last_nonzero": np.zeros(n, np.int64)}  # fmt: skip
    write_pt(path, {**{name: t(v) for name, v in tensors.items()}, "activation": "TopK",
                    "activation_state_dict": {"k": K, "postact_fn": "ReLU"}})  # fmt: skip

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, mean, std = layer_norm(x)
        codes = relu(largest((u - w.b_dec) @ w.enc.T + w.b_enc, K))
        return codes, (codes @ w.dec + w.b_dec) * std + mean

    return path, formula


@case
def goodfire(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    path = folder / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    tensors = {"encoder_linear.weight": w.enc, "encoder_linear.bias": w.b_enc, "decoder_linear.weight": w.dec.T,
               "decoder_linear.bias": w.b_dec}  # fmt: skip
    write_pt(path, {name: t(v) for name, v in tensors.items()})
    return path, _linear(w, relu, subtract=False)


@case
def deepseek_r1(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    path = folder / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    write_pt(path, {name: t(v) for name, v in {**_layers(w), "decoder.bias": w.b_dec}.items()})
    return path, _linear(w, relu, subtract=False)


@case
def qwen_scope(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    path = folder / f"SAE-Res-Qwen3-8B-Base-W64K-L0_{K}" / "layer7.sae.pt"
    tensors = {"W_enc": w.enc, "W_dec": w.dec.T, "b_enc": w.b_enc, "b_dec": w.b_dec}
    write_pt(path, {name: t(v) for name, v in tensors.items()})
    return path, _linear(w, lambda p: relu(largest(p, K)), subtract=False)


@case
def hook_z(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    name = "gpt2-small_L5_Hcat_z_lr1.20e-03"
    write_json(folder / f"{name}_cfg.json", {"act_size": d, "dict_size": n, "act_name": "blocks.5.attn.hook_z"})
    write_pt(folder / f"{name}.pt", {key: t(v) for key, v in _plain(w).items()})
    return folder / f"{name}.pt", _linear(w, relu)


def _tracer(folder: Path, w: Weights, tensors: Mapping[str, np.ndarray], config: str, formula: Formula) -> Written:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.yaml").write_text(
        "model_name: google/gemma-2-2b\nfeature_input_hook: ln2.hook_normalized\nfeature_output_hook: hook_mlp_out\n"
        + config
    )
    own = {"W_enc": w.enc, "b_enc": w.b_enc, "W_dec": w.dec, "b_dec": w.b_dec}
    write_tensors(folder / "layer_4.safetensors", {**own, **tensors})
    return folder / "layer_4.safetensors", formula


@case
def circuit_tracer_jumprelu_skip(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    tensors = {"activation_function.threshold": w.threshold, "W_skip": w.skip}
    return _tracer(folder, w, tensors, "", _linear(w, lambda p: above(p, w.threshold), subtract=False, skip=True))


@case
def circuit_tracer_topk(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    return _tracer(folder, w, {}, f"activation: topk\nk: {n - 2}\n",
                   _linear(w, lambda p: largest(p, n - 2), subtract=False))  # fmt: skip


@case
def e2e_sae(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    prefix = "blocks-6-hook_resid_pre."
    tensors = {"encoder.0.weight": w.enc, "encoder.0.bias": w.b_enc, "decoder.weight": w.dec.T, "decoder.bias": w.b_dec}
    write_pt(folder / "samples_400000.pt", {prefix + name: t(v) for name, v in tensors.items()})
    unit = w.dec / np.linalg.norm(w.dec, axis=1, keepdims=True)

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = relu(x @ w.enc.T + w.b_enc)
        return codes, codes @ unit + w.b_dec

    return folder / "samples_400000.pt", formula


def _saev(folder: Path, w: Weights, activation: dict[str, Any], extra: Mapping[str, Any], formula: Formula) -> Written:
    buffer = io.BytesIO()
    torch.save({**{name: t(v) for name, v in _plain(w).items()}, **extra}, buffer)
    header = {"schema": 5, "cfg": {"d_model": w.d, "d_sae": w.n, "activation": activation}, "lib": "0.2.0"}
    (folder / "sae.pt").write_bytes(json.dumps(header).encode() + b"\n" + buffer.getvalue())
    return folder / "sae.pt", formula


@case
def saev_topk(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    return _saev(folder, w, {"cls": "TopK", "params": {"top_k": n - 2}}, {},
                 _linear(w, lambda p: largest(p, n - 2), subtract=False))  # fmt: skip


@case
def saev_batchtopk(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    return _saev(folder, w, {"cls": "BatchTopK", "params": {"top_k": K}}, {"activation.threshold": torch.tensor(0.6)},
                 _linear(w, lambda p: above(p, np.float32(0.6)), subtract=False))  # fmt: skip


def _hypothesaes(folder: Path, n: int, d: int, batch: bool) -> Written:
    w = Weights(n, d)
    tensors = {"encoder.weight": w.enc, "decoder.weight": w.dec.T, "input_bias": w.b_dec, "neuron_bias": w.b_enc,
               "threshold": np.float32(0.6)}  # fmt: skip
    config = {"input_dim": d, "m_total_neurons": n, "k_active_neurons": K, "aux_k": None, "multi_k": None,
              "dead_neuron_threshold_steps": 256, "prefix_lengths": None, "use_batch_topk": batch}  # fmt: skip
    path = folder / f"SAE_M={n}_K={K}.pt"
    write_pt(path, {"config": config, "state_dict": {name: t(v) for name, v in tensors.items()}})
    return path, _linear(w, (lambda p: above(p, np.float32(0.6))) if batch else lambda p: relu(largest(p, K)))


@case
def hypothesaes_topk(folder: Path, n: int, d: int) -> Written:
    return _hypothesaes(folder, n, d, False)


@case
def hypothesaes_batchtopk(folder: Path, n: int, d: int) -> Written:
    return _hypothesaes(folder, n, d, True)


@case
def mlsae(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    write_json(folder / "config.json", {"n_inputs": d, "n_latents": n, "k": K, "standardize": True})
    tensors = {"encoder.weight": w.enc, "decoder.weight": w.dec.T, "pre_encoder_bias": w.b_dec,
               "last_nonzero": np.zeros(n, np.int64)}  # fmt: skip
    write_tensors(folder / "model.safetensors", tensors)

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, mean, std = layer_norm(x)
        codes = relu(largest((u - w.b_dec) @ w.enc.T, K))
        return codes, (codes @ w.dec + w.b_dec) * std + mean

    return folder, formula


@case
def sentence_transformers(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    write_json(folder / "config.json", {"input_dim": d, "hidden_dim": n, "k": K, "k_aux": 8, "normalize": False,
               "dead_threshold": 30})  # fmt: skip
    tensors = {"pre_bias": w.b_dec, "encoder.weight": w.enc, "latent_bias": w.b_enc,
               "stats_last_nonzero": np.zeros(n, np.int64)}  # fmt: skip
    write_tensors(folder / "model.safetensors", tensors)

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = relu(largest((x - w.b_dec) @ w.enc.T + w.b_enc, K))
        return codes, codes @ w.enc + w.b_dec

    return folder, formula


def _latent_sae(
    folder: Path, w: Weights, config: dict[str, Any], tensors: Mapping[str, np.ndarray], formula: Formula
) -> Written:
    write_json(folder / "cfg.json", {"sae_type": "topk", "expansion_factor": 4, "num_latents": 0, "k": K, "d_in": w.d,
               "normalize_decoder": True, **config})  # fmt: skip
    own = {"encoder.weight": w.enc, "encoder.bias": w.b_enc, "W_dec": w.dec, "b_dec": w.b_dec}
    write_tensors(folder / "sae.safetensors", {**own, **tensors})
    return folder, formula


@case
def latent_sae_centred_skip(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    mean, up, down = w.of("mean", d), w.of("up", d, 2), w.of("down", 2, d)

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u = x - mean
        codes = largest(relu((u - w.b_dec) @ w.enc.T + w.b_enc), K)
        return codes, codes @ w.dec + w.b_dec + u @ down.T @ up.T + mean

    return _latent_sae(folder, w, {"mean_center": True, "use_skip": True, "skip_rank": 2},
                       {"input_mean": mean, "W_skip_up.weight": up, "W_skip_down.weight": down}, formula)  # fmt: skip


@case
def latent_sae_abstopk(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    return _latent_sae(folder, w, {"sae_type": "abstopk"}, {}, _linear(w, lambda p: largest(p, K, by=np.abs(p))))


@case
def latent_sae_jumprelu_capped(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    log_threshold = np.log(np.abs(w.of("threshold", n)) * 0.2 + 0.01).astype(np.float32)
    threshold = np.exp(log_threshold)
    config = {"sae_type": "jumprelu", "jumprelu_max_active": 2}
    formula = _linear(w, lambda p: relu(largest(p * (p > threshold), 2)))
    return _latent_sae(folder, w, config, {"log_threshold": log_threshold}, formula)


@case
def latent_sae_batchtopk(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    formula = _linear(w, lambda p: relu(largest(p * (p >= np.float32(0.3)), K)))
    threshold = {"batchtopk_threshold": np.array(0.3, np.float32)}
    return _latent_sae(folder, w, {"sae_type": "batchtopk"}, threshold, formula)


@case
def latent_sae_matryoshka(folder: Path, n: int, d: int) -> Written:
    w = Weights(n, d)
    config = {"sae_type": "matryoshka", "matryoshka_sizes": f"{n // 2},{n}", "matryoshka_ks": "1,3"}
    return _latent_sae(folder, w, config, {}, _linear(w, lambda p: largest(relu(p), K)))
