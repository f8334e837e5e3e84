"""Does the default learning rate hold? Every architecture at multiples of it, in one pass over the same rows.

    python benchmarks/rates.py                        # hours on one core; finished cells are kept in --out
    python benchmarks/rates.py --only batchtopk       # cells whose name holds this (or is this)
    python benchmarks/rates.py --candidate            # the default beside `CANDIDATE`, in cells of its own
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
from truth import ROWS as TRUE_ROWS

from saekit.rows.synthetic import synthetic_rows

MULTIPLES = (0.354, 0.5, 0.707, 1.0, 1.414, 2.0)
"""Learning rates that are tried, in multiples of the default. With a batch of 256 rows 1.414 is the default of larger
batches."""
DEAD_LIMIT = 0.02
"""Largest fraction of dead latents with which a learning rate counts as the best. Unit: fraction."""
DEAD_ROWS, HELD_OUT_ROWS = 100_000, 28_000
CANDIDATE = {"encoder_length": 0.2, "clip": None, "decay_fraction": 0.5}
"""Other settings of the top-k family, which go with the learning rate of `candidate_lr`."""


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
    candidate: bool = False
    """Whether the multiples are of `candidate_lr`, with `CANDIDATE`, beside the default."""

    @property
    def name(self) -> str:
        """The words that ``--only`` looks in, and the file."""
        name = f"{self.model}-{self.arch}-{self.n}-k{self.k}-{self.rows}" + (f"-{self.batch}" if self.batch else "")
        return name + ("-candidate" if self.candidate else "")


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
CANDIDATES = [
    dataclasses.replace(cell, candidate=True, multiples=NEAR)
    for cell in [
        Cell("stories260K-2", "topk", 1024, 16, 2_048_000, 1024),
        Cell("stories260K-2", "topk", 1024, 32, 2_048_000, 1024),
        *(Cell("stories260K-2", "topk", 1024, k, 512_000) for k in (8, 16, 32, 64)),
        Cell("stories260K-2", "topk", 2048, 16, 512_000),
        *(Cell("stories260K-2", arch, 1024, 16, 512_000) for arch in ("batchtopk", "matryoshka", "abstopk")),
        *(Cell("stories260K-2", arch, 512, 16, 60_000) for arch in ("topk", "batchtopk", "matryoshka")),
        *(Cell("builtin", "topk", 1024, k, 300_000) for k in (16, 32)),
        Cell("builtin", "topk", 512, 16, 60_000),
        *(Cell("synthetic", arch, 128, 6, 128_000, 256) for arch in ("topk", "batchtopk", "matryoshka")),
    ]
]
QUICK = [Cell("builtin", "topk", 64, 4, 5_000, 256, (0.5, 1.0))]
TOKENS = {
    "stories260K": 1_900_000,
    "stories260K-2": 1_900_000,
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
        **{name: {"path": real[name]["path"], "layer": 3} for name in ("stories260K", "MiniLM")},
        "stories260K-2": real["stories260K"],
    }


def rows_of(model: str, folder: Path, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Training rows and held-out rows; those of ``synthetic`` have the dictionary of `truth.py`."""
    if model == "synthetic":
        rows = synthetic_rows(TRUE_ROWS)
        split = rows.n_rows - HELD_OUT_ROWS
        return rows.rows(0, split).numpy(), rows.rows(split, rows.n_rows).numpy()
    train, held_out = captured(model, places()[model], folder, tokens)
    return np.load(train), np.load(held_out)[:HELD_OUT_ROWS]


def candidate_lr(n: int, steps: int, batch: int) -> float:
    """The learning rate that goes with `CANDIDATE`."""
    return 20e-3 * min(1, 1024 / n) ** 0.5 * min(1, batch / 1024) ** min(1, steps / 1000) * min(1, 1000 / steps) ** 0.25


def measure(cell: Cell, folder: Path, seeds: list[int], tokens: int) -> dict[str, Any]:
    """Train a cell at every multiple of the default rate, in one pass, and measure each SAE."""
    import saekit
    from saekit.training.architectures import config_from_dict
    from saekit.training.defaults import default_batch_rows, resolve

    x, held_out = rows_of(cell.model, folder, tokens)
    test = torch.from_numpy(held_out)
    batch = cell.batch or default_batch_rows(cell.rows)
    sparsity = {"target_l0" if cell.arch in ("jumprelu", "gated", "relu", "p-anneal") else "k": cell.k}
    kind = {"arch": "topk", "sign": "magnitude"} if cell.arch == "abstopk" else {"arch": cell.arch}
    config = config_from_dict({**kind, "n_latents": cell.n, **sparsity})
    steps = cell.rows // batch
    lr = default = resolve(config, x.shape[1], steps, batch).lr
    configs = {}
    if cell.candidate:
        configs["default"] = dataclasses.replace(config, lr=default)
        config, lr = dataclasses.replace(config, **CANDIDATE), candidate_lr(cell.n, steps, batch)
    configs |= {str(multiple): dataclasses.replace(config, lr=multiple * lr) for multiple in cell.multiples}
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


