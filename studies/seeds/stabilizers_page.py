"""From the numbers of the cells to verdicts on what is claimed of stabilizers, and the page that states them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from verdicts import decided, jackknife, mean_of, shown

from saekit.comparison.intervals import over_saes
from saekit.measure.results import Measured
from saekit.measure.verdicts import Claim, Stored

MARGIN = 0.01
REACHED = 0.8
"""PW-MCC of 2505.20254."""

PAPER = {
    "L2 .01": "2603.04198: more shared latents (Pythia-70M, 3 seeds; their weight is not known)",
    "L2 .03": "2603.04198: more shared latents (Pythia-70M, 3 seeds; their weight is not known)",
    "aligned": "2605.18629: seeds are more stable (no number known)",
    "OrtSAE .25": "2509.22033 does not report seeds",
    "k annealed from 48": "Llama Scope anneals k; seeds are not reported",
    "subspace 1/2": "2508.16929: fewer dead latents; seeds are not reported",
    "soft-frozen": "2602.14111: a control; nothing is to be shared",
    "mutual .1": "2411.01220: seeds that are trained to agree",
    "consensus start": "ours",
    "JumpReLU, density 1": "beside JumpReLU; Gemma Scope 2: fewer dense latents, seeds are not reported",
    "Matryoshka, balance .75": "beside Matryoshka; 2505.11756: less hedging, seeds are not reported",
}
"""Methods that are said to steady latents, or that might, with what is published of them."""
BASE = {"JumpReLU, density 1": "JumpReLU", "Matryoshka, balance .75": "Matryoshka"}
"""What a method is compared with, where that is not TopK."""
WIDTHS = ("TopK, 64 latents", "TopK, 96 latents", "TopK", "TopK, 192 latents")
CLAIMED = {"shared": "shared", "pw_mcc": "PW-MCC", "recovered": "function (FVU recovered by partners)"}

Cell = dict[str, Any]


def cells_of(found: dict[str, Any], place: str) -> dict[str, Cell]:
    return {cell["method"]: cell for cell in found["cells"] if cell["place"] == place}


def _places(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(cell["place"] for cell in found["cells"]))


def _models(found: dict[str, Any]) -> list[str]:
    return [place for place in _places(found) if place != "synthetic" and "random" not in place]


def at_equal_fvu(cells: dict[str, Cell], name: str, fvu: float, seeds: Sequence[int]) -> float:
    """A quantity of TopK SAEs of such a width that their FVU is this one, between the widths on both sides of it."""
    known = [cells[width] for width in WIDTHS if width in cells]
    points = sorted((float(np.mean(np.array(c["fvu"])[list(seeds)])), mean_of(c, name, seeds)) for c in known)
    return float(np.interp(fvu, *zip(*points, strict=True)))


def claims(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every claim with the paper's words, our estimate, a verdict per model; the methods of a claim are one family."""
    listed: list[dict[str, Any]] = []

    def add(claim: str, model: str, what: str, estimate: dict[str, Any], paper: str = "") -> None:
        measured = Measured(estimate["value"], estimate["low"], estimate["high"])
        judged = Stored(measured, max(estimate["seeds"] - 1, 1))
        listed.append({"claim": claim, "model": model, "what": what, "paper": paper, "estimate": estimate,
                       "verdict": None, "judged": Claim(judged, MARGIN)})  # fmt: skip

    for place in _models(found):
        cells = cells_of(found, place)
        for method, paper in PAPER.items():
            _of_method(add, cells, place, method, paper)
        _of_starts(add, cells, place)
        _of_stable(add, cells, place)
        _of_null(add, cells, place)
        _of_random(add, found, place)
    families: dict[str, list[dict[str, Any]]] = {}
    for each in listed:
        families.setdefault(_family(each["claim"]), []).append(each)
    return [each for family in families.values() for each in decided(family)]


def _family(claim: str) -> str:
    """What is claimed together: a claim without the name of the method."""
    return claim.partition(" raises ")[2] or claim.partition(": ")[2] or claim


Add = Callable[..., None]


