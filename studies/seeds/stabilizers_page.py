"""From the numbers of the cells to verdicts on what is claimed of stabilizers, and the page that states them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from verdicts import LEVEL, decided, jackknife, mean_of, shown

from saekit.comparison.intervals import over_saes
from saekit.measure.intervals import student
from saekit.measure.results import Measured
from saekit.measure.verdicts import Claim, Stored

MARGIN = 0.01
LOOKS = 3
"""Times that verdicts were looked at before seeds were added."""
REACHED = 0.8
"""PW-MCC of 2505.20254."""
L2 = "2603.04198: three seeds share more (TopK, Pythia-70M; neither number nor weight in the abstract)"

PAPER = {
    "L2 .01": L2,
    "L2 .03": L2,
    "aligned": "2605.18629: seeds are markedly more stable (no number known)",
    "OrtSAE .25": "2509.22033: fewer absorbed and composed latents; seeds are not reported",
    "AbsTopK": "2605.31245: PW-MCC .813 → .873 (Pythia-160M, 4,096 latents, k 40)",
    "iSAE .1": "2605.31245: PW-MCC .813 → .858; below AbsTopK's .873",
    "mutual .1, together": "2411.01220: seeds that are trained to agree",
    "mutual .1, apart": "2411.01220: seeds that are trained to agree; here with others than those compared",
    "consensus start": "ours",
    "k annealed from 48": "2410.20526 anneals k; seeds are not reported",
    "subspace 1/2": "2508.16929: fewer dead latents; seeds are not reported",
    "soft-frozen decoder": "2602.14111: a control, which cannot share",
    "frozen decoder": "2602.14111: a control, which cannot share",
}
"""Methods that are said to steady latents, or that might, with what is published of them."""
CONTROLS = ("soft-frozen decoder", "frozen decoder")
WIDTHS = ("TopK, 64 latents", "TopK, 96 latents", "TopK", "TopK, 192 latents")
BUDGETS = (
    "TopK, 1/16 of the rows", "TopK, 1/4 of the rows", "TopK", "TopK, 4 times the rows", "TopK, 16 times the rows",
)  # fmt: skip
RAISES = {
    "shared": "What seeds share, at equal L0",
    "equal FVU": "What seeds share, at equal L0 and equal FVU",
    "pw_mcc": "PW-MCC, at equal L0",
    "recovered": "Function, at equal L0: FVU recovered by partners",
}
"""What a method may raise, by the key of the claim: the heading of its table."""

SCORES = {
    "detection": "detection: AUC of labels",
    "lexical": "lexical: AUC of tokens",
    "context": "context: AUC of the tokens around",
    "embedding": "embedding: AUC of likeness of windows",
    "embedding_masked": "embedding without the token",
    "intruder": "intruder: found among windows",
    "cohesion": "cohesion: cosine of windows",
    "purity": "purity: largest part on one token",
    "entropy": "entropy of tokens, nats",
}
"""Scores of explanations, as `saekit explain` names them, in words."""

Cell = dict[str, Any]
Estimate = dict[str, Any]


def cells_of(found: dict[str, Any], place: str) -> dict[str, Cell]:
    return {cell["method"]: cell for cell in found["cells"] if cell["place"] == place}


def _places(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(cell["place"] for cell in found["cells"]))


def _is_random(place: str) -> bool:
    return place.endswith("random weights")


def _models(found: dict[str, Any]) -> list[str]:
    """Places with rows of a model; those of random weights after the others."""
    return sorted((place for place in _places(found) if place != "synthetic"), key=_is_random)


def at_equal_fvu(cells: dict[str, Cell], name: str, fvu: float, seeds: Sequence[int]) -> float:
    """A quantity of TopK SAEs of such a width that their FVU is this one, between the widths on both sides of it.

    NaN where no two widths lie on both sides. A width of fewer seeds than these gives those it has.
    """
    points = []
    for cell in (cells[width] for width in WIDTHS if width in cells):
        mine = [seed for seed in seeds if seed < cell["m"]]
        points.append((float(np.mean(np.array(cell["fvu"])[mine])), mean_of(cell, name, mine)))
    points.sort()
    return float(np.interp(fvu, *zip(*points, strict=True), left=np.nan, right=np.nan))


# ---------------------------------------------------------------------------------------------------- the claims


class Claims:
    """Claims that are collected: what is claimed, of which place, and the estimate that decides."""

    def __init__(self) -> None:
        self.listed: list[dict[str, Any]] = []

    def add(self, key: str, claim: str, place: str, estimate: Estimate, *, what: str = "", says: str = "more") -> None:
        """Add a claim, unless there is no estimate: that the estimate is ``more`` than 0, or that it is ``none``."""
        if not np.isfinite(estimate["value"]):
            return
        measured = Measured(estimate["value"], estimate["low"], estimate["high"])
        judged = Stored(measured, max(estimate["seeds"] - 1, 1))
        self.listed.append({"key": key, "claim": claim, "model": place, "what": what, "estimate": estimate,
                            "says": says, "verdict": None, "judged": Claim(judged, MARGIN)})  # fmt: skip

    def decided(self) -> list[dict[str, Any]]:
        """Return the claims with verdicts: those of one key are a family, of trained and of random models apart."""
        families: dict[tuple[str, bool], list[dict[str, Any]]] = {}
        for each in self.listed:
            families.setdefault((each["key"], _is_random(each["model"])), []).append(each)
        found = [each for family in families.values() for each in decided(family, LOOKS)]
        for each in found:
            if each["says"] == "none":
                words = {"reproduced": "refuted", "no difference": "reproduced"}
                each["verdict"] = words.get(each["verdict"], each["verdict"])
            del each["over_models"]
        return found


def claims(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every claim with our estimate and a verdict per model; the claims of one table are one family."""
    listed = Claims()
    for place in _models(found):
        cells = cells_of(found, place)
        for method in PAPER:
            of_method(listed, cells, place, method)
        if "iSAE .1" in cells and "AbsTopK" in cells:
            _beside(listed, cells, place, "iSAE .1", "AbsTopK")
        if _is_random(place):
            continue
        for method in ("TopK", "L2 .01"):
            _of_stable(listed, cells, place, method)
        _of_budgets(listed, cells, place)
        _of_starts(listed, cells, place)
        _of_random(listed, found, place)
    return listed.decided()


