"""Is any peer better once its learning rate is tuned? Every contestant over the same ladder of rates, at equal L0.

    OMP_NUM_THREADS=1 python benchmarks/quality_tuned.py         # hours on one core; finished runs are kept in --out
    python benchmarks/quality_tuned.py --cells stories260K-topk-16 stories260K-relu-16
    python benchmarks/quality_tuned.py --keep-peers              # peers' runs of tuned.json, of which the best anew
    python benchmarks/quality_tuned.py --table                   # what is finished, without training anything
    python benchmarks/quality_tuned.py --quick                   # one tiny cell of saekit alone, nothing written

A cell is a model, an architecture and a number of latents per row; its runs are of 2,000 steps of 1,024 rows (`CELLS`).
Each contestant climbs the ladder: it is trained at the two rates of `FIRST`, then at the next one beyond its best
until the best is not at the end of what was tried (or the ladder ends). A peer whose schedule can be set does so
twice, with the learning rate falling over the last 20% of the steps and, from the best rate of those, over the last
35%, as that of saekit does. saekit climbs too, to see what its default costs; what is compared with the peers is that
*default*. Rates and schedules are chosen on the first half of the held-out rows and reported on the second. Where the
peer is close or ahead (`CLOSE`), further seeds of both are trained, and the interval of the mean logarithm of their
ratio gives the verdict.

Peers do not all end at L0 = k. A contestant's best rate is the one with the lowest FVU relative to saekit's default at
the same L0, read off SAEs of several sparsities (`PARTS`), straight lines between them on logarithmic axes. At the best
rate of a peer saekit is trained with two more sparsities, close around the L0 that the peer reached, and compared by
the line between those. Time is CPU time of training, one thread, of runs that saekit makes alone. Needs
benchmarks/peers.sh once, and the sample data. Tables go to ``benchmarks/tuned.json`` and between the markers of
``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from quality import COEFFICIENTS, HERE, PEERS, captured, fvu, models, result, write_readme

from saekit.measure.intervals import measured_mean
from saekit.measure.results import Measured
from saekit.measure.verdicts import Claim, Stored, family_verdicts

LADDER = (3e-4, 1e-3, 3e-3, 9e-3, 1.8e-2, 3e-2, 6e-2)
"""Learning rates, from low to high."""
FIRST = (3e-3, 9e-3)
"""Those that a contestant begins with."""
DECAYS = (0.2, 0.35)
"""Fractions of the steps, the last ones, over which the learning rate of a peer falls."""
FIXED_SCHEDULE = ("saekit", "eai-sparsify")
"""Contestants that are not trained with `DECAYS`: saekit is shown with its own, that of eai-sparsify cannot be set."""
BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shorter runs of saekit's defaults, as fractions of the steps: how soon they reach a peer's FVU."""
SEEDS = (1,)
"""Further seeds of saekit's default, for the spread."""
CLOSE = 0.02
"""A peer whose FVU is not higher than saekit's by at least this fraction is compared with further seeds of both."""
CLOSE_SEEDS = (1, 2, 3, 4)
"""Those seeds."""
MARGIN = 0.01
"""Difference of FVU that counts as none, relative."""
DEAD_LIMIT = 0.02
"""Largest fraction of dead latents with which a rate counts as saekit's best. Unit: fraction."""
PARTS = (0.25, 0.5, 0.75, 1.25)
"""Sparsities of saekit's curve, as fractions of k."""
BY_K = ("topk", "batchtopk", "matryoshka")
"""Architectures whose sparsity is k; that of the others is a target."""
Found = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model, architecture and sparsity."""

    model: str
    arch: str
    k: int
    steps: int = 2000
    batch: int = 1024
    latents: int = 1024
    tokens: int = 1_900_000

    @property
    def name(self) -> str:
        """What ``--cells`` takes."""
        return f"{self.model}-{self.arch}-{self.k}"


CELLS = [
    Cell("stories260K", "topk", 16),
    Cell("stories260K", "batchtopk", 16),
    Cell("stories260K", "jumprelu", 16),
    Cell("stories260K", "topk", 32),
    Cell("stories260K", "topk", 8),
    Cell("stories260K", "matryoshka", 16),
    *(Cell("stories260K", arch, 16) for arch in ("gated", "relu", "p-anneal")),
    Cell("stories260K", "topk", 64),
    Cell("stories260K", "batchtopk", 32),
    Cell("MiniLM", "topk", 32, tokens=330_000),
]


def job_of(cell: Cell, folder: Path) -> Found:
    """Return what is the same in all runs of a cell."""
    train, held_out = captured(cell.model, models()[cell.model], folder, cell.tokens)
    n = cell.latents
    return {
        "rows": str(train), "held_out": str(held_out), "steps": cell.steps, "batch": cell.batch, "latents": n,
        "k": cell.k, "seed": 0, "sizes": [n // 4, n // 2, n], "calibration_runs": 5, "arch": cell.arch,
    }  # fmt: skip


def tag_of(cell: Cell, who: str, seed: int = 0) -> str:
    """Return the name of the folder of a run."""
    return f"{cell.model}-{cell.latents}-{cell.steps}x{cell.batch}-k{cell.k}-seed{seed}-{cell.arch}-{who}"


def train_together(job: Found, wanted: Sequence[tuple[float, float | None, int]], path: Path) -> list[Found]:
    """Train saekit's SAEs of several (sparsity, learning rate, seed) in one pass over the rows, and measure each.

    A learning rate of None is the default. The file `path` keeps what was found.
    """
    if path.exists():
        return json.loads(path.read_text())
    import torch

    import saekit
    from saekit.training.architectures import config_from_dict

    sizes = {"sizes": tuple(job["sizes"]), "over": "batchtopk"} if job["arch"] == "matryoshka" else {}
    by_seed: dict[int, list[int]] = {}
    for place, (_, _, seed) in enumerate(wanted):
        by_seed.setdefault(seed, []).append(place)
    x, found = torch.from_numpy(np.load(job["held_out"])), {}
    for seed, places in by_seed.items():
        configs = [
            config_from_dict(
                {
                    "arch": job["arch"],
                    "n_latents": job["latents"],
                    "k" if job["arch"] in BY_K else "target_l0": wanted[place][0],
                    "lr": wanted[place][1],
                    **sizes,
                }
            )
            for place in places
        ]
        saes = saekit.train(
            configs,
            saekit.open_rows(job["rows"]),
            seeds=[seed],
            tokens=job["steps"] * job["batch"],
            settings=saekit.TrainSettings(batch_rows=job["batch"]),
        )
        for place, sae in zip(places, saes, strict=True):
            codes = sae.encode(x)
            x_hat, half = sae.decode(codes, x).numpy(), len(x) // 2
            found[place] = {
                "sparsity": wanted[place][0], "lr": wanted[place][1], "seed": seed, "l0": codes.l0(),
                "dead": 1 - len(codes.indices.unique()) / job["latents"],
                "fvu_choosing": fvu(x[:half].numpy(), x_hat[:half]), "fvu": fvu(x[half:].numpy(), x_hat[half:]),
            }  # fmt: skip
            print(f"{path.name}: {found[place]}", file=sys.stderr, flush=True)
    rows = [found[place] for place in range(len(wanted))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return rows


def around(l0: float, arch: str) -> tuple[float, float]:
    """Return the two sparsities that are trained to be compared at an L0."""
    if arch in BY_K:
        return math.floor(l0), math.floor(l0) + 1
    return 0.96 * l0, 1.04 * l0


def at_l0(points: Sequence[Found], l0: float, score: str = "fvu") -> float:
    """Return FVU at an L0, on the straight lines through SAEs on logarithmic axes; that of a single SAE as it is."""
    points = sorted(points, key=lambda each: each["l0"])
    if len(points) == 1:
        return points[0][score]
    after = next((place for place in range(1, len(points)) if l0 <= points[place]["l0"]), len(points) - 1)
    a, b = points[after - 1], points[after]
    slope = math.log(b[score] / a[score]) / math.log(b["l0"] / a["l0"])
    return a[score] * (l0 / a["l0"]) ** slope


def own_runs(cell: Cell, folder: Path) -> Found:
    """Train saekit: its default, other seeds and sparsities together, shorter runs, and the ladder."""
    job = {**job_of(cell, folder), "peer": "saekit"}
    whole = result(folder / tag_of(cell, "saekit"), job, cell.k)
    wanted = [(cell.k, None, seed) for seed in SEEDS]
    if cell.arch != "topk":
        wanted += [(round(part * cell.k), None, 0) for part in PARTS]
    found = train_together(job, wanted, folder / tag_of(cell, "saekit-others") / "result.json")
    seeds, curve = found[: len(SEEDS)], [whole, *found[len(SEEDS) :]]
    shorter = [
        result(folder / tag_of(cell, f"saekit-x{part:g}"), {**job, "steps": round(part * cell.steps)}, cell.k)
        for part in BUDGETS
    ]
    ladder = climb(cell, folder, "saekit", curve)
    return {"default": whole, "ladder": ladder, "curve": curve, "seeds": seeds, "shorter": shorter}


def climb(cell: Cell, folder: Path, peer: str, curve: Sequence[Found], kept: Sequence[Found] = ()) -> list[Found]:
    """Train a contestant on the ladder until its best rate is not at the end of what was tried, with each schedule.

    Runs that `kept` holds are not made again.
    """
    every: list[Found] = []
    for decay in (None,) if peer in FIXED_SCHEDULE else DECAYS:
        tried: dict[int, Found] = {}
        able = [each for each in every if "error" not in each]
        wanted = [LADDER.index(lr) for lr in ([best_of(able, curve)["lr"]] if able else FIRST)]
        while wanted:
            for place in wanted:
                tried[place] = one_of(LADDER[place], decay, kept) or train(cell, folder, peer, LADDER[place], decay)
            able = [each for each in tried.values() if "error" not in each]
            if not able:
                break
            best = LADDER.index(best_of(able, curve)["lr"])
            wanted = [p for p in (best - 1, best + 1) if 0 <= p < len(LADDER) and p not in tried]
        every += [tried[place] for place in sorted(tried)]
    return every


def train(cell: Cell, folder: Path, peer: str, lr: float, decay: float | None, seed: int = 0) -> Found:
    """Train a contestant at one learning rate and with one schedule; None is its own."""
    job = {**job_of(cell, folder), "peer": peer, "coefficient_range": COEFFICIENTS.get((peer, cell.arch)), "lr": lr}
    schedule = {} if decay is None else {"decay": decay}
    tag = tag_of(cell, f"{peer}-lr{lr:g}" + "".join(f"-decay{each:g}" for each in schedule.values()), seed)
    return result(folder / tag, {**job, **schedule, "seed": seed}, cell.k) | {"lr": lr, **schedule}


def at_the_l0_of(theirs: Found, cell: Cell, folder: Path, seed: int = 0) -> float:
    """Return FVU of saekit's default at the L0 of a peer's run."""
    sparsities = (cell.k,) if cell.arch == "topk" else around(theirs["l0"], cell.arch)
    path = folder / tag_of(cell, f"saekit-at-l{theirs['l0']:.4g}", seed) / "result.json"
    both = train_together(job_of(cell, folder), [(sparsity, None, seed) for sparsity in sparsities], path)
    return at_l0(both, theirs["l0"])


def one_of(lr: float, decay: float | None, runs: Sequence[Found]) -> Found | None:
    """Return the run at a learning rate and with a schedule, None where there is none."""
    return next((each for each in runs if (each["lr"], each.get("decay")) == (lr, decay)), None)


def best_of(able: Sequence[Found], curve: Sequence[Found]) -> Found:
    """Return the run with the lowest FVU relative to saekit's curve at the same L0, on the rows that choose."""
    return min(able, key=lambda each: each["fvu_choosing"] / at_l0(curve, max(each["l0"], 1e-9), "fvu_choosing"))


