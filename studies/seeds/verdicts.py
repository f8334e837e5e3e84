"""From the numbers of the cells to verdicts on the paper's claims, and the page that states them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from scipy.stats import t as student

from saekit.comparison.concept_groups import DECIDING_SAES, offset_verdict
from saekit.measure.results import Measured
from saekit.measure.verdicts import Claim, Stored, family_verdicts, non_inferiority
from saekit.measure.verdicts import verdict as rule_of_margin

LEVEL = 0.95
MARGIN = 0.01
"""Differences of a fraction, a cosine or an AUC smaller than this count as none; of trends, per doubling."""
CHEAP = 0.05
"""What one-to-one matching may cost in cosine and still cost little."""
WORDS = {"better": "reproduced", "holds": "reproduced", "worse": "refuted", "equivalent": "no difference"}
L0_TOLERANCE = 0.1
"""How far the reached L0 of an architecture may lie from TopK's for "matched sparsity" to hold."""

PAPER = {
    "width": "Pythia-160M: 0.81 of 32 latents, 0.79 of 768, 0.70 of 4,096, 0.42 of 32,768, 0.28 of 131,072",
    "sparsity": "32,768 latents: 0.42 at k 32, 0.31 at 64, 0.23 at 128, 0.18 at 256",
    "length": "32,768 latents: 0.07 after 0.8 B tokens, 0.42 after 8 B, 0.61 after 80 B",
    "site": "MLP / residual stream: SmolLM 0.72 / 0.56, GPT-2 0.74 / 0.62, Pythia 0.55 / 0.63",
    "data": "holds over two data sets (no number)",
    "architecture": "GPT-2: Gated 0.86, ReLU 0.82, TopK 0.74 (text: over 0.9 for ReLU and Gated)",
    "mutual": "2411.01220: seeds that are trained to agree reconstruct better too, by up to 21 % (GPT-2 small)",
    "frequency": "frequent latents tend to be shared, rare ones orphans, with many exceptions (no number)",
    "interpretable": "detection score 0.72 on average; many orphans score high, shared ones higher on average",
    "law": "share in only one of m: 0.58 at 2 to 0.35 at 9; 0.589 m^-0.916 + 0.270, offset needed",
    "matching": "mean cosine of matched decoder rows 0.68, largest without matching 0.71 (32,768 latents)",
}

LIVE = " among live latents"
"""Ends the name of a share that is divided by the share of latents that fire: dead ones have no partner."""

QUANTITIES = {
    "shared": ("", "shared"),
    f"shared{LIVE}": (f" ({LIVE.strip()})", f"shared{LIVE}"),
    "cosine_decoder": (" (mean cosine)", "cosine of matched decoder rows"),
}
"""What is claimed of overlap is claimed of each of these: how the claim ends, and what it says."""

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


def difference(cell: dict[str, Any], other: dict[str, Any], name: str) -> dict[str, Any]:
    """A quantity of a cell minus that of another: seeds begin from the same weights in both where widths are equal."""
    m = min(cell["m"], other["m"])
    return jackknife(lambda seeds: mean_of(cell, name, seeds) - mean_of(other, name, seeds), m)


def trend(cells: list[dict[str, Any]], by: str, name: str, sign: int) -> tuple[dict[str, Any], bool]:
    """The slope per doubling, and whether a single step goes the other way, beyond its interval and the margin."""
    estimate = slope(cells, [cell[by] for cell in cells], name)
    steps = [slope([a, b], [a[by], b[by]], name) for a, b in pairwise(cells)]
    against = {"reproduced": "refuted", "refuted": "reproduced"}.get(verdict(estimate, sign))
    return estimate, any(verdict(step, sign) == against for step in steps)


def claim_of(estimate: dict[str, Any] | None, sign: int, null: float = 0.0) -> Stored | None:
    """The estimate minus the null, turned so that more is as claimed; None where there is none."""
    if estimate is None or estimate.get("value") is None:
        return None
    measured = Measured(estimate["value"], estimate.get("low"), estimate.get("high"))
    return Stored(measured, max((estimate.get("seeds") or 10**6) - 1, 1)).oriented(sign, null)