def of_method(listed: Claims, cells: dict[str, Cell], place: str, method: str) -> None:
    """Does a method raise what is shared, against TopK of as many latents, and of equal FVU?"""
    if method not in cells or "TopK" not in cells:
        return
    _beside(listed, cells, place, method, "TopK")
    if len([width for width in WIDTHS if width in cells]) > 1:
        cell = cells[method]
        m = min(cell["m"], cells["TopK"]["m"])

        def gap(seeds: Sequence[int]) -> float:
            fvu = float(np.mean(np.array(cell["fvu"])[list(seeds)]))
            return mean_of(cell, "shared", seeds) - at_equal_fvu(cells, "shared", fvu, seeds)

        listed.add("equal FVU", method, place, jackknife(gap, m))


def _beside(listed: Claims, cells: dict[str, Cell], place: str, method: str, base: str) -> None:
    """Compare a method with its base, at equal L0."""
    cell, other = cells[method], cells[base]
    name = method if base == "TopK" else f"{method}, compared with {base}"
    for key in ("shared", "pw_mcc", "recovered"):
        difference = jackknife(lambda s, k=key: mean_of(cell, k, s) - mean_of(other, k, s), min(cell["m"], other["m"]))
        listed.add(key, name, place, difference)


def _of_stable(listed: Claims, cells: dict[str, Cell], place: str, method: str) -> None:
    """Do stable latents carry most, and more than their number and their firings would?"""
    if method not in cells:
        return
    cell = cells[method]
    parts = np.array([each["stable"] / (each["stable"] + each["others"]) for each in cell["without"]])
    number, firings = np.array(cell["stable"]), np.array([each["firings"] for each in cell["without"]])
    words = f"{method}: stable latents carry"
    for claim, least, what in (
        ("most of the reconstruction", 0.5, "half"),
        ("more of it than their fraction of the latents", number, f"their fraction of the latents {number.mean():.2f}"),
        (
            "more of it than their fraction of the firings",
            firings,
            f"their fraction of the firings {firings.mean():.2f}",
        ),
    ):
        listed.add("stable", f"{words} {claim}", place, _over(parts - least), what=f"{parts.mean():.2f} minus {what}:")
    for claim, suffix in (("most of the classification", ""), ("more of that than equally many others", "_few")):
        one, other = (np.array([each[f"{kind}{suffix}"] for each in cell["probe"]]) for kind in ("stable", "others"))
        what = f"macro-F1 {one.mean():.3f} minus {other.mean():.3f}:"
        listed.add("stable", f"{words} {claim}", place, _over(one - other), what=what)