def seconds_to(level: float, own: Found) -> float | None:
    """Return the CPU seconds of training at the defaults after which FVU is at most `level`: runs of several lengths,
    interpolated on logarithmic axes; None where the whole run ends above it.
    """
    points = [(each["seconds"], each["fvu"]) for each in [*own["shorter"], own["default"]]]
    if points[-1][1] > level:
        return None
    times, scores = np.log(np.array(points)).T
    return float(np.exp(np.interp(-np.log(level), -np.minimum.accumulate(scores), times)))


def compare(cell: Cell, folder: Path, peers: Sequence[str], kept: dict[str, list[Found]]) -> Found:
    """Everything of one cell: saekit's own runs, and each peer's with saekit's FVU at the peer's L0.

    `kept` holds earlier runs of peers; the best of a peer is made again, so that all times are of this machine.
    """
    own = own_runs(cell, folder)
    rivals = []
    for peer in [each for each in peers if cell.arch in PEERS[each]]:
        known = kept.get(peer, [])
        tried = climb(cell, folder, peer, own["curve"], known)
        able = [each for each in tried if "error" not in each]
        if not able:
            rivals.append({"peer": peer, "error": tried[0]["error"]})
            continue
        best = best_of(able, own["curve"])
        if best in known:
            again = train(cell, folder, peer, best["lr"], best.get("decay"))
            tried, best = [again if each == best else each for each in tried], again
        ours = own["default"]["fvu"] if cell.arch == "topk" else at_the_l0_of(best, cell, folder)
        ratios = [ours / best["fvu"]]
        for seed in CLOSE_SEEDS if ratios[0] > 1 - CLOSE else ():
            theirs = train(cell, folder, peer, best["lr"], best.get("decay"), seed)
            ratios.append(at_the_l0_of(theirs, cell, folder, seed) / theirs["fvu"])
        to = seconds_to(best["fvu"] * own["default"]["fvu"] / at_l0(own["curve"], best["l0"]), own)
        rivals.append({"peer": peer, "tried": tried, "best": best, "ours": ours, "ratios": ratios, "seconds_to": to})
    return {**dataclasses.asdict(cell), "own": own, "rivals": rivals}


