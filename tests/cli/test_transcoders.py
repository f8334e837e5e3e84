"""Transcoders of other libraries on the command line: shown, verified, evaluated, pruned, compared, classified."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import saekit as sk
from saekit.rows.settings import CaptureSettings

LAYER, N, K = 2, 96, 8
IN, OUT = f"layers.{LAYER}.mlp.input", f"layers.{LAYER}.mlp"


@pytest.fixture(scope="module")
def model(shared_data: Path) -> Path:
    return shared_data / "stories260K"


@pytest.fixture(scope="module")
def texts(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty stories."""
    path = tmp_path_factory.mktemp("texts") / "stories.jsonl"
    with gzip.open(shared_data / "text" / "tinystories_1000_clean.jsonl.gz", "rt") as lines:
        path.write_text("".join(line for line, _ in zip(lines, range(60))), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pairs(model: Path, texts: Path) -> tuple[np.ndarray, np.ndarray]:
    """The first 2,000 inputs and outputs of an MLP."""
    rows = sk.capture(model, str(texts), hook=IN, tokens=2000, settings=CaptureSettings(target=OUT), progress=False)
    batch = next(rows.batches(2000))
    return batch.x.double().numpy(), batch.target.double().numpy()


def coded(pre: np.ndarray, rule: str) -> np.ndarray:
    """Codes of pre-activations, in plain numpy."""
    if rule == "jumprelu":
        return np.where(pre > 0.8, pre, 0)
    kept = np.zeros_like(pre, dtype=bool)
    np.put_along_axis(kept, np.argpartition(-pre, K, axis=1)[:, :K], True, axis=1)
    return np.where(kept, pre if rule == "signed" else np.maximum(pre, 0), 0)


def planted(x: np.ndarray, y: np.ndarray, rule: str, skip: bool) -> dict[str, np.ndarray]:
    """A transcoder with random latents; decoder and skip are fitted to predict `y`."""
    W_enc = np.random.default_rng(0).normal(size=(N, x.shape[1])).astype(np.float32) / np.sqrt(x.shape[1])
    b_enc = np.full(N, -1.0 if rule == "signed" else 0.0, np.float32)  # below 0: some of the k largest are negative
    z = coded(x @ W_enc.T.astype(float) + b_enc, rule)
    parts = [z, *([x] if skip else []), np.ones((len(x), 1))]
    found = np.linalg.lstsq(np.concatenate(parts, 1), y, rcond=1e-6)[0].astype(np.float32)
    named = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": found[:N], "b_dec": found[-1]}
    return named | ({"skip": found[N:-1]} if skip else {})


def predicted(x: np.ndarray, t: dict[str, np.ndarray], rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and codes, in plain numpy."""
    t = {name: value.astype(float) for name, value in t.items()}
    z = coded(x @ t["W_enc"].T + t["b_enc"], rule)
    y = z @ t["W_dec"] + t["b_dec"]
    return (y + x @ t["skip"] if "skip" in t else y), z


def torched(**arrays: np.ndarray) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}


def gemma_scope_2(folder: Path, t: dict[str, np.ndarray]) -> Path:
    folder = folder / "transcoder" / f"layer_{LAYER}_width_96"
    folder.mkdir(parents=True)
    threshold = np.full(N, 0.8, np.float32)
    own = torched(w_enc=t["W_enc"].T, w_dec=t["W_dec"], b_enc=t["b_enc"], b_dec=t["b_dec"], threshold=threshold)
    save_file(own | torched(affine_skip_connection=t["skip"]), folder / "params.safetensors")
    block = f"model.layers.{LAYER}"
    hooks = {"hf_hook_point_in": f"{block}.mlp.input", "hf_hook_point_out": f"{block}.mlp.output"}
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "width": N, **hooks}))
    return folder


def circuit_tracer(folder: Path, t: dict[str, np.ndarray]) -> Path:
    own = torched(**{name: t[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}, k=np.array(K))
    save_file(own, folder / f"layer_{LAYER}.safetensors")
    (folder / "config.yaml").write_text("feature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n")
    return folder


def sparsify(folder: Path, t: dict[str, np.ndarray]) -> Path:
    folder = folder / OUT
    folder.mkdir()
    own = {"encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    save_file(torched(**own, W_skip=t["skip"].T), folder / "sae.safetensors")
    config = {"k": K, "num_latents": N, "d_in": t["W_enc"].shape[1], "transcode": True, "skip_connection": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


LAYOUTS = {
    "gemma_scope_2": (gemma_scope_2, "jumprelu", True),
    "circuit_tracer": (circuit_tracer, "signed", False),
    "sparsify": (sparsify, "topk", True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_evaluated_as_plain_numpy_does(name, call, tmp_path, model, texts, pairs):
    write, rule, skip = LAYOUTS[name]
    x, y = pairs
    tensors = planted(x, y, rule, skip)
    address = write(tmp_path, tensors)
    status, out, err = call("show", address)
    assert status == 0, err
    assert "transcoder" in out
    where = ("--model", model, "--data", texts)
    status, out, err = call("evaluate", address, *where, "--set", "max_rows=2000", "--tokens", 500, "--json")
    assert status == 0, err
    found = json.loads(out)
    y_hat, z = predicted(x, tensors, rule)
    metrics = {key: value["value"] for key, value in found["metrics"].items()}
    assert metrics["fvu"] == pytest.approx(np.square(y - y_hat).sum() / np.square(y - y.mean(0)).sum(), rel=1e-3)
    assert metrics["l0"] == pytest.approx((z != 0).sum(1).mean(), rel=1e-3)
    assert metrics["fvu"] < 1
    assert metrics["ce_clean"] < metrics["ce_sae"] < metrics["ce_mean"] + 0.5
    assert {"linear", "affine"} <= set(found["entries"][0]["controls"])
    assert (found["rows"]["hook"], found["rows"]["hook_out"]) == (IN, OUT)
    status, out, err = call("verify", address, *where, "--tokens", 600, "--json")
    assert status == 0, err
    verified = json.loads(out)
    assert verified["fits"], verified
    assert verified["fvu"]["value"] == pytest.approx(metrics["fvu"], rel=0.3)
    status, out, err = call("prune", address, "--sizes", "16", "--by", "loss", *where, "--set", "tokens=600",
                            "--out", tmp_path / "small", "--json")  # fmt: skip
    assert status == 0, err
    sizes = {point["size"]: point["metrics"]["fvu"]["value"] for point in json.loads(out)["curve"]["points"]}
    assert sizes[96] < sizes[16]
    small = sk.SAE.load(tmp_path / "small" / "16")
    assert small.is_transcoder
    assert small.provenance["hook_out"] == OUT
    status, out, err = call("compare", address, tmp_path / "small" / "16", "--json")
    assert status == 0, err
    assert json.loads(out)["shared"]["value"] == 1.0