def _of_budgets(listed: Claims, cells: dict[str, Cell], place: str) -> None:
    """Are decoders those of chance at a short budget, and is .80 reached at the longest?"""
    known = [cells[budget] for budget in BUDGETS if budget in cells]
    if not known:
        return
    first, last = known[0], known[-1]
    null = first["pw_mcc_null"]["value"]
    listed.add("budgets", f"after {_rows(first):,} rows decoders match chance (PW-MCC)", place,
               jackknife(lambda s: mean_of(first, "pw_mcc", s) - null, first["m"]), says="none",
               what=f"{mean_of(first, 'pw_mcc', range(first['m'])):.3f} minus {null:.3f}:")  # fmt: skip
    shared = jackknife(lambda s: mean_of(first, "shared", s) - first["shared_null"]["value"], first["m"])
    listed.add("budgets", f"after {_rows(first):,} rows no more is shared than by chance", place, shared, says="none")
    if "frozen decoder" in cells:
        frozen = cells["frozen decoder"]
        m = min(first["m"], frozen["m"])
        gap = jackknife(lambda s: mean_of(first, "pw_mcc", s) - mean_of(frozen, "pw_mcc", s), m)
        listed.add("budgets", f"after {_rows(first):,} rows they match random ones of the rows' covariance", place,
                   gap, says="none", what=f"minus {mean_of(frozen, 'pw_mcc', range(frozen['m'])):.3f}:")  # fmt: skip
    listed.add("reached", f"after {_rows(last):,} rows a PW-MCC of .80 is reached", place,
               jackknife(lambda s: mean_of(last, "pw_mcc", s) - REACHED, last["m"]),
               what=f"{mean_of(last, 'pw_mcc', range(last['m'])):.3f} minus .80:")  # fmt: skip


def _of_starts(listed: Claims, cells: dict[str, Cell], place: str) -> None:
    """Does one start make SAEs share, which orders of the rows tell apart?"""
    other = cells.get("other starts and orders")
    for name in ("one start, other orders", "one start, soft-frozen, other orders"):
        if name in cells and other is not None:
            m = min(cells[name]["m"], other["m"])
            gap = jackknife(lambda s, n=name: mean_of(cells[n], "shared", s) - mean_of(other, "shared", s), m)
            means = [mean_of(each, "shared", range(each["m"])) for each in (cells[name], other)]
            listed.add("starts", f"{name}: more is shared than of other starts and orders", place, gap,
                       what="{:.3f} minus {:.3f}:".format(*means))  # fmt: skip


def _of_random(listed: Claims, found: dict[str, Any], place: str) -> None:
    """Which scores, and which signs of stability, tell the trained model from that of random weights?"""
    twin = f"{place}, random weights"
    mine, other = cells_of(found, place).get("TopK"), cells_of(found, twin).get("TopK")
    if mine is None or other is None:
        return
    one, two = (found["explained"].get(name, {}) for name in (place, twin))
    for score, words in [each for each in SCORES.items() if each[0] in one and each[0] in two]:
        values = np.array(one[score]), np.array(two[score])
        what = f"{values[0].mean():.3f} minus {values[1].mean():.3f}:"
        listed.add("random", f"no difference in {words}", place, _over(values[0] - values[1]), what=what, says="none")
    m = min(mine["m"], other["m"])
    for name, words in (("shared", "shared between seeds"), ("pw_mcc", "PW-MCC"), ("recovered", "function")):
        gap = jackknife(lambda s, n=name: mean_of(mine, n, s) - mean_of(other, n, s), m)
        what = f"{mean_of(mine, name, range(m)):.3f} minus {mean_of(other, name, range(m)):.3f}:"
        listed.add("random, seeds", f"{words}: more of the trained model", place, gap, what=what)