def _of_method(add: Add, cells: dict[str, Cell], place: str, method: str, paper: str) -> None:
    """Does a method raise what is shared, against its base, and against TopK of equal FVU?"""
    base = BASE.get(method, "TopK")
    if method not in cells or base not in cells:
        return
    cell, other = cells[method], cells[base]
    m = min(cell["m"], other["m"])
    for name, words in CLAIMED.items():
        difference = jackknife(lambda s, name=name: mean_of(cell, name, s) - mean_of(other, name, s), m)
        add(f"{method} raises {words}, at equal L0", place, f"minus {base}", difference, paper)
    if base == "TopK" and len([width for width in WIDTHS if width in cells]) > 1:

        def gap(seeds: Sequence[int]) -> float:
            fvu = float(np.mean(np.array(cell["fvu"])[list(seeds)]))
            return mean_of(cell, "shared", seeds) - at_equal_fvu(cells, "shared", fvu, seeds)

        add(f"{method} raises shared, at equal L0 and equal FVU", place, "minus TopK of another width",
            jackknife(gap, m), paper)  # fmt: skip


def _of_starts(add: Add, cells: dict[str, Cell], place: str) -> None:
    one, other = cells.get("one start, other orders"), cells.get("other starts and orders")
    if one is not None and other is not None:
        gap = jackknife(lambda s: mean_of(one, "shared", s) - mean_of(other, "shared", s), one["m"])
        add("shared starts explain stability", place, "shared of one start, other orders, minus other starts", gap,
            "2606.02061: much of what archetypal SAEs share comes from their start")  # fmt: skip


def _of_stable(add: Add, cells: dict[str, Cell], place: str) -> None:
    paper = "2606.12138: stable latents carry most of the reconstruction and of what is predicted"
    for method in ("TopK", "L2 .01"):
        if method not in cells:
            continue
        cell = cells[method]
        shares = [each["stable"] / (each["stable"] + each["others"]) for each in cell["without"]]
        name = f"{method}: stable latents carry most of the"
        stable = float(np.mean(cell["stable"]))
        add(f"{name} reconstruction", place, f"their part of the rise of FVU without either, minus .5; they are "
            f"{stable:.0%} of the latents", _over(np.array(shares) - 0.5), paper)  # fmt: skip
        f1 = [each["stable"] - each["others"] for each in cell["probe"]]
        add(f"{name} classification", place, "macro-F1 of the stable latents alone minus that of the others alone",
            _over(f1), paper)  # fmt: skip
    for method in ("TopK", "L2 .01", "aligned"):
        if method in cells:
            value = jackknife(lambda s, cell=cells[method]: mean_of(cell, "pw_mcc", s) - REACHED, cells[method]["m"])
            add(f"{method}: a PW-MCC of .80 is reached", place, "PW-MCC minus .80", value,
                "2505.20254: .80 (TopK, Pythia-160M, 16,384 latents, 500M tokens, 3 seeds)")  # fmt: skip


def _of_null(add: Add, cells: dict[str, Cell], place: str) -> None:
    if "TopK" in cells and cells["TopK"].get("along"):
        first, null = cells["TopK"]["along"][0], cells["TopK"]["shared_null"]["value"]
        each = {key: first["shared"][key] for key in ("value", "low", "high")}
        moved = {key: value - null for key, value in each.items()}
        add("short budgets share more than chance", place, f"shared after {first['rows']:,} rows, minus the null",
            moved | {"seeds": cells["TopK"]["m"]}, "glN1qCfwdz: at short budgets decoders match the null")  # fmt: skip


def _of_random(add: Add, found: dict[str, Any], place: str) -> None:
    other = cells_of(found, f"{place}, random weights").get("TopK")
    mine = cells_of(found, place).get("TopK")
    if other is None or mine is None:
        return
    paper = "2501.17727: scores do not tell random transformers apart"
    scores = [found["detected"][name] for name in (place, other["place"])]
    gap = [a - b for a, b in zip(*scores, strict=True)]
    add("latents of the trained model are detected better than those of random weights", place,
        f"AUC of detection by tokens {np.mean(scores[0]):.3f}, minus that of random weights {np.mean(scores[1]):.3f}",
        _over(gap), paper)  # fmt: skip
    shared = jackknife(lambda s: mean_of(mine, "shared", s) - mean_of(other, "shared", s), mine["m"])
    add("seeds share more of the trained model than of random weights", place, "shared, minus that of random weights",
        shared, "ours")  # fmt: skip


