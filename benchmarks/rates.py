"""Does the default learning rate hold? Every architecture at multiples of it, in one pass over the same rows.

    python benchmarks/rates.py                        # hours on one core; finished cells are kept in --out
    python benchmarks/rates.py --only batchtopk       # cells whose name holds this (or is this)
    python benchmarks/rates.py --table                # the table of what rates.json holds
    python benchmarks/rates.py --quick                # one small cell, nothing written

Each cell is a model, an architecture, a width, a sparsity and a number of rows; the batch is the default unless the
cell says otherwise. FVU is of held-out documents; a latent is dead when it is silent on 100,000 training rows. Cells
go to ``benchmarks/rates.json``, the table between the markers of ``benchmarks/README.md``.
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
from quality import HERE, captured, fvu, models, write_readme
from truth import ROWS as TRUE_ROWS

from saekit.rows.synthetic import synthetic_rows

MULTIPLES = (0.5, 0.707, 1.0, 1.414, 2.0)
"""Learning rates that are tried, in multiples of the default."""
DEAD_LIMIT = 0.02
"""Largest fraction of dead latents with which a learning rate counts as the best. Unit: fraction."""
DEAD_ROWS, HELD_OUT_ROWS = 100_000, 28_000
STORED = HERE / "rates.json"
"""Cells as they were last measured; those of before there was this file have the digits of the table."""
LONG = "1.0, encoder rows of length 1"
"""Name of the default rate with longer initial encoder rows, where the default is short ones."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One line of the table."""

    model: str
    arch: str
    n: int
    k: int
    rows: int
    batch: int | None = None
    multiples: tuple[float, ...] = (0.707, 1.0, 1.414)

    @property
    def name(self) -> str:
        """The words that ``--only`` looks in, and the file."""
        return f"{self.model}-{self.arch}-{self.n}-k{self.k}-{self.rows}" + (f"-{self.batch}" if self.batch else "")


CELLS = [
    Cell("stories260K", "topk", 1024, 16, 2_048_000, 1024, MULTIPLES),
    Cell("stories260K", "topk", 1024, 32, 2_048_000, 1024, MULTIPLES),
    *(Cell("stories260K", "topk", 1024, 16, 300_000, batch) for batch in (128, 256, 512)),
    *(Cell("stories260K", "topk", 1024, k, 512_000) for k in (8, 16, 32, 64)),
    *(Cell("stories260K", arch, 1024, 16, 512_000) for arch in ("hierarchical-topk", "batchtopk", "matryoshka")),
    Cell("stories260K", "abstopk", 1024, 16, 512_000),
    Cell("stories260K", "abstopk", 1024, 16, 600_000, 1024),
    *(Cell("stories260K", arch, 1024, 4, 600_000, 1024) for arch in ("topk", "batchtopk", "matryoshka")),
    *(Cell("stories260K", arch, 1024, 8, 600_000, 1024) for arch in ("batchtopk", "matryoshka")),
    Cell("stories260K", "matryoshka", 2048, 16, 600_000, 1024),
    Cell("stories260K", "topk", 2048, 16, 512_000),
    *(Cell("stories260K", arch, 1024, 16, 2_048_000, 1024) for arch in ("batchtopk", "matryoshka")),
    Cell("stories260K", "topk", 1024, 8, 2_048_000, 1024),
    *(Cell("stories260K", arch, 512, 16, 60_000) for arch in ("topk", "batchtopk", "matryoshka")),
    Cell("stories260K", "topk", 256, 16, 100_000),
    *(Cell("builtin", "topk", 1024, k, 300_000) for k in (16, 32)),
    Cell("builtin", "topk", 512, 16, 60_000),
    *(Cell("builtin", arch, 2048, 8, 400_000, 1024) for arch in ("batchtopk", "matryoshka")),
    *(Cell("builtin", arch, 1024, 16, 300_000) for arch in ("abstopk", "jumprelu", "relu")),
    *(Cell("synthetic", arch, 128, 6, 128_000, 256) for arch in ("topk", "batchtopk", "matryoshka")),
    *(Cell("stories260K", "jumprelu", 1024, k, 512_000) for k in (16, 32)),
    Cell("stories260K", "relu", 1024, 16, 512_000),
    *(Cell("stories260K", arch, 512, 16, 60_000) for arch in ("jumprelu", "gated", "relu", "p-anneal")),
    Cell("MiniLM", "topk", 1024, 32, 250_000),
    *(Cell("builtin", "topk", n, 16, 600_000) for n in (256, 512)),
    *(Cell("builtin", "topk", n, 16, 1_200_000, 1024) for n in (1024, 2048, 4096)),
    *(Cell("MiniLM", "topk", n, 32, 1_200_000, 1024) for n in (1024, 2048)),
    Cell("MiniLM", "topk", 4096, 32, 1_200_000, 2048),
    *(Cell(model, "batchtopk", 1024, k, 1_200_000, 1024) for model, k in (("builtin", 16), ("MiniLM", 32))),
    *(
        Cell(model, arch, 1024, k, 1_200_000, 1024)
        for model, k in (("builtin", 16), ("MiniLM", 32))
        for arch in ("matryoshka", "abstopk", "jumprelu", "relu", "gated", "p-anneal")
    ),
    *(Cell(model, "matryoshka", 1024, 8, 1_200_000, 1024) for model in ("builtin", "MiniLM")),
    Cell("stories260K", "topk", 1024, 16, 5_700_000, 4096),
    Cell("stories260K", "topk", 4096, 16, 1_000_000),
    Cell("stories260K", "topk", 1024, 16, 7_600_000, 1024),
]
QUICK = [Cell("builtin", "topk", 64, 4, 5_000, 256, (0.5, 1.0))]
TOKENS = {
    "stories260K": 1_900_000,
    "synthetic": 200_000,
    "builtin": 500_000,
    "MiniLM": 330_000,
}
"""Rows captured from each model."""