def _over(values: Sequence[float] | np.ndarray) -> Estimate:
    measured = over_saes(list(values))
    return {"value": measured.value, "low": measured.low, "high": measured.high, "seeds": len(values)}


def _rows(cell: Cell) -> int:
    return int(cell["along"][-1]["rows"])


# ------------------------------------------------------------------------------------------------------ the page

INTRO = """# Training methods that are said to steady latents

**Before you read on:** SAEs of {latents} latents on layer {layer} of two models with 0.26 and 2.9 million parameters,
no weight tuned but L2's two; what seeds share still rises at this length ([the curve](#budgets)), so levels are not
comparable with papers, differences may be. Where a verdict holds for the random weights as well, the method steadies
SAEs, whatever the model learned. FVU is of documents that no SAE saw.

```bash
make study-seeds                                                     # this and the other page of the folder
python studies/seeds/stabilizers.py --out runs/stabilizers --write   # these cells: {minutes} minutes of one core
python studies/seeds/stabilizers.py --keep --write                   # of them only those that stabilizers.json lacks
```

*Random weights*: the same architecture with Gaussian weights of the same mean and deviation, embeddings kept
(2501.17727); rows are centred and scaled alike for both. SAEs of a cell see the same rows in the same order, L0 equal
by k, with `encoder_length=1` (but for aligned) and the rates of `studies/earlier.py`.
Intervals (95 %) are over seeds: a jackknife in both cells together; a seed begins with the same weights in all of
them. Cells were made on more than one processor: rounding alone can take a seed to other latents, at random for each
SAE, which is part of these intervals. *At equal FVU* compares with TopK of 64 to 192 latents, between the two widths
whose FVU lies on both sides: what another width would share at that error; – where none does. Where five or eight
seeds left a claim open, some cells got more, up to three times, and so did TopK: the level of all verdicts is that of
three looks (Bonferroni). With a method of fewer seeds TopK's first ones are compared. *Function*: FVU when codes are
decoded with the partners' decoder rows, from 0 (permuted partners) to 1 (their own). *Stable*: latents that at least
half of the other seeds have. Latents with signed codes are turned so that their mean code is positive. Probe:
macro-F1 of a ridge classifier of 1,500 SLURP texts by their largest codes. *Mutual, together*: the seeds compared
were trained in one call and pull each other; *apart*: each with one other SAE that is not compared. *Consensus
start*: a third of the rows for each of two parents, the last third from what these agree on.

Verdicts follow the one rule ([concepts](../../docs/concepts.md)), margin .01; all claims of a table are corrected
together (Holm), those of random weights apart. *Reproduced*: the whole interval lies beyond the margin on the claimed
side; *refuted*: on the other side; *no difference*: within it. Where the claim is one of no difference, within
the margin is *reproduced* and beyond it *refuted*.
"""


UNDECIDED = """## What is undecided, and what it would take

The effects that are compatible with what was seen (the interval at the level at which the table is decided), the seeds
that there were, and how many would decide if the effect were the one seen: for *reproduced* or *refuted* the interval
must leave the margin, for *no difference* lie within it; an effect as large as the margin is never decided. Where the
upper end is below the margin, a method does not raise what is shared, whatever else it does."""

MOST_SEEDS = 1000
"""More seeds than these are told as more."""

CLAIMED_BY = {
    "stable": "2606.12138: stable ones carry most (no number in the abstract)",
    "budgets": "glN1qCfwdz: at short budgets within 1.5 % of chance",
    "reached": "2505.20254: .80 (Pythia-160M, 16,384 latents, 500M tokens, 3 seeds)",
    "starts": "2606.02061: one start explains what archetypal SAEs share",
    "random": "2501.17727: scores do not tell random transformers apart",
    "random, seeds": "ours",
}
"""Who claims what is not of one method, by the key of the claim."""