def _over(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    measured = over_saes(list(values))
    return {"value": measured.value, "low": measured.low, "high": measured.high, "seeds": len(values)}


# ------------------------------------------------------------------------------------------------------ the page

INTRO = """# Training methods that are said to steady latents

**Before you read on:** SAEs of {latents} latents on layer {layer} of two models with 0.26 and 2.9 million parameters,
no weight tuned but L2's two; what seeds share still rises at this length (*a quarter, half, all* of the rows), so
levels are not comparable with papers, differences may be. FVU is of documents that no SAE saw. Cells are made in an
order of importance, and the page shows those that are there.

```bash
make study-seeds                                                     # this and the other page of the folder
python studies/seeds/stabilizers.py --out runs/stabilizers --write   # these cells: {minutes} minutes of one core
```

{seeds} SAEs per cell, of the same rows in the same order, L0 equal by k (JumpReLU: by its target). Intervals (95 %)
are a jackknife over seeds, in both cells together; a seed begins with the same weights in all of them. *At equal FVU*
compares with TopK of 64 to 192 latents, between the two widths whose FVU lies on both sides: what another width would
share at that error. *Recovered*: FVU when codes are decoded with the partners' decoder rows, from 0 (permuted
partners) to 1 (their own). *Stable*: latents that at least half of the other seeds have. Probe: macro-F1 of a ridge
classifier of 1,500 SLURP texts by their largest codes. Absorption is known on synthetic rows alone. Verdicts follow
the one rule ([concepts](../../docs/concepts.md)), margin .01; all methods and models of one claim are corrected
together (Holm). *Reproduced*: the whole interval lies beyond the margin on the claimed side; *refuted*: on the other
side.
"""


def page(found: dict[str, Any]) -> str:
    """The page."""
    settings = found["settings"]
    seconds = sum(sum(cell["seconds"].values()) for cell in found["cells"])
    parts = [INTRO.format(**settings, minutes=max(round(seconds / 60), 1)), "## Verdicts", _verdicts(found["claims"])]
    for place in _places(found):
        parts += [f"## {place[0].upper()}{place[1:]}", _about(found, place), _table(found, place)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _verdicts(listed: Sequence[dict[str, Any]]) -> str:
    rows = [
        f"| {each['claim']} | {each['model']} | {shown(each['estimate'])} {each['what']} | **{each['verdict']}** | "
        f"{each['over_models']} | {each['paper']} |"
        for each in listed
    ]
    return "\n".join(["| claim | model | here | verdict | all models | paper |", "|---|---|---|---|---|---|", *rows])


def _about(found: dict[str, Any], place: str) -> str:
    about = found["places"][place]
    null = next((c["shared_null"]["value"] for c in cells_of(found, place).values() if c.get("shared_null")), None)
    chance = "" if null is None else f" Chance of shared: {null:.3f}."
    text = f"{about['rows']:,} rows, k {about['k']}.{chance}"
    if place == "synthetic":
        text += (
            " Rows of a known dictionary with hierarchy, correlation and unequal sizes; `absorbed`: how much more "
            "often the match of a parent is silent where a child fires. Published order of F1 at 16,384 features "
            "(2602.14687): Matryoshka first (.88), a probe .97."
        )
    return text


def _table(found: dict[str, Any], place: str) -> str:
    cells = cells_of(found, place)
    synthetic = place == "synthetic"
    last = ["F1", "ceiling", "MCC", "recovered features", "absorbed"] if synthetic else ["probe F1", "stable", "others"]
    head = ["", "FVU", "shared", "a quarter, half, all", "PW-MCC", "recovered", "fire together", "dead", "L0", *last]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method, cell in cells.items():
        every = {name: jackknife(lambda s, n=name, c=cell: mean_of(c, n, s), cell["m"]) for name in cell["pairs"]}
        along = ", ".join(f"{point['shared']['value']:.2f}" for point in cell.get("along", [])) or "–"
        row = [method, shown(_over(cell["fvu"])), shown(every["shared"]), along, shown(every["pw_mcc"])]
        row += [shown(every["recovered"]), shown(every["coactivation"]), f"{np.mean(cell['dead']):.3f}"]
        row += [f"{np.mean(cell['l0']):.1f}"]
        if synthetic:
            row += [_truth(cell, name) for name in ("f1", "f1_ceiling", "mcc", "recovered", "absorbed")]
        else:
            row += [f"{np.mean([each[key] for each in cell['probe']]):.3f}" for key in ("all", "stable", "others")]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _truth(cell: Cell, name: str) -> str:
    values = [value for value in cell["truth"].get(name, []) if value is not None and np.isfinite(value)]
    return shown(_over(values)) if values else "–"
