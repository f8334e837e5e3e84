"""The fused step learns what the plain step learns: held-out FVU after 2,000 steps, three seeds.

``python benchmarks/parity.py`` trains on synthetic rows with a known dictionary; ``--rows X.npy`` on rows of your own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "contestants"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import arena
import torch

from saekit import ArrayRows, SyntheticRows, TopK, TrainSettings, train

ABOUT = """## Same result from both steps

Held-out FVU after training with the fused step and with the plain one (same rows, same seeds)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="", help="a .npy file of rows")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="a few steps, nothing written")
    options = parser.parse_args()
    options.steps = 20 if options.quick else options.steps
    n_rows = options.steps * options.batch
    if options.rows:
        x = ArrayRows.from_file(options.rows)
        rows = torch.cat([batch.x for batch in x.batches(4096)])
    else:
        made = SyntheticRows(
            d_in=64, n_features=2048, l0=16.0, n_rows=min(n_rows, 200_000) + 8192, noise=0.05, mean=1.0
        )
        rows = torch.cat([batch.x for batch in made.batches(4096)])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    held_out, rows = rows[:8192], rows[8192:]
    config = TopK(options.latents, k=options.k)
    variance = (held_out - held_out.mean(0)).double().square().sum()
    found: dict[str, list[float]] = {}
    for step in ("plain", "fused"):
        settings = TrainSettings(batch_rows=options.batch, step=step)
        saes = train(config, ArrayRows(rows), seeds=[0, 1, 2], tokens=n_rows, settings=settings)
        found[step] = [float((held_out - sae.reconstruct(held_out)).double().square().sum() / variance) for sae in saes]
        print(step, found[step], flush=True)
    lines = ["| seed | plain | fused | difference |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {i} | {a:.5f} | {b:.5f} | {b - a:+.5f} |" for i, (a, b) in enumerate(zip(found["plain"], found["fused"]))
    ]
    print(*lines, sep="\n")
    if options.quick:
        return
    about = f"{ABOUT} d = {rows.shape[1]}, {options.latents:,} latents, k = {options.k}, "
    about += f"{options.steps:,} steps of {options.batch} rows, "
    about += f"{Path(options.rows).name if options.rows else 'synthetic rows'}."
    arena.replace_part(arena.ROOT / "benchmarks" / "README.md", "parity", "\n".join([about, "", *lines]))
    record = {"fvu": found, "steps": options.steps, "batch": options.batch, "machine": arena.machine()}
    (arena.ROOT / "benchmarks" / "parity.json").write_text(json.dumps(record, indent=1) + "\n")


main()