def against_own_best(own: Found) -> tuple[float, float | None]:
    """Return FVU of the default relative to the lowest on the ladder, and to the lowest with few dead latents."""
    default = own["default"]["fvu"]
    lively = [each["fvu"] for each in own["ladder"] if each["dead"] <= DEAD_LIMIT]
    return default / min(each["fvu"] for each in own["ladder"]), default / min(lively) if lively else None


def rows_of(lines: Sequence[Sequence[str]], words: int) -> str:
    """Return Markdown of a table whose first columns are words and the others figures."""
    ruled = [lines[0], ["---"] * words + ["---:"] * (len(lines[0]) - words), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def decay_of(best: Found, tried: Sequence[Found]) -> str:
    """Return over how many percent of the steps the rate of the best run falls, and what else was tried."""
    every = sorted({100 * each["decay"] for each in tried if "decay" in each})
    return f"{100 * best['decay']:g} ({', '.join(f'{each:g}' for each in every)})" if every else "own"


def rivals_table(cells: Sequence[Found]) -> str:
    """Each peer at its best rate beside saekit's default at the peer's L0."""
    head = ["model", "architecture", "k", "peer", "its rates", "its best lr", "its decay, % (tried)"]
    head += ["its FVU", "its L0", "its dead, %", "saekit's default, FVU", "saekit / peer", "over seeds"]
    lines = [[*head, "time to the peer's FVU, × its time"]]
    for cell in cells:
        for rival in cell["rivals"]:
            start = [cell["model"], cell["arch"], str(cell["k"]), rival["peer"]]
            if "error" in rival:
                lines.append([*start, "failed: " + rival["error"], *[""] * 9])
                continue
            best, tried, to = rival["best"], [each["lr"] for each in rival["tried"]], rival.get("seconds_to")
            decided = str(over_seeds(rival["ratios"])) if is_close(rival) else ""
            took = "not reached" if to is None else f"{to / best['seconds']:.2f}"
            lines.append([
                *start, f"{min(tried):g} to {max(tried):g}", f"{best['lr']:g}",
                decay_of(best, rival["tried"]), f"{best['fvu']:.4f}",
                f"{best['l0']:.1f}", f"{100 * best['dead']:.1f}", f"{rival['ours']:.4f}",
                f"{rival['ratios'][0]:.3f}", decided,
                took if "seconds_to" in rival else "",
            ])  # fmt: skip
    return rows_of(lines, 4)


def ladder_table(cells: Sequence[Found]) -> str:
    """saekit's FVU / percent dead at every rate of the ladder and at its default."""
    tried = sorted({each["lr"] for cell in cells for each in cell["own"]["ladder"]})
    head = ["model", "architecture", "k", *(f"{lr:g}" for lr in tried), "default", "its lr", "other seeds"]
    lines = [[*head, "default / best", "of those with ≤ 2% dead"]]
    for cell in cells:
        own = cell["own"]
        every, lively = against_own_best(own)
        at = {each["lr"]: each for each in own["ladder"]}
        each_rate = [*(at.get(lr) for lr in tried), own["default"]]
        shown = [f"{each['fvu']:.4f} / {100 * each['dead']:.1f}" if each else "" for each in each_rate]
        seeds = ", ".join(f"{each['fvu']:.4f}" for each in own["seeds"])
        lines.append([
            cell["model"], cell["arch"], str(cell["k"]), *shown, f"{own['default']['lr']:.2g}", seeds, f"{every:.3f}",
            "" if lively is None else f"{lively:.3f}",
        ])  # fmt: skip
    return rows_of(lines, 2)


def pareto_table(cells: Sequence[Found]) -> str:
    """FVU at L0 of every contestant, its best rate, and saekit's default."""
    names = list(PEERS)
    lines = [["model", "architecture", "k", "saekit, default", *names]]
    for cell in sorted(cells, key=lambda cell: (cell["model"], cell["arch"], cell["k"])):
        best = {rival["peer"]: rival["best"] for rival in cell["rivals"] if "best" in rival}
        each = [cell["own"]["default"], *(best.get(name) for name in names)]
        shown = [f"{one['fvu']:.4f} at {one['l0']:.1f}" if one else "" for one in each]
        lines.append([cell["model"], cell["arch"], str(cell["k"]), *shown])
    return rows_of(lines, 2)


def is_close(rival: Found) -> bool:
    """Return whether a peer was compared with further seeds."""
    return len(rival["ratios"]) > 1


def over_seeds(ratios: Sequence[float]) -> Measured:
    """Return the geometric mean of saekit's FVU over a peer's with its interval over seeds."""
    mean = measured_mean(np.log(ratios))
    return Measured(*(None if each is None else math.exp(each) for each in (mean.value, mean.low, mean.high)))


def claim(ratios: Sequence[float]) -> Claim:
    """Return the claim that saekit's FVU is below a peer's, on the logarithmic scale."""
    return Claim(Stored(measured_mean(np.log(ratios)), len(ratios) - 1).oriented(-1), math.log1p(MARGIN))


def verdicts(cells: Sequence[Found]) -> str:
    """Say against which peers, at their best rate, saekit's default is better, equivalent, worse or undecided."""
    known = [(cell, rival) for cell in cells for rival in cell["rivals"] if "best" in rival]
    far = [rival["ratios"][0] for _, rival in known if not is_close(rival)]
    lines = [
        f"In {len(far)} of {len(known)} comparisons FVU of saekit's default is at least {CLOSE:.0%} below that of the\n"
        f"peer ({min(far):.3f} to {max(far):.3f} times). In the others, seeds of both decide, with a margin of\n"
        f"{MARGIN:.0%}:\n"
    ]
    close = [(cell, rival) for cell, rival in known if is_close(rival)]
    words = family_verdicts([claim(rival["ratios"]) for _, rival in close], least=None, most=None)
    for (cell, rival), said in zip(close, words, strict=True):
        ratio = over_seeds(rival["ratios"])
        lines.append(
            f"- {rival['peer']}, {cell['model']}, {cell['arch']}, k {cell['k']}: **{said}**, {ratio} times in "
            f"{len(rival['ratios'])} seeds; {100 * rival['best']['dead']:.1f}% dead there, "
            f"{100 * cell['own']['default']['dead']:.1f}% here"
        )
    return "\n".join(lines)


def page(cells: Sequence[Found]) -> str:
    """The tables with what must be known to read them."""
    command = "`OMP_NUM_THREADS=1 python benchmarks/quality_tuned.py`"
    first = f"{command}\n\n{verdicts(cells)}\n\n{rivals_table(cells)}"
    parts = [ABOUT, first, LADDER_ABOUT, ladder_table(cells), PARETO_ABOUT]
    return "\n\n".join([*parts, pareto_table(cells)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one tiny cell of saekit alone, nothing written")
    names = [cell.name for cell in CELLS]
    parser.add_argument("--cells", nargs="+", default=names, choices=names, metavar="MODEL-ARCH-K")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), help="instead of all that have the architecture")
    parser.add_argument("--own", action="store_true", help="only saekit's own runs")
    parser.add_argument("--keep-peers", action="store_true", help="peers' runs of tuned.json, of which the best anew")
    parser.add_argument("--table", action="store_true", help="write the tables of what tuned.json holds")
    parser.add_argument("--out", default="runs/quality")
    arguments = parser.parse_args()
    store = HERE / "tuned.json"
    if arguments.quick:
        cell = Cell("stories260K", "topk", 4, steps=20, batch=256, latents=64, tokens=20_000)
        cells = [compare(cell, Path(tempfile.mkdtemp()), [], {})]
        print(ladder_table(cells))
        return
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    known = {f"{c['model']}-{c['arch']}-{c['k']}": c for c in (json.loads(store.read_text()) if store.exists() else [])}
    for cell in [] if arguments.table else [each for each in CELLS if each.name in arguments.cells]:
        if arguments.own:
            print(json.dumps(own_runs(cell, folder)))
            continue
        kept = {}
        if arguments.keep_peers:
            kept = {each["peer"]: each["tried"] for each in known[cell.name]["rivals"] if "tried" in each}
        known[cell.name] = compare(cell, folder, arguments.peers or list(kept or PEERS), kept)
        cells = [known[each.name] for each in CELLS if each.name in known]
        store.write_text(json.dumps(cells, indent=1) + "\n")
        write_readme("tuned", page(cells))
    shown = page([known[each.name] for each in CELLS if each.name in known])
    if arguments.table:
        write_readme("tuned", shown)
    print(shown)


ABOUT = """## Every contestant at its best learning rate

FVU of the half of the held-out rows that did not choose the rates; 2.05 million rows in batches of 1,024, 1,024
latents. Every peer is trained at rates of one ladder until its best is not the lowest or highest tried, with the
learning rate falling over the last 20% of the steps and, where 35 stands among the tried, over the last 35% as that of
saekit does (eai-sparsify's falls in its own way); saekit is shown at its default, at the peer's L0. Dead: silent on all
held-out rows. Time: CPU time of training, one thread, on a machine that others used meanwhile; blank where peer and
saekit ran on different machines.

A peer's best rate and schedule are those of the lowest FVU relative to saekit's default at the same L0. Where that is
not at least 2% higher than saekit's, further seeds of both are compared in the same way: the geometric mean of the
ratios with its 95% interval, and the verdict of all these together (better: saekit's FVU is the lower one). Peers are
favored a little: their rate is chosen by the first seed, saekit's is its default. MiniLM's 296,000 rows are gone
through seven times."""
LADDER_ABOUT = """### saekit over the ladder

FVU / dead latents in percent at each learning rate; the default, and its FVU with another seed; FVU
of the default over the lowest, and over the lowest that leaves at most 2% dead."""
PARETO_ABOUT = """### FVU against L0

FVU at the L0 that a contestant reached: saekit's default, the peers' best rate."""


if __name__ == "__main__":
    main()