def verdict(estimate: dict[str, Any] | None, sign: int, null: float = 0.0) -> str:
    """The verdict of one claim by itself, by the rule of `saekit.measure.verdicts`."""
    claim = claim_of(estimate, sign, null)
    word = "undecided" if claim is None else rule_of_margin(claim.difference, MARGIN)
    return WORDS.get(word, word)


def same_size(difference: Measured, margin: float) -> str:
    """Whether there is no difference: ``holds``, ``refuted`` or ``undecided``."""
    word = rule_of_margin(difference, margin)
    return {"equivalent": "holds", "better": "refuted", "worse": "refuted"}.get(word, word)


# ------------------------------------------------------------------------------------------------------ claims


def swept(found: dict[str, Any], model: str, sweep: str, by: str) -> list[dict[str, Any]]:
    cells = [cell for cell in found["cells"] if cell["model"] == model and sweep in cell["sweeps"]]
    return sorted(cells, key=lambda cell: (isinstance(cell[by], str), cell[by]))  # MLPs after residual streams


def base_of(found: dict[str, Any], model: str) -> dict[str, Any] | None:
    return next((cell for cell in found["cells"] if cell["model"] == model and "base" in cell["sweeps"]), None)


def quantities(*cells: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The quantities that cells have: name, how a claim about it ends, and what it says."""
    live = all("dead_fraction" in cell for cell in cells)
    return [(name, *words) for name, words in QUANTITIES.items() if live or not name.endswith(LIVE)]


def models_of(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(cell["model"] for cell in found["cells"]))


def _done(found: dict[str, Any], stage: str) -> list[tuple[str, dict[str, Any]]]:
    """Results of a stage by model, without those that could not be."""
    return [(model, result) for model, result in found.get(stage, {}).items() if "skipped" not in result]


def claims(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every claim with the paper's numbers, ours and a verdict per model; all claims of the page are one family."""
    listed: list[dict[str, Any]] = []

    def add(
        claim: str, key: str, model: str, what: str, estimate: dict[str, Any] | None, sign: int = 1,
        null: float = 0.0, *, outcome: str | None = None, about: Claim | None = None,
    ) -> None:  # fmt: skip
        judged = claim_of(estimate, sign, null) if outcome is None else None
        listed.append(
            {
                "claim": claim,
                "key": key,
                "paper": PAPER.get(key, ""),
                "model": model,
                "what": what,
                "estimate": estimate,
                "verdict": outcome,
                "judged": about or (None if judged is None else Claim(judged, MARGIN)),
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
            for name, suffix, what in quantities(*cells):
                estimate, is_mixed = trend(cells, by, name, sign)
                add(f"{claim}{suffix}", sweep, model, f"{what}, {step}", estimate, sign,
                    outcome="mixed" if is_mixed else None)  # fmt: skip
        base = base_of(found, model)
        for mlp in swept(found, model, "layer", "layer"):
            if base is None or mlp["layer"] != f"{base['layer']}.mlp":
                continue
            fvu, at_residual = (float(np.mean(cell["fvu"])) for cell in (mlp, base))
            for name, suffix, what in quantities(mlp, base):
                add(f"SAEs of MLP outputs share more than those of the residual stream{suffix}", "site", model,
                    f"{what}, layer {mlp['layer']} minus {base['layer']}; FVU {fvu:.3f} and {at_residual:.3f}",
                    difference(mlp, base, name))  # fmt: skip
        for name, what, estimate, is_matched in _architectures(found, model):
            key = "mutual" if name == "topk+mutual" else "architecture"
            add(f"{name} is more stable than topk at equal L0", key, model, what, estimate,
                outcome=None if is_matched else "undecided")  # fmt: skip
        if base is not None and base.get("law"):
            law = base["law"]
            said = {"offset": "reproduced", "no offset": "refuted"}
            offset = Measured.from_json(law["offset"])
            word = offset_verdict(base["m"], offset, is_better=law["held_out"] < law["plain_held_out"])
            add("a power law with offset: some latents never find a partner", "law", model,
                f"offset over {base['m']} seeds ({DECIDING_SAES} needed); error {law['error']:.4f}, without offset "
                f"{law['plain_error']:.4f}; at the last point, held out, {law['held_out']:.4f} and "
                f"{law['plain_held_out']:.4f}", _offset(law["offset"], base["m"]),
                outcome=said.get(word, "undecided"))  # fmt: skip
        if base is not None:
            every = list(range(base["m"]))
            matched, largest = (mean_of(base, name, every) for name in ("cosine_decoder", "max_cosine"))
            gap = jackknife(
                lambda s, cell=base: mean_of(cell, "max_cosine", s) - mean_of(cell, "cosine_decoder", s), base["m"]
            )
            cheap = claim_of(gap, -1)
            add(f"matching one to one costs little cosine (under {CHEAP})", "matching", model,
                f"largest {largest:.3f} minus matched {matched:.3f}", gap,
                about=None if cheap is None else Claim(cheap, CHEAP, non_inferiority))  # fmt: skip
    for model, result in _done(found, "across"):
        base, beside = base_of(found, model), base_of(found, result["beside"])
        if base is None or beside is None:
            continue
        for name, suffix, what in quantities(base, beside):
            estimate = difference(base, beside, name)
            size = claim_of(estimate, 1)
            add(f"overlap is of the same size on other data{suffix}", "data", model,
                f"{what}, minus that of {result['beside']}", estimate,
                about=None if size is None else Claim(size, MARGIN, same_size))  # fmt: skip
        within, other, alike = (across_data(result, "shared", each) for each in ACROSS)
        seeds = result["m"] // 2
        add("SAEs of two data sets share less than seeds of one", "across", model,
            "shared, of two data sets minus the mean of within them",
            jackknife(lambda s, a=other, b=within: a(s) - b(s), seeds), -1)  # fmt: skip
        add(
            "the same first weights: SAEs of two data sets share more",
            "across",
            model,
            "shared, begun alike minus begun apart",
            jackknife(lambda s, a=alike, b=other: a(s) - b(s), seeds),
        )
    for model, result in _done(found, "orphans"):
        properties = {each["name"]: each for each in result["orphans"]["properties"]}
        seeds = len(result["orphans"]["n_orphans"])
        if "frequency" in properties:
            add("frequent latents are more often shared", "frequency", model,
                "chance that an orphan fires more often than a shared latent",
                _plain(properties["frequency"]["auc"], seeds), -1, 0.5)  # fmt: skip
        if "detection" in properties:
            each = properties["detection"]
            add("many orphans are interpretable", "interpretable", model,
                "median held-out detection by tokens of orphans (chance 0.5; over 0.7 counts)",
                _plain(each["orphans"], seeds), 1, 0.7)  # fmt: skip
            add("orphans are less interpretable than shared latents", "interpretable", model,
                "chance that an orphan's detection is the better one", _plain(each["auc"], seeds), -1, 0.5)  # fmt: skip
            add("… also at equal frequency", "interpretable", model,
                "the same among latents of equal frequency", _plain(each["auc_matched"], seeds), -1, 0.5)  # fmt: skip
    return decided(listed)


def decided(listed: list[dict[str, Any]], looks: int = 1) -> list[dict[str, Any]]:
    """Claims with their verdicts: those without one yet are decided together (Holm), over all claims and models.

    Where seeds were added to what was open, each of the looks has its part of the chance of error (Bonferroni).
    """
    open_ = [each for each in listed if each["verdict"] is None]
    level = 1 - (1 - LEVEL) / looks
    words = family_verdicts([each["judged"] for each in open_], MARGIN, level=level, least=None, most=None)
    for each, word in zip(open_, words, strict=True):
        each["verdict"] = WORDS.get(word, word) or "undecided"
    for each in listed:
        same = [other["verdict"] for other in listed if other["claim"] == each["claim"]]
        each["over_models"] = together(same)
    return [{key: value for key, value in each.items() if key != "judged"} for each in listed]


def together(verdicts: Sequence[str]) -> str:
    """One verdict over all models: theirs where they agree, else how many gave which."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return ", ".join(f"{word} in {verdicts.count(word)} of {len(verdicts)}" for word in dict.fromkeys(verdicts))


ACROSS = ("seeds of one data set", "two data sets", "two data sets, the same first weights")
"""Pairs of SAEs that a comparison across data sets has."""


def across_data(result: dict[str, Any], name: str, pairs: str) -> Statistic:
    """The mean of a quantity over such pairs, as a function of the seeds: of either data set the first half of SAEs."""
    table, m = table_of(result, name), result["m"] // 2

    def mean(seeds: list[int]) -> float:
        first, second = np.array(seeds), np.array(seeds) + m
        across = table[np.ix_(first, second)]
        if pairs == ACROSS[0]:
            return float(np.mean([np.nanmean(table[np.ix_(own, own)]) for own in (first, second)]))
        alike = np.eye(len(seeds), dtype=bool)
        return float(across[alike if pairs == ACROSS[2] else ~alike].mean())

    return mean


def _architectures(found: dict[str, Any], model: str) -> list[tuple[str, str, dict[str, Any], bool]]:
    """Name, text, difference of the shared fraction from TopK's, and whether L0 is equal, of each architecture."""
    cells = {cell["arch"]: cell for cell in swept(found, model, "architecture", "arch")}
    listed = []
    for arch, cell in cells.items():
        if arch == "topk" or "topk" not in cells:
            continue
        reached, wanted = (float(np.mean(each["l0"])) for each in (cell, cells["topk"]))
        is_matched = abs(reached / wanted - 1) <= L0_TOLERANCE
        note = "" if is_matched else f"; L0 {reached:.1f} against {wanted:.1f}: not matched"
        estimate = difference(cell, cells["topk"], "shared")
        listed.append((arch, f"shared, {arch} minus topk{note}", estimate, is_matched))
    return listed


def _plain(measured: dict[str, Any], seeds: int) -> dict[str, Any]:
    return {key: measured[key] for key in ("value", "low", "high")} | {"seeds": seeds}


def _offset(measured: dict[str, Any], seeds: int) -> dict[str, Any]:
    """The offset with its interval; a fit that rests on its bound 0 has none."""
    at_bound = measured["value"] == measured["low"] == measured["high"]
    return _plain(measured | ({"low": None, "high": None} if at_bound else {}), seeds)


# ------------------------------------------------------------------------------------------------------ the page

INTRO = """# Do seeds of one SAE find the same latents?

The claims of *Sparse Autoencoders Trained on the Same Data Learn Different Features* (2501.16615) on two small real
models. **Before you read on:** the models have 0.26 and 2.9 million parameters, the SAEs see at most a few million
rows, not billions, and many latents are dead at these budgets (column *dead*): levels are not comparable with the
paper's, directions may be. Dead latents have no partner: *among live latents* divides by the share that fires.

A latent is shared by two SAEs when the matchings of decoders and of encoders, each exact and found apart, give it the
same partner and both cosines exceed {threshold}. SAEs of a cell differ in their first weights only: same rows, same
order. All cells are trained with the defaults of the first ones (`config_of` in run.py: encoder rows begin with length
1, rows are scaled and not centred, latents are dead after a fifth of the rows). Layer L is the residual stream after
block L, counted from 0, *L.mlp* what the MLP of that block adds to it. Each model has a second data set, of text that
it was not made for; the level there and the trends over width and k are claims of their own.

**By saekit's defaults of now** the base cell of stories260K is better trained (FVU .058, .042 and .037 after 125,000,
500,000 and 2,000,000 rows, .4% dead; here .063, .047 and .039, 9 to 15% dead), and its seeds share .048 [.032, .065],
.068 [.064, .072] and .064 [.057, .071]: that overlap rises with training is found here as SAEs are trained here. The
other cells have not been made again.

```python
saes = sk.train(sk.TopK(n_latents=1024, k=16), rows, seeds=range(5), tokens=2_000_000,    # rows of layer 2, nine tenths
                settings=sk.TrainSettings(batch_rows=512))                                # of the documents; 9 seeds of
sk.compare(saes, settings=ComparisonSettings(threshold=0.7)).shared                       # 500,000
```

```bash
make study-seeds                                             # 30 minutes on two quiet cores; goes on where it stopped
python studies/seeds/run.py --keep --write                   # of it only what results.json lacks
python studies/seeds/run.py --out runs/seeds-quick --quick   # does everything run? under a minute
```

What training methods change about it, what stable latents carry, longer and shorter training, and random transformers:
[stabilizers](stabilizers.md). How well one SAE alone tells which of its latents are stable, by its self-alignment: rank
correlation -.02 [-.08, .05] of three SAEs of the built-in model ([concepts](../../docs/concepts.md)), and
[there](stabilizers.md#what-one-sae-says-of-its-stability) at other sizes.

Intervals (95 %) are over seeds: a jackknife that leaves out one seed at a time, in all cells of a sweep together;
pairs of SAEs share SAEs and are no sample. Verdicts follow the one rule of saekit
([concepts](../../docs/concepts.md)): a claim is *reproduced* where the whole interval lies beyond the margin (0.01 of
a fraction, a cosine or an AUC; of trends, per doubling) on the claimed side, *refuted* where it lies beyond it on the
other side, *no difference* where it lies within both, *undecided* otherwise; all claims of the page are corrected
together (Holm). "Costs little" is a claim of non-inferiority; "of the same size" is reproduced where the interval lies
within the margin, refuted where it lies beyond it on either side. A trend is *mixed* where one of its steps goes the
other way, beyond its own interval and the margin. An offset is decided from {deciding} seeds on: a curve of nine
points shows a bound, not a value. *All models and data* has a verdict where they agree.
"""


def page(found: dict[str, Any]) -> str:
    """The README."""
    parts = [INTRO.format(threshold=found["threshold"], deciding=DECIDING_SAES)]
    if found["quick"]:
        parts.append("**A quick run: far too small to mean anything.**\n")
    parts.append("## Verdicts\n\n" + _verdicts(found["claims"]))
    for model in models_of(found):
        parts.append(_sweeps(found, model))
    parts += [_across(found), _orphans(found), _consensus(found), _joined(found), _outside(found)]
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
         f"**{each['verdict']}**", each["over_models"])
        for each in listed
    ]  # fmt: skip
    return _lines(("claim", "the paper", "model", "here", "verdict", "all models and data"), rows)


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
    base = base_of(found, model)
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


def _across(found: dict[str, Any]) -> str:
    rows = []
    for model, result in _done(found, "across"):
        nulls = {"equal": result["equal_null"], "cosine_decoder": result["cosine_null"]}
        for name, words in {"shared": "shared", "equal": "partners equal", "cosine_decoder": "cosine"}.items():
            means = [jackknife(across_data(result, name, pairs), result["m"] // 2) for pairs in ACROSS]
            null = nulls.get(name)
            rows.append(
                (result["beside"], model, words, *map(shown, means), "–" if null is None else f"{null['value']:.3f}")
            )
    if not rows:
        return ""
    return (
        "## SAEs of two data sets\n\nIn one model: do those of one data set find the latents that those of the other "
        "find? SAEs of one seed begin from the same weights, whatever they are trained on; seeds of one data set never "
        "do.\n\n" + _lines(("SAEs of", "and of", "", *ACROSS, "its null"), rows)
    )


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
                        "high": None if half is None else mean + half, "seeds": n}  # fmt: skip
            word = {"reproduced": "more stable", "refuted": "less stable"}.get(
                verdict(estimate, 1), verdict(estimate, 1)
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