def places() -> dict[str, dict[str, Any]]:
    """Where the rows come from: model, layer, texts."""
    real = models()
    return {
        "builtin": {"path": "builtin", "layer": 2, "data": "builtin@train"},
        "MiniLM": {"path": real["MiniLM"]["path"], "layer": 3},
        "stories260K": real["stories260K"],
    }


def rows_of(model: str, folder: Path, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Training rows and held-out rows; those of ``synthetic`` have the dictionary of `truth.py`."""
    if model == "synthetic":
        rows = synthetic_rows(TRUE_ROWS)
        split = rows.n_rows - HELD_OUT_ROWS
        return rows.rows(0, split).numpy(), rows.rows(split, rows.n_rows).numpy()
    train, held_out = captured(model, places()[model], folder, tokens)
    return np.load(train), np.load(held_out)[:HELD_OUT_ROWS]


def measure(cell: Cell, folder: Path, seeds: list[int], tokens: int) -> dict[str, Any]:
    """Train a cell at every multiple of the default rate, in one pass, and measure each SAE."""
    import saekit
    from saekit.training.architectures import config_from_dict
    from saekit.training.config import Selecting
    from saekit.training.defaults import default_batch_rows, resolve

    x, held_out = rows_of(cell.model, folder, tokens)
    test = torch.from_numpy(held_out)
    batch = cell.batch or default_batch_rows(cell.rows)
    sparsity = {"target_l0" if cell.arch in ("jumprelu", "gated", "relu", "p-anneal") else "k": cell.k}
    kind = {"arch": "topk", "sign": "magnitude"} if cell.arch == "abstopk" else {"arch": cell.arch}
    config = config_from_dict({**kind, "n_latents": cell.n, **sparsity})
    steps = cell.rows // batch
    lr = resolve(config, x.shape[1], steps, batch).lr
    configs = {str(multiple): dataclasses.replace(config, lr=multiple * lr) for multiple in cell.multiples}
    if isinstance(config, Selecting):
        configs[LONG] = dataclasses.replace(config, lr=lr, encoder_length=1.0)
    saes = saekit.train(
        list(configs.values()),
        x[: cell.rows],
        seeds=seeds,
        tokens=cell.rows,
        settings=saekit.TrainSettings(batch_rows=batch),
        progress=False,
    )
    found: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    for sae, name in zip(saes, [name for name in configs for _ in seeds], strict=True):
        codes = sae.encode(test)
        fired = torch.zeros(cell.n, dtype=torch.bool)
        for rows in torch.from_numpy(x[:DEAD_ROWS]).split(8192):
            fired[sae.encode(rows).indices.long()] = True
        dead = 1 - float(fired.double().mean())
        score = {"fvu": fvu(held_out, sae.decode(codes).numpy()), "dead": dead, "l0": codes.l0()}
        found[name].append(score)
    return {**dataclasses.asdict(cell), "batch": batch, "lr": lr, "seeds": seeds, "found": found}


def mean_of(scores: list[dict[str, float]]) -> dict[str, float]:
    """Each score, on average over the seeds."""
    return {name: float(np.mean([each[name] for each in scores])) for name in scores[0]}


def regret(found: dict[str, list[dict[str, float]]]) -> float | None:
    """FVU at the default, relative to the lowest that leaves few latents dead; None where none does."""
    means = {multiple: mean_of(scores) for multiple, scores in found.items()}
    lively = [each["fvu"] for name, each in means.items() if name != LONG and each["dead"] <= DEAD_LIMIT]
    return means["1.0"]["fvu"] / min(lively) - 1 if lively else None


def table(results: list[dict[str, Any]]) -> str:
    """The cells as Markdown."""
    head = ["model", "architecture", "latents", "k", "rows", "batch", "default lr", *(f"{m:g} ×" for m in MULTIPLES)]
    lines = [f"| {' | '.join([*head, 'length 1', 'default / best'])} |", "| --- | --- |" + " ---: |" * len(head)]
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
        for multiple in [*map(str, MULTIPLES), LONG]:
            at = mean_of(each["found"][multiple]) if multiple in each["found"] else None
            cells.append(f"{at['fvu']:.4f} / {100 * at['dead']:.1f}" if at else "")
        more = regret(each["found"])
        lines.append(f"| {' | '.join([*cells, '' if more is None else f'{1 + more:.3f}'])} |")
    return "\n".join(lines)


def asked_for(words: str, cells: list[Cell]) -> list[Cell]:
    """Cells of this very name, else those whose name holds it."""
    return [each for each in cells if each.name == words] or [each for each in cells if words in each.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small cell, nothing written")
    parser.add_argument("--only", default="", help="cells whose name holds this")
    parser.add_argument("--table", action="store_true", help="write the table of what is stored")
    parser.add_argument("--seeds", default="1,2", help="averaged [1,2]")
    parser.add_argument("--out", default="runs/rates")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp() if arguments.quick else arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    known = json.loads(STORED.read_text()) if STORED.exists() and not arguments.quick else {}
    for cell in QUICK if arguments.quick else [] if arguments.table else asked_for(arguments.only, CELLS):
        path = folder / f"{cell.name}-seeds{arguments.seeds}.json"
        if not path.exists():
            tokens = 20_000 if arguments.quick else TOKENS[cell.model]
            path.write_text(json.dumps(measure(cell, folder, seeds, tokens)))
        known[cell.name] = json.loads(path.read_text())
        print(json.dumps(known[cell.name]), file=sys.stderr, flush=True)
    known = {cell.name: known[cell.name] for cell in [*QUICK, *CELLS] if cell.name in known}
    shown = table(list(known.values()))
    print(shown)
    if not arguments.quick:
        STORED.write_text(json.dumps(known, indent=1) + "\n")
        write_readme("rates", f"{ABOUT}\n\n{shown}")


ABOUT = """## Learning rates

Multiples of the default learning rate: FVU of held-out documents / dead latents in percent (silent on 100,000 training
rows), one seed. *Length 1*: the default rate with encoder rows that begin with length 1 instead of 0.2. The last column
is FVU at the default, relative to the lowest with at most 2% dead. A blank is a rate that was not tried, or a cell
without such a rate. Rows of stories260K after block 2 (d 64), of the built-in model (d 192), of MiniLM (d 384) and of
the known dictionary of `truth.py` (d 64).

`python benchmarks/rates.py --seeds 1`"""


if __name__ == "__main__":
    main()
