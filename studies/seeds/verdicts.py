"""From the numbers of the cells to verdicts on the paper's claims, and the page that states them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95
L0_TOLERANCE = 0.1
"""How far the reached L0 of an architecture may lie from TopK's for "matched sparsity" to hold."""

PAPER = {
    "width": "Pythia-160M: 0.81 of 32 latents, 0.79 of 768, 0.70 of 4,096, 0.42 of 32,768, 0.28 of 131,072",
    "sparsity": "32,768 latents: 0.42 at k 32, 0.31 at 64, 0.23 at 128, 0.18 at 256",
    "length": "32,768 latents: 0.07 after 0.8 B tokens, 0.42 after 8 B, 0.61 after 80 B",
    "architecture": "GPT-2: Gated 0.86, ReLU 0.82, TopK 0.74 (text: over 0.9 for ReLU and Gated)",
    "mutual": "2411.01220: seeds that are trained to agree reconstruct better too, by up to 21 % (GPT-2 small)",
    "frequency": "frequent latents tend to be shared, rare ones orphans, with many exceptions (no number)",
    "interpretable": "detection score 0.72 on average; many orphans score high, shared ones higher on average",
    "law": "share in only one of m: 0.58 at 2 to 0.35 at 9; 0.589 m^-0.916 + 0.270, offset needed",
    "matching": "mean cosine of matched decoder rows 0.68, largest without matching 0.71 (32,768 latents)",
}

LIVE = " among live latents"
"""Ends the name of a share that is divided by the share of latents that fire: dead ones have no partner."""

Statistic = Callable[[list[int]], float]


# ------------------------------------------------------------------------------------------------------ over seeds


def table_of(cell: dict[str, Any], name: str) -> np.ndarray:
    """A quantity of every pair of seeds, ``[m, m]``, NaN on the diagonal."""
    m = cell["m"]
    table = np.full((m, m), math.nan)
    for (i, j), value in zip(combinations(range(m), 2), cell["pairs"][name.removesuffix(LIVE)], strict=True):
        table[i, j] = table[j, i] = value
    if name.endswith(LIVE):
        live = 1 - np.array(cell["dead_fraction"])
        table /= (live[:, None] + live[None, :]) / 2
    return table


def mean_of(cell: dict[str, Any], name: str, seeds: Sequence[int]) -> float:
    """Mean over the pairs of some seeds."""
    table = table_of(cell, name)[np.ix_(list(seeds), list(seeds))]
    return float(np.nanmean(table))


def jackknife(statistic: Statistic, m: int) -> dict[str, float | None]:
    """A statistic of seeds 0 … m-1 with the interval from leaving out one seed at a time, in all cells together."""
    every = list(range(m))
    value = statistic(every)
    if m < 3:
        return {"value": value, "low": None, "high": None, "seeds": m}
    left_out = np.array([statistic([seed for seed in every if seed != out]) for out in every])
    error = math.sqrt((m - 1) / m * float(np.square(left_out - left_out.mean()).sum()))
    half = float(student.ppf((1 + LEVEL) / 2, m - 1)) * error
    return {"value": value, "low": value - half, "high": value + half, "seeds": m}


def slope(cells: list[dict[str, Any]], x: list[float], name: str) -> dict[str, Any]:
    """Least squares slope of a quantity per doubling of x."""
    steps = np.log2(np.array(x, dtype=float))
    steps -= steps.mean()
    m = min(cell["m"] for cell in cells)
    return jackknife(lambda seeds: float(steps @ [mean_of(cell, name, seeds) for cell in cells] / (steps @ steps)), m)


def trend(cells: list[dict[str, Any]], by: str, name: str, sign: int) -> tuple[dict[str, Any], str]:
    """The slope per doubling and its verdict; ``mixed`` where a single step goes the other way, beyond its interval."""
    estimate = slope(cells, [cell[by] for cell in cells], name)
    outcome = verdict(estimate, sign)
    steps = [slope([a, b], [a[by], b[by]], name) for a, b in pairwise(cells)]
    against = {"reproduced": "refuted", "refuted": "reproduced"}.get(outcome)
    return estimate, "mixed" if any(verdict(step, sign) == against for step in steps) else outcome