SECTIONS = {
    "stable": """## Do stable latents carry most?

2606.12138: they carry most of what matters for reconstruction and prediction. *Carry*: their part of the rise of FVU
when either kind is silenced. Where most latents are stable, "most" says little: hence their fraction of the latents and
of the firings, and as many others.""",
    "budgets": """## Budgets

Runs of their own, each with its whole schedule. glN1qCfwdz: at short budgets reconstruction looks converged while
decoders stay within 1.5 % of chance. 2505.20254: PW-MCC .80 (TopK, Pythia-160M, 16,384 latents, 500M tokens, 3
seeds). FVU of each budget is below: where it still falls, reconstruction had not converged.""",
    "reached": "",
    "starts": """## Shared starts

2606.02061: what archetypal SAEs are said to share comes of one start for all runs, not of the method.""",
    "random": """## Which scores tell a random transformer apart?

2501.17727: scores of interpretability do not (the smallest model, Pythia-70M, apart: .63 against .49). Means over
latents of explanations of TopK SAEs (`saekit explain`), minus those of random weights; a score that differs in either
direction refutes the claim.""",
    "random, seeds": "And seeds (ours):",
}
"""What stands above the tables of claims that are not of one method, by their key."""


def page(found: dict[str, Any]) -> str:
    """The page."""
    seconds = sum(sum(cell["seconds"].values()) for cell in found["cells"])
    listed = found["claims"]
    parts = [INTRO.format(**found["settings"], minutes=max(round(seconds / 60), 1)), "## In short", _short(listed)]
    parts += ["## What methods raise, minus TopK"]
    for key, heading in RAISES.items():
        parts += [f"**{heading}.**", _claimed(listed, key)]
    parts += [UNDECIDED, *(_undecided(listed, key) for key in ("shared", "equal FVU"))]
    parts += ["## What they cost", _costs(found)]
    for key, words in SECTIONS.items():
        parts += [words, _claimed(listed, key), _curve(found) if key == "reached" else ""]
    parts += ["## What one SAE says of its stability", _predictors(found), "## Levels"]
    for place in _places(found):
        parts += [f"### {place[0].upper()}{place[1:]}", _about(found, place), _table(found, place)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _claimed(listed: Sequence[dict[str, Any]], key: str) -> str:
    """A table of the claims of one key: a row per claim, a column per model."""
    mine = [each for each in listed if each["key"] == key]
    places = sorted(dict.fromkeys(each["model"] for each in mine), key=_is_random)
    at = {(each["claim"], each["model"]): each for each in mine}
    rows = []
    for claim in dict.fromkeys(each["claim"] for each in mine):
        cells = [at.get((claim, place)) for place in places]
        rows.append([claim, *("–" if each is None else _judged(each) for each in cells)])
    return _lines(["", *places], rows) if rows else ""


def _undecided(listed: Sequence[dict[str, Any]], key: str) -> str:
    """What the undecided claims of one key would take: a row per method, a column per model."""
    mine = [each for each in listed if each["key"] == key]
    places = sorted(dict.fromkeys(each["model"] for each in mine), key=_is_random)
    cells = {}
    for each in mine:
        if each["verdict"] == "undecided":
            family = [other for other in mine if _is_random(other["model"]) == _is_random(each["model"])]
            n_open = sum(other["verdict"] == "undecided" for other in family)
            cells[each["claim"], each["model"]] = _needed(each["estimate"], n_open)
    claims = dict.fromkeys(each["claim"] for each in mine)
    rows = [[claim, *(cells.get((claim, place), "–") for place in places)] for claim in claims]
    rows = [row for row in rows if set(row[1:]) != {"–"}]
    return f"**{RAISES[key]}.**\n\n" + _lines(["", *places], rows) if rows else ""


def _needed(estimate: Estimate, n_open: int) -> str:
    """The compatible effects, the seeds that there were, and those that would decide one of `n_open` claims."""
    seeds, level = estimate["seeds"], 1 - (1 - LEVEL) / LOOKS / n_open
    stored = Stored(Measured(estimate["value"], estimate["low"], estimate["high"]), seeds - 1)
    found = stored.measured(level=level)
    error = (found.high - found.low) / 2 / student(seeds - 1, level)
    wanted = abs(abs(found.value) - MARGIN)
    would = (n for n in range(seeds, MOST_SEEDS + 1) if student(n - 1, level) * error * np.sqrt(seeds / n) < wanted)
    needed = next(would, None)
    return f"{found.low:.3f} to {found.high:.3f}; {seeds} seeds; {f'over {MOST_SEEDS:,}' if needed is None else needed}"


def _judged(each: dict[str, Any]) -> str:
    return f"{each['what']} {shown(each['estimate'])} **{each['verdict']}**".strip()


def _short(listed: Sequence[dict[str, Any]]) -> str:
    """All claims in nothing but verdicts, and the papers' words: a row per method, then a row per other claim."""
    rows = []
    for method, paper in PAPER.items():
        cells = [
            _words(listed, key, method, is_random) for is_random in (False, True) for key in ("shared", "equal FVU")
        ]
        if any(cell != "–" for cell in cells):
            rows.append([f"{method} raises what seeds share", *cells, paper])
    head = ("claim", "at equal L0", "and equal FVU", "at equal L0, random weights", "and equal FVU", "paper")
    others = [each for each in listed if each["key"] in CLAIMED_BY and not each["claim"].startswith("L2")]
    claims = dict.fromkeys((each["key"], each["claim"]) for each in others)
    more = [[claim, _words(listed, key, claim, False), CLAIMED_BY[key]] for key, claim in claims]
    return _lines(head, rows) + "\n\n" + _lines(("claim", "here", "paper"), more)


def _words(listed: Sequence[dict[str, Any]], key: str, claim: str, is_random: bool) -> str:
    mine = [
        each for each in listed if (each["key"], each["claim"], _is_random(each["model"])) == (key, claim, is_random)
    ]
    words = [each["verdict"] for each in mine]
    if len(set(words)) == 1:
        return f"**{words[0]}**" + (" in both" if len(words) == 2 else f" ({mine[0]['model'].partition(',')[0]})")
    return "; ".join(f"{each['model'].partition(',')[0]}: **{each['verdict']}**" for each in mine) or "–"


def _costs(found: dict[str, Any]) -> str:
    """What methods cost, minus TopK of the same seeds."""
    parts = []
    for place in _models(found):
        cells = cells_of(found, place)
        rows = []
        for method in PAPER:
            if method not in cells or "TopK" not in cells:
                continue
            cell, base = cells[method], cells["TopK"]
            m = min(cell["m"], base["m"])
            f1 = [[each["all"] for each in one["probe"][:m]] for one in (cell, base)]
            rows.append([method, shown(_over(np.subtract(cell["fvu"][:m], base["fvu"][:m]))),
                         f"{np.mean(cell['dead']):.3f}", f"{np.mean(cell['collapsed']):.3f}",
                         shown(_over(np.subtract(*f1)))])  # fmt: skip
        parts.append(f"**{place}**\n\n" + _lines(("", "FVU", "dead", "encoder shorter than .01", "probe F1"), rows))
    cells = cells_of(found, "synthetic")
    if "TopK" in cells:
        rows = []
        for method, cell in cells.items():
            m = min(cell["m"], cells["TopK"]["m"])
            gaps = [_gap(cell, cells["TopK"], name, m) for name in ("absorbed", "f1", "mcc")]
            rows.append([method, _truth(cell, "absorbed"), *gaps])
        text = (
            "**Absorption**, known on synthetic rows alone: how much more often the match of a parent is silent where "
            "a child fires.\n\n"
        )
        parts.append(text + _lines(("", "absorbed", "minus TopK's", "F1, minus TopK's", "MCC, minus TopK's"), rows))
    return "\n\n".join(parts)


def _gap(cell: Cell, base: Cell, name: str, m: int) -> str:
    if cell is base:
        return "–"
    values = np.subtract(*(np.array(each["truth"][name][:m], float) for each in (cell, base)))
    return shown(_over(values)) if np.isfinite(values).all() else "–"


def _curve(found: dict[str, Any]) -> str:
    rows = []
    for place in _models(found):
        cells = cells_of(found, place)
        for budget in [each for each in BUDGETS if each in cells] if not _is_random(place) else []:
            cell = cells[budget]
            every = [
                jackknife(lambda s, n=n, c=cell: mean_of(c, n, s), cell["m"]) for n in ("shared", "pw_mcc", "recovered")
            ]
            rows.append([place, f"{_rows(cell):,}", str(cell["m"]), shown(_over(cell["fvu"])), *map(shown, every),
                         f"{cell['pw_mcc_null']['value']:.3f}"])  # fmt: skip
    return _lines(("", "rows", "seeds", "FVU", "shared", "PW-MCC", "function", "PW-MCC by chance"), rows)


def _predictors(found: dict[str, Any]) -> str:
    rows = []
    for place in _places(found):
        cell = cells_of(found, place).get("TopK")
        if cell is not None and cell.get("predictors"):
            rows.append(
                [
                    place,
                    *(shown(cell["predictors"].get(name)) for name in ("alignment_self", "encoder_norm", "frequency")),
                ]
            )
    text = (
        "Rank correlation over latents of TopK SAEs with the part of the other seeds that have the latent, mean over "
        "SAEs. *Self-alignment*: cosine of a latent's encoder and decoder row. At 512 latents and three seeds of the "
        "built-in model it is -.02 [-.08, .05], frequency .005 [-.03, .04] ([concepts](../../docs/concepts.md)): "
        "measure it where it is used."
    )
    return text + "\n\n" + _lines(("", "self-alignment", "encoder norm", "frequency"), rows)


def _about(found: dict[str, Any], place: str) -> str:
    about = found["places"][place]
    null = next((c["shared_null"]["value"] for c in cells_of(found, place).values() if c.get("shared_null")), None)
    chance = "" if null is None else f" Chance of shared: {null:.3f}."
    text = f"{about['rows']:,} rows where nothing else is said, k {about['k']}.{chance}"
    if place == "synthetic":
        text += (
            " Rows of a known dictionary with hierarchy, correlation and unequal sizes. Published order of F1 at "
            "16,384 features (2602.14687): Matryoshka first (.88), a probe .97."
        )
    return text


def _table(found: dict[str, Any], place: str) -> str:
    cells = cells_of(found, place)
    synthetic = place == "synthetic"
    last = ["F1", "ceiling", "MCC", "recovered features"] if synthetic else ["probe F1", "stable", "others"]
    head = [
        "",
        "seeds",
        "FVU",
        "shared",
        "a quarter, half, all",
        "PW-MCC",
        "function",
        "fire together",
        "dead",
        "L0",
        *last,
    ]
    rows = []
    for method, cell in cells.items():
        every = {name: jackknife(lambda s, n=name, c=cell: mean_of(c, n, s), cell["m"]) for name in cell["pairs"]}
        along = ", ".join(f"{point['shared']:.2f}" for point in cell.get("along", [])) or "–"
        row = [method, str(cell["m"]), shown(_over(cell["fvu"])), shown(every["shared"]), along, shown(every["pw_mcc"])]
        row += [shown(every["recovered"]), shown(every["coactivation"]), f"{np.mean(cell['dead']):.3f}"]
        row += [f"{np.mean(cell['l0']):.1f}"]
        if synthetic:
            row += [_truth(cell, name) for name in ("f1", "f1_ceiling", "mcc", "recovered")]
        else:
            row += [f"{np.mean([each[key] for each in cell['probe']]):.3f}" for key in ("all", "stable", "others")]
        rows.append(row)
    return _lines(head, rows)


def _truth(cell: Cell, name: str) -> str:
    values = [value for value in cell["truth"].get(name, []) if value is not None and np.isfinite(value)]
    return shown(_over(values)) if values else "–"
