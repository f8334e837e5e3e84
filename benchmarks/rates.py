"""Does the default learning rate hold? Every architecture at multiples of it, in one pass over the same rows.

    python benchmarks/rates.py                        # hours on one core; finished cells are kept in --out
    python benchmarks/rates.py --only batchtopk       # cells whose name holds this (or is this)
    python benchmarks/rates.py --quick                # one small cell, nothing written

Each cell is a model, an architecture, a width, a sparsity and a number of rows; the batch is the default unless the
cell says otherwise. FVU is of held-out documents; a latent is dead when it is silent on 100,000 training rows. The
table goes between the markers of ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import captured, fvu, models, write_readme

MULTIPLES = (0.354, 0.5, 0.707, 1.0, 1.414, 2.0)
"""Learning rates that are tried, in multiples of the default. With a batch of 256 rows 1.414 is the default of larger
batches."""
DEAD_LIMIT = 0.02
"""Largest fraction of dead latents with which a learning rate counts as the best. Unit: fraction."""
DEAD_ROWS, HELD_OUT_ROWS = 100_000, 28_000


@dataclasses.dataclass(frozen=True)
class Cell:
    """One line of the table."""

    model: str
    arch: str
    n: int
    k: int
    rows: int
    batch: int | None = None
    multiples: tuple[float, ...] = MULTIPLES

    @property
    def name(self) -> str:
        """The words that ``--only`` looks in, and the file."""
        return f"{self.model}-{self.arch}-{self.n}-k{self.k}-{self.rows}" + (f"-{self.batch}" if self.batch else "")


LOW, NEAR, HIGH = (0.354, 0.707, 1.0, 1.414), (0.707, 1.0, 1.414), (0.5, 1.0, 1.414, 2.0)
CELLS = [
    *(Cell("stories260K", "topk", 1024, 16, rows) for rows in (100_000, 200_000, 300_000, 1_000_000)),
    *(Cell("stories260K", "topk", 1024, 16, 300_000, batch) for batch in (128, 512)),
    Cell("stories260K", "jumprelu", 1024, 16, 300_000, multiples=NEAR),
    *(Cell("stories260K", "topk", 2048, 16, rows) for rows in (300_000, 1_000_000)),
    *(Cell("builtin", "topk", 1024, 16, rows, multiples=NEAR) for rows in (100_000, 300_000)),
    Cell("builtin", "topk", 2048, 16, 300_000, multiples=NEAR),
    Cell("stories260K", "topk", 512, 8, 60_000, multiples=HIGH),
    Cell("stories260K", "topk", 512, 64, 60_000, multiples=HIGH),
    Cell("builtin", "topk", 512, 16, 60_000, multiples=HIGH),
    Cell("stories260K", "batchtopk", 512, 16, 60_000, multiples=HIGH),
    Cell("stories260K", "matryoshka", 512, 16, 60_000, multiples=HIGH),
    Cell("stories260K", "jumprelu", 512, 16, 60_000, multiples=LOW),
    Cell("stories260K", "gated", 512, 16, 60_000, multiples=LOW),
    Cell("stories260K", "relu", 512, 16, 60_000, multiples=LOW),
    Cell("stories260K", "p-anneal", 512, 16, 60_000, multiples=LOW),
    Cell("stories260K", "topk", 1024, 16, 400_000, 1024),
    Cell("stories260K", "jumprelu", 1024, 16, 400_000),
    Cell("stories260K", "gated", 1024, 16, 400_000),
    Cell("stories260K", "relu", 1024, 16, 400_000),
    Cell("stories260K", "topk", 4096, 16, 1_000_000),
    Cell("stories260K", "topk", 1024, 16, 8_000_000, 1024),
    Cell("MiniLM", "topk", 1024, 32, 250_000),
]
QUICK = [Cell("builtin", "topk", 64, 4, 5_000, 256, (0.5, 1.0))]
TOKENS = {"stories260K": 1_900_000, "builtin": 500_000, "MiniLM": 330_000}
"""Rows captured from each model."""


def places() -> dict[str, dict[str, Any]]:
    """Where the rows come from: model, layer, texts."""
    real = models()
    return {
        "builtin": {"path": "builtin", "layer": 2, "data": "builtin@train"},
        **{name: {"path": real[name]["path"], "layer": 3} for name in ("stories260K", "MiniLM")},
    }


def measure(cell: Cell, folder: Path, seeds: list[int], tokens: int) -> dict[str, Any]:
    """Train a cell at every multiple of the default rate, in one pass, and measure each SAE."""
    import saekit
    from saekit.training.architectures import config_from_dict
    from saekit.training.defaults import default_batch_rows, resolve

    train, held_out = captured(cell.model, places()[cell.model], folder, tokens)
    x, test = np.load(train), torch.from_numpy(np.load(held_out)[:HELD_OUT_ROWS])
    batch = cell.batch or default_batch_rows(cell.rows)
    sparsity = {"target_l0" if cell.arch in ("jumprelu", "gated", "relu", "p-anneal") else "k": cell.k}
    config = config_from_dict({"arch": cell.arch, "n_latents": cell.n, **sparsity})
    lr = resolve(config, x.shape[1], cell.rows // batch, batch).lr
    saes = saekit.train(
        [dataclasses.replace(config, lr=multiple * lr) for multiple in cell.multiples],
        x[: cell.rows],
        seeds=seeds,
        tokens=cell.rows,
        settings=saekit.TrainSettings(batch_rows=batch),
        progress=False,
    )
    found: dict[str, list[dict[str, float]]] = {str(multiple): [] for multiple in cell.multiples}
    by_rate = {round(multiple * lr, 9): each for multiple, each in zip(cell.multiples, found.values(), strict=True)}
    for sae in saes:
        codes = sae.encode(test)
        fired = torch.zeros(cell.n, dtype=torch.bool)
        for rows in torch.from_numpy(x[:DEAD_ROWS]).split(8192):
            fired[sae.encode(rows).indices.long()] = True
        dead = 1 - float(fired.double().mean())
        score = {"fvu": fvu(test.numpy(), sae.decode(codes).numpy()), "dead": dead, "l0": codes.l0()}
        by_rate[round(sae.provenance["resolved"]["lr"], 9)].append(score)
    return {**dataclasses.asdict(cell), "batch": batch, "lr": lr, "seeds": seeds, "found": found}


def mean_of(scores: list[dict[str, float]]) -> dict[str, float]:
    """Each score, on average over the seeds."""
    return {name: float(np.mean([each[name] for each in scores])) for name in scores[0]}


def regret(found: dict[str, list[dict[str, float]]]) -> float | None:
    """FVU at the default, relative to the lowest that leaves few latents dead; None where none does."""
    means = {multiple: mean_of(scores) for multiple, scores in found.items()}
    lively = [each["fvu"] for each in means.values() if each["dead"] <= DEAD_LIMIT]
    return means["1.0"]["fvu"] / min(lively) - 1 if lively else None


def table(results: list[dict[str, Any]]) -> str:
    """The cells as Markdown."""
    head = ["model", "architecture", "latents", "k", "rows", "batch", "default lr", *(f"{m:g} ×" for m in MULTIPLES)]
    lines = [f"| {' | '.join([*head, 'default / best'])} |", "| --- | --- |" + " ---: |" * (len(head) - 1)]
    for each in results:
        cells = [
            each["model"],
            each["arch"],
            f"{each['n']:,}",
            str(each["k"]),
            f"{each['rows']:,}",
            f"{each['batch']:,}",
        ]
        cells.append(f"{each['lr']:.4f}")
        for multiple in map(str, MULTIPLES):
            at = mean_of(each["found"][multiple]) if multiple in each["found"] else None
            cells.append(f"{at['fvu']:.4f} / {100 * at['dead']:.1f}" if at else "")
        more = regret(each["found"])
        lines.append(f"| {' | '.join([*cells, '' if more is None else f'{1 + more:.3f}'])} |")
    return "\n".join(lines)


def asked_for(words: str) -> list[Cell]:
    """Cells of this very name, else those whose name holds it."""
    return [each for each in CELLS if each.name == words] or [each for each in CELLS if words in each.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small cell, nothing written")
    parser.add_argument("--only", default="", help="cells whose name holds this; nothing written")
    parser.add_argument("--finished", action="store_true", help="only the cells that are in --out already")
    parser.add_argument("--seeds", default="1,2", help="averaged [1,2]")
    parser.add_argument("--out", default="runs/rates")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp() if arguments.quick else arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    results, seeds = [], [int(seed) for seed in arguments.seeds.split(",")]
    for cell in QUICK if arguments.quick else asked_for(arguments.only):
        path = folder / f"{cell.name}-seeds{arguments.seeds}.json"
        if arguments.finished and not path.exists():
            continue
        if not path.exists():
            tokens = 20_000 if arguments.quick else TOKENS[cell.model]
            path.write_text(json.dumps(measure(cell, folder, seeds, tokens)))
        results.append(json.loads(path.read_text()))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(table(results))
    if not (arguments.quick or arguments.only):
        write_readme("rates", f"{ABOUT}\n\n{table(results)}")


ABOUT = """## Learning rates

Multiples of the default learning rate: FVU of held-out documents / dead latents in percent (silent on 100,000 training
rows), on average over two seeds (which differ by less than 1% of FVU). The last column is FVU at the default, relative
to the lowest with at most 2% dead. A blank is a rate that was not tried, or a cell without such a rate. At 300,000 rows
1.414 × (batches of 128: 2 ×) is what the default would be without its factor for small batches: 4.5% (12%) of the
latents are dead there, and FVU is higher.

`python benchmarks/rates.py`"""


if __name__ == "__main__":
    main()