def verdict(estimate: dict[str, Any] | None, sign: int, null: float = 0.0) -> str:
    """``reproduced`` where the interval lies on the claimed side of the null, ``refuted`` on the other side."""
    if estimate is None or estimate.get("low") is None or estimate.get("high") is None:
        return "undecided"
    if min((estimate["low"] - null) * sign, (estimate["high"] - null) * sign) > 0:
        return "reproduced"
    if max((estimate["low"] - null) * sign, (estimate["high"] - null) * sign) < 0:
        return "refuted"
    return "undecided"


# ------------------------------------------------------------------------------------------------------ claims


def swept(found: dict[str, Any], model: str, sweep: str, by: str) -> list[dict[str, Any]]:
    cells = [cell for cell in found["cells"] if cell["model"] == model and sweep in cell["sweeps"]]
    return sorted(cells, key=lambda cell: cell[by])


def models_of(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(cell["model"] for cell in found["cells"]))


def _done(found: dict[str, Any], stage: str) -> list[tuple[str, dict[str, Any]]]:
    """Results of a stage by model, without those that could not be."""
    return [(model, result) for model, result in found[stage].items() if "skipped" not in result]


def claims(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every claim with the paper's numbers, ours and a verdict per model."""
    listed: list[dict[str, Any]] = []

    def add(claim: str, key: str, model: str, what: str, estimate: dict[str, Any] | None, outcome: str) -> None:
        listed.append(
            {
                "claim": claim,
                "key": key,
                "paper": PAPER.get(key, ""),
                "model": model,
                "what": what,
                "estimate": estimate,
                "verdict": outcome,
            }
        )

    for model in models_of(found):
        for sweep, by, sign, claim, step in (
            ("width", "latents", -1, "overlap falls with width", "per doubling of the width"),
            ("sparsity", "k", -1, "overlap falls with k", "per doubling of k"),
            ("length", "rows", 1, "overlap rises with training", "per doubling of the rows"),
        ):
            cells = swept(found, model, sweep, by)
            if len(cells) < 2:
                continue
            shares = (
                {"shared": "", f"shared{LIVE}": f" ({LIVE.strip()})"} if "dead_fraction" in cells[0] else {"shared": ""}
            )
            for name, suffix in shares.items():
                add(f"{claim}{suffix}", sweep, model, f"{name}, {step}", *trend(cells, by, name, sign))
            add(f"{claim} (mean cosine)", sweep, model, f"cosine of matched decoder rows, {step}",
                *trend(cells, by, "cosine_decoder", sign))  # fmt: skip
        listed += _architectures(found, model)
        base = next((c for c in found["cells"] if c["model"] == model and "base" in c["sweeps"]), None)
        if base is not None and base.get("law"):
            law = base["law"]
            outcome = {"offset": "reproduced", "no offset": "refuted"}.get(law["verdict"], "undecided")
            offset = {key: law["offset"][key] for key in ("value", "low", "high")} | {"seeds": base["m"]}
            errors = (
                f"error {law['error']:.4f}, without offset {law['plain_error']:.4f}; at the last point, held out, "
                f"{law['held_out']:.4f} and {law['plain_held_out']:.4f}"
            )
            add("a power law with offset: some latents never find a partner", "law", model,
                f"offset over {base['m']} seeds; {errors}", offset, outcome)  # fmt: skip
        if base is not None:
            every = list(range(base["m"]))
            matched, largest = (mean_of(base, name, every) for name in ("cosine_decoder", "max_cosine"))
            gap = jackknife(
                lambda s, cell=base: mean_of(cell, "max_cosine", s) - mean_of(cell, "cosine_decoder", s), base["m"]
            )
            add("matching one to one costs little cosine (under 0.05)", "matching", model,
                f"largest {largest:.3f} minus matched {matched:.3f}", gap, verdict(gap, -1, 0.05))  # fmt: skip
    for model, result in _done(found, "orphans"):
        properties = {each["name"]: each for each in result["orphans"]["properties"]}
        if "frequency" in properties:
            auc = _plain(properties["frequency"]["auc"])
            add("frequent latents are more often shared", "frequency", model,
                "chance that an orphan fires more often than a shared latent", auc, verdict(auc, -1, 0.5))  # fmt: skip
        if "detection" in properties:
            each = properties["detection"]
            median = _plain(each["orphans"])
            add("many orphans are interpretable", "interpretable", model,
                "median held-out detection by tokens of orphans (chance 0.5; over 0.7 counts)", median,
                verdict(median, 1, 0.7))  # fmt: skip
            add("orphans are less interpretable than shared latents", "interpretable", model,
                "chance that an orphan's detection is the better one", _plain(each["auc"]),
                verdict(_plain(each["auc"]), -1, 0.5))  # fmt: skip
            add("… also at equal frequency", "interpretable", model,
                "the same among latents of equal frequency", _plain(each["auc_matched"]),
                verdict(_plain(each["auc_matched"]), -1, 0.5))  # fmt: skip
    return listed


def _architectures(found: dict[str, Any], model: str) -> list[dict[str, Any]]:
    cells = {cell["arch"]: cell for cell in swept(found, model, "architecture", "arch")}
    if "topk" not in cells:
        return []
    listed = []
    for arch, cell in cells.items():
        if arch == "topk":
            continue
        m = min(cell["m"], cells["topk"]["m"])
        difference = jackknife(lambda s, cell=cell: mean_of(cell, "shared", s) - mean_of(cells["topk"], "shared", s), m)
        reached, wanted = (float(np.mean(each["l0"])) for each in (cell, cells["topk"]))
        matched = abs(reached / wanted - 1) <= L0_TOLERANCE
        note = "" if matched else f"; L0 {reached:.1f} against {wanted:.1f}: not matched"
        outcome = verdict(difference, 1) if matched else "undecided"
        listed.append(
            {
                "claim": f"{arch} is more stable than topk at equal L0",
                "key": "architecture",
                "paper": PAPER["mutual" if arch == "topk+mutual" else "architecture"],
                "model": model,
                "what": f"shared, {arch} minus topk{note}",
                "estimate": difference,
                "verdict": outcome,
            }
        )
    return listed


def _plain(measured: dict[str, Any]) -> dict[str, Any]:
    return {key: measured[key] for key in ("value", "low", "high")}


# ------------------------------------------------------------------------------------------------------ the page

INTRO = """# Do seeds of one SAE find the same latents?

The claims of *Sparse Autoencoders Trained on the Same Data Learn Different Features* (2501.16615) on two small real
models. A latent is shared by two SAEs when the matchings of decoders and of encoders, each exact and found apart, give
it the same partner and both cosines exceed {threshold}. SAEs of a cell differ in their first weights only: same rows,
same order.

```bash
make study-seeds                                             # 20 minutes on two quiet cores; goes on where it stopped
python studies/seeds/run.py --out runs/seeds-quick --quick   # does everything run? under a minute
```

Intervals (95 %) are over seeds: a jackknife that leaves out one seed at a time, in all cells of a sweep together; pairs
of SAEs share SAEs and are no sample. A claim is *reproduced* where the interval lies wholly on the claimed side,
*refuted* where it lies wholly on the other side, *undecided* otherwise; a trend is *mixed* where one of its steps goes
the other way, beyond its own interval. Dead latents have no partner: *among live latents* divides by the share that
fires, which matters where many are dead. These SAEs are small and see millions of rows,
not billions: levels are not comparable with the paper's, directions are.
"""


def page(found: dict[str, Any]) -> str:
    """The README."""
    parts = [INTRO.format(threshold=found["threshold"])]
    if found["quick"]:
        parts.append("**A quick run: far too small to mean anything.**\n")
    parts.append("## Verdicts\n\n" + _verdicts(found["claims"]))
    for model in models_of(found):
        parts.append(_sweeps(found, model))
    parts += [_orphans(found), _consensus(found), _joined(found), _outside(found)]
    return "\n".join(part for part in parts if part) + "\n"


def shown(measured: dict[str, Any] | None, digits: int = 3) -> str:
    """``0.312 [0.290, 0.334]``."""
    if measured is None or measured.get("value") is None:
        return "–"
    text = f"{measured['value']:.{digits}f}"
    if measured.get("low") is None:
        return text
    return f"{text} [{measured['low']:.{digits}f}, {measured['high']:.{digits}f}]"


def _lines(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def _verdicts(listed: list[dict[str, Any]]) -> str:
    rows = [
        (each["claim"], each["paper"] or "–", each["model"], f"{shown(each['estimate'])} {each['what']}",
         f"**{each['verdict']}**")
        for each in listed
    ]  # fmt: skip
    return _lines(("claim", "the paper", "model", "here", "verdict"), rows)


def _sweeps(found: dict[str, Any], model: str) -> str:
    names = {"width": "latents", "sparsity": "k", "length": "rows", "layer": "layer", "architecture": "arch"}
    head = ("seeds", "shared", "partners equal", "its null", "cosine", "its null", "FVU", "L0", "dead", "in all seeds")
    parts = [f"## {model}\n"]
    for sweep, by in names.items():
        cells = swept(found, model, sweep, by)
        if not cells:
            continue
        one = cells[0]
        fixed = ", ".join(
            f"{name} {one[name]:,}" if isinstance(one[name], int) else f"{name} {one[name]}"
            for name in ("layer", "arch", "latents", "k", "rows", "lr")
            if name != by
        )
        rows = []
        for cell in cells:
            m = cell["m"]
            over = jackknife(lambda s, cell=cell: mean_of(cell, "shared", s), m)
            cosine = jackknife(lambda s, cell=cell: mean_of(cell, "cosine_decoder", s), m)
            equal = jackknife(lambda s, cell=cell: mean_of(cell, "equal", s), m)
            nulls = [cell[name]["value"] if cell[name] else math.nan for name in ("equal_null", "cosine_null")]
            label = f"{cell[by]:,}" if isinstance(cell[by], int) else cell[by]
            means = [float(np.mean(cell[name])) for name in ("fvu", "l0", "dead_fraction")]
            rows.append(
                (label, m, shown(over), shown(equal), f"{nulls[0]:.3f}", shown(cosine), f"{nulls[1]:.3f}",
                 f"{means[0]:.3f}", f"{means[1]:.1f}", f"{means[2]:.3f}", f"{cell['in_exactly'][-1]['value']:.3f}")
            )  # fmt: skip
        parts.append(f"By {by} ({fixed}):\n\n" + _lines((by, *head), rows))
    base = next((c for c in found["cells"] if c["model"] == model and "base" in c["sweeps"]), None)
    if base is not None:
        curve = ", ".join(f"{each['value']:.3f}" for each in base["only_in_one"])
        count = base["groups"]["count"]
        parts.append(
            f"Share in only one of 2 … {base['m']} seeds: {curve}. Concepts that exactly 1 … {base['m']} seeds have: "
            f"{', '.join(f'{n:,}' for n in count)}; of the pairs inside a concept "
            f"{base['groups']['consistency'] or 0:.1%} recognise each other, and "
            f"{base['groups']['contested']} pairs were contested.\n"
        )
        if base.get("law"):
            law = base["law"]
            parts.append(
                f"Power law: {shown(law['amplitude'])} · m^-{shown(law['exponent'])} + {shown(law['offset'])}; without "
                f"offset {shown(law['plain_amplitude'])} · m^-{shown(law['plain_exponent'])}.\n"
            )
    return "\n".join(parts)


def _orphans(found: dict[str, Any]) -> str:
    parts = []
    for model, result in _done(found, "orphans"):
        each = result["orphans"]
        rows = [
            (p["name"], p["meaning"], shown(p["orphans"]), shown(p["shared"]), shown(p["auc"]),
             "–" if p["p"] is None else f"{p['p']:.1g}", shown(p["auc_matched"]))
            for p in each["properties"]
        ]  # fmt: skip
        costs = [(s["latents"], f"{s['n_latents']:.0f}", shown(s["fvu"]), shown(s["ce"])) for s in each["silenced"]]
        spans = [
            (s["rank"], shown(s["orphans"]), shown(s["shared"]), shown(s["null"]), shown(s["rows"]))
            for s in each["spans"]
        ]
        parts.append(
            f"### {model}: {sum(each['n_orphans']):,} orphans, {sum(each['n_shared']):,} shared\n\n"
            + _lines(("", "", "orphans (median)", "shared", "AUC", "p", "AUC at equal frequency"), rows)
            + "\nWhat it costs when latents stop writing:\n\n"
            + _lines(("latents", "how many", "rise of FVU", "rise of cross-entropy, nats"), costs)
            + f"\nOrphans minus as many shared ones of equal frequency: FVU {shown(each['fvu_difference'])}, "
            f"cross-entropy {shown(each['ce_difference'])}.\n\nDo orphans of different seeds span the same subspace "
            "(mean squared cosine of principal angles)?\n\n"
            + _lines(("rank", "orphans", "shared", "random", "orphans against principal components"), spans)
        )
    return (
        "## What orphans are\n\nOn rows held out by document. *p* is the largest Mann-Whitney p of any SAE, times the "
        "number of properties.\n\n" + "\n".join(parts)
        if parts
        else ""
    )


def _consensus(found: dict[str, Any]) -> str:
    parts = []
    for model, result in _done(found, "consensus"):
        rows = []
        for arm, each in result["arms"].items():
            fvu, ce = ([float(np.mean(each[key])), float(np.std(each[key]))] for key in ("fvu", "ce_sae"))
            pooled = f"{np.mean(each['pooled']):.0f}" if each["pooled"] else "–"
            rows.append(
                (
                    arm,
                    each["n"],
                    pooled,
                    f"{fvu[0]:.4f} ± {fvu[1]:.4f}",
                    f"{ce[0]:.3f} ± {ce[1]:.3f}",
                    shown(each["shared"]),
                )
            )
        parts.append(
            f"### {model}\n\nRefitted, and parents trained longer, on {result['refit_rows']:,} further rows.\n\n"
            + _lines(("SAEs", "how many", "pooled latents", "FVU", "cross-entropy", "shared among them"), rows)
        )
    head = (
        "## Consensus SAEs\n\nSets of seeds that share no seed are pooled, filled to the width of a parent and "
        "refitted. *Shared among them* is what two consensus SAEs of different seeds share: the stability that pooling "
        "buys.\n\n"
    )
    return head + "\n".join(parts) if parts else ""


def _joined(found: dict[str, Any]) -> str:
    rows = []
    for model, result in _done(found, "joined"):
        for task in result["tasks"]:
            values = np.array([value for value in task["differences"] if math.isfinite(value)])
            n = len(values)
            mean = float(values.mean()) if n else math.nan
            half = float(student.ppf((1 + LEVEL) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)) if n > 2 else None
            estimate = {"value": mean, "low": None if half is None else mean - half,
                        "high": None if half is None else mean + half}  # fmt: skip
            word = {"reproduced": "more stable", "refuted": "less stable"}.get(
                verdict(estimate, 1), "no difference shown"
            )
            rows.append((model, task["task"], task["texts"], shown(estimate), word))
    if not rows:
        return ""
    return (
        "## Are the latents that a sparse probe selects the stable ones?\n\nMean stability of the selected latents "
        "minus that of others that are active in as many texts; interval over SAEs.\n\n"
        + _lines(("model", "task", "texts", "difference", ""), rows)
    )


def _outside(found: dict[str, Any]) -> str:
    each = found["outside"]
    if each is None or "skipped" in each:
        return ""
    m = each["m"]
    over = jackknife(lambda s: mean_of(each, "shared", s), m)
    cosine = jackknife(lambda s: mean_of(each, "cosine_decoder", s), m)
    exactly, only = (", ".join(f"{x['value']:.3f}" for x in each[name]) for name in ("in_exactly", "only_in_one"))
    means = (
        f" The means that they subtract from their rows correlate by at most {each['means_correlation']:.2f}: each "
        "belongs to a network of its own, so there is nothing to share, and nothing is found: a null that others made."
        if abs(each["means_correlation"]) < 0.5
        else ""
    )
    return (
        "## An outside case\n\n"
        f"{m} seeds of one TopK SAE that others trained ({each['d_in']} → {each['n_latents']}, k = {each['k']}): "
        f"shared {shown(over)}; partners equal {shown(each['equal'])} (null {shown(each['equal_null'])}); cosine "
        f"{shown(cosine)} (random {shown(each['cosine_null'])}); in exactly 1 … {m} seeds: {exactly}; in only "
        f"one of 2 … {m}: {only}.{means}\n"
    )