def candidate_table(results: list[dict[str, Any]]) -> str:
    """The candidate beside the default as Markdown."""
    head = ["model", "architecture", "latents", "k", "rows", "batch", "default", "candidate lr"]
    lines = [f"| {' | '.join([*head, *(f'{multiple:g} ×' for multiple in NEAR), 'candidate / default'])} |"]
    lines.append("| --- | --- |" + " ---: |" * (len(head) + len(NEAR) - 1))
    for each in results:
        found = {name: mean_of(scores) for name, scores in each["found"].items()}
        shown = [f"{at['fvu']:.4f} / {100 * at['dead']:.1f}" for at in found.values()]
        cells = [each["model"], each["arch"], *(f"{each[name]:,}" for name in ("n", "k", "rows", "batch"))]
        cells += [shown[0], f"{each['lr']:.4f}", *shown[1:], f"{found['1.0']['fvu'] / found['default']['fvu']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def asked_for(words: str, cells: list[Cell]) -> list[Cell]:
    """Cells of this very name, else those whose name holds it."""
    return [each for each in cells if each.name == words] or [each for each in cells if words in each.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small cell, nothing written")
    parser.add_argument("--only", default="", help="cells whose name holds this; nothing written")
    parser.add_argument("--candidate", action="store_true", help="the default beside the candidate")
    parser.add_argument("--finished", action="store_true", help="only the cells that are in --out already")
    parser.add_argument("--seeds", default="1,2", help="averaged [1,2]")
    parser.add_argument("--out", default="runs/rates")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp() if arguments.quick else arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    results, seeds = [], [int(seed) for seed in arguments.seeds.split(",")]
    for cell in QUICK if arguments.quick else asked_for(arguments.only, CANDIDATES if arguments.candidate else CELLS):
        path = folder / f"{cell.name}-seeds{arguments.seeds}.json"
        if arguments.finished and not path.exists():
            continue
        if not path.exists():
            tokens = 20_000 if arguments.quick else TOKENS[cell.model]
            path.write_text(json.dumps(measure(cell, folder, seeds, tokens)))
        results.append(json.loads(path.read_text()))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    shown = candidate_table(results) if arguments.candidate else table(results)
    print(shown)
    if not (arguments.quick or arguments.only):
        name, about = ("candidate", CANDIDATE_ABOUT) if arguments.candidate else ("rates", ABOUT)
        write_readme(name, f"{about}\n\n{shown}")


ABOUT = """## Learning rates

Multiples of the default learning rate: FVU of held-out documents / dead latents in percent (silent on 100,000 training
rows), on average over two seeds (which differ by less than 1% of FVU). The last column is FVU at the default, relative
to the lowest with at most 2% dead. A blank is a rate that was not tried, or a cell without such a rate. At 300,000 rows
1.414 × (batches of 128: 2 ×) is what the default would be without its factor for small batches: 4.5% (12%) of the
latents are dead there, and FVU is higher.

`python benchmarks/rates.py`"""

CANDIDATE_ABOUT = """## Other settings for the top-k family, and why they are not the default

`encoder_length=0.2`, `clip=None`, `decay_fraction=0.5` and, in runs of 1,000 steps, a learning rate of `20e-3 *
sqrt(1024 / n_latents) * batch / 1024` (`CANDIDATE`, `candidate_lr`), at multiples of that rate, beside the default: FVU
of held-out documents / dead latents in percent (silent on 100,000 training rows), one seed; rows of stories260K after
block 2, of the built-in model, and of the known dictionary of `truth.py`.

Encoder rows of length 1 that copy the decoder overshoot at first where k is not far below the width of the rows;
clipping makes up for the large gradients. The candidate has lower FVU or fewer dead latents in nearly all cells of
models. With k = 64, as many as dimensions, FVU falls as latents die. It is worse on rows of a known dictionary, where
seeds also share less (`python benchmarks/truth.py --candidate`, four seeds: BatchTopK .58 → .36, MCC .80 → .73; TopK
.74 → .66, MCC .85 → .82; Matryoshka .49 → .40, MCC .77 → .74). Hence it is no default; name it where FVU matters.

`python benchmarks/rates.py --candidate --seeds 1`"""


if __name__ == "__main__":
    main()
