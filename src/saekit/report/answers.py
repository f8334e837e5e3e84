"""The first screen: what was measured, and a verdict with its number, interval and baseline for each question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..measure.intervals import no_intervals
from ..measure.metrics import METRICS
from ..measure.results import Measured
from ..measure.verdicts import detectable, resolution, verdict
from ..sizes.largest import enough
from ..sizes.result import not_decided
from .charts import intervals
from .marks import Chart
from .metric_tables import heading
from .numbers import Quantity, capital, has_interval, number, parts_of, told
from .svg import svg

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """A verdict card."""

    question: str
    asks: str
    """The question in a sentence."""
    word: str
    """The verdict."""
    tone: str
    """``yes``, ``no``, ``open`` (undecided), ``partly`` or ``none`` (not asked)."""
    value: str = ""
    """The number, as large text."""
    unit: str = ""
    """What the number is, and its interval."""
    sentence: str = ""
    """The number compared with its baseline."""
    chart: Chart | None = None
    """Both on one axis."""
    how: str = ""
    """How it is known: rows, intervals."""
    more: str = ""
    """What to do where it is undecided or was not asked."""
    group: str = ""
    """The part of the page with the details."""

    def drawn(self) -> str:
        """Return number and baseline on one axis as SVG text; empty where there is nothing to draw."""
        return "" if self.chart is None or self.chart.is_empty else svg(self.chart, 330, in_page=True)


def answers(results: Sequence[Result]) -> list[Answer]:
    """Return the cards of the three questions."""
    return [_useful(results), _real(results), _how_many(results)]


def _first(results: Sequence[Result], *kinds: str) -> Result | None:
    return next((each for kind in kinds for each in results if each["kind"] == kind), None)


def _others(results: Sequence[Result], *kinds: str) -> str:
    count = sum(each["kind"] in kinds for each in results) - 1
    return f" {count} more {'result' if count == 1 else 'results'} below." if count > 0 else ""


# ------------------------------------------------------------------------------------------------------------ useful

_USEFUL = {"better": ("yes", "yes"), "worse": ("no", "no"), "undecided": ("undecided", "open")}
_ASKS_USEFUL = "Do the latents classify better than hidden states and words?"


def _useful(results: Sequence[Result]) -> Answer:
    result, moved = _first(results, "classification"), _first(results, "transfer")
    if result is not None:
        return _classified(result, _others(results, "classification", "transfer"))
    if moved is not None:
        return _transferred(moved)
    more = "Labelled texts answer it: `saekit classify --model M --sae SAE --data FILE --label COLUMN --out DIR`"
    return Answer("Useful?", _ASKS_USEFUL, "not asked", "none", more=more)


def _classified(result: Result, others: str) -> Answer:
    settings, data = result["settings"], result["data"]
    margin, n = settings["margin"], data["n_test"]
    metric, unit, gap_name = ("macro_f1", "macro-F1", "difference")
    if settings.get("metric") == "auc":
        metric, unit, gap_name = ("auc", "AUC", "auc_difference")
    sae, base, base_name = _compared(result)
    if sae is None or base is None or not sae["verdict"]:
        more = "This classification has no SAE, or no baseline to compare it with."
        return Answer("Useful?", _ASKS_USEFUL, "not asked", "none", more=more)
    word, tone = _USEFUL.get(sae["verdict"], (f"no difference that matters (within {margin:g})", "partly"))
    gap, own, other = sae[gap_name], sae[metric], base[metric]
    value, interval = parts_of(gap, "+.3f")
    what = "images" if data.get("image") else "texts"
    more = {
        "undecided": _more_texts(gap, margin, n, unit),
        "worse": "Use the SAE to look, not to classify.",
    }.get(sae["verdict"], "")
    return Answer(
        question="Useful?",
        asks=_ASKS_USEFUL,
        word=word,
        tone=tone,
        value=value,
        unit=f"{unit}, difference from {base_name}{_within(interval, settings)}",
        sentence=f"On {n:,} held-out {what}: {unit} {parts_of(own, '.3f')[0]} with the SAE’s latents, "
        f"{parts_of(other, '.3f')[0]} with {base_name}.",
        chart=intervals([("SAE", own, False), (base_name, other, True)], x=unit, from_zero=False),
        how=f"Task: {result['name']}. {data['n_train']:,} training and {n:,} test {what}; representation, probe and "
        f"penalty are chosen within the training {what}, for the baselines alike; less than {margin:g} {unit} counts "
        f"as none.{others}",
        more=more,
        group="useful",
    )


def _compared(result: Result) -> tuple[Any, Any, str]:
    """Return the SAE's strongest family and the baseline it is compared with; in older files, arms."""
    families = {each["name"]: each for each in result.get("families") or ()}
    sae = next((each for each in families.values() if each["role"] == "sae"), None)
    if sae is not None and sae["baseline"] in families:
        return sae, families[sae["baseline"]], _called(sae["baseline"])
    arms = {arm["name"]: arm for arm in result["arms"]}
    return arms.get(result["best_sae"]), arms.get(result["best_dense"]), "hidden states"


def _called(family: str) -> str:
    return {"dense": "hidden states", "TF-IDF": "words (TF-IDF)", "PCA": "PCA of hidden states"}.get(family, family)


def _within(interval: str, settings: Mapping[str, Any]) -> str:
    level = (settings.get("intervals") or settings).get("level", 0.95)
    return f"; {level:.0%} interval {interval}" if interval else "; no interval"


def _more_texts(gap: Quantity, margin: float, n: int, unit: str) -> str:
    if gap["value"] is None:
        return "The difference is not defined: test on texts of every class."
    half = resolution(Measured(gap["value"], gap.get("low"), gap.get("high")))
    if math.isnan(half) or not margin:
        return "The difference has no interval: test on more texts."
    wanted = max(0.02, 2 * margin)
    needed = n * (detectable(half) / (wanted - margin)) ** 2
    return (
        f"With as many texts, a true difference of {detectable(half, margin):.2g} {unit} is found 4 times in 5; one of "
        f"{wanted:g} takes about {_round(needed):,} test texts."
    )


def _round(count: float) -> int:
    """Return a count with two digits."""
    step = 10 ** max(0, math.floor(math.log10(max(count, 1))) - 1)
    return int(math.ceil(count / step) * step)


def _transferred(result: Result) -> Answer:
    arms = [arm for arm in result["arms"] if arm["family"] == "sae" and arm.get("verdict")]
    if not arms:
        return Answer("Useful?", _ASKS_USEFUL, "not asked", "none", more="This transfer has no SAE to compare.")
    better, same, worse = (sum(arm["verdict"] == word for arm in arms) for word in ("better", "equivalent", "worse"))
    word, tone, more = "undecided", "open", "Test on more texts of each value."
    if better:
        word, tone, more = "yes", "yes", ""
    elif same:
        word, tone, more = "no difference that matters", "partly", ""
    elif worse == len(arms):
        word, tone, more = "no", "no", ""
    return Answer(
        question="Useful?",
        asks=_ASKS_USEFUL,
        word=word,
        tone=tone,
        value=f"{better} of {len(arms)}",
        unit="classifiers on latents that are better than those on hidden states",
        sentence=f"{worse} are worse, {same} as good within {result['settings']['margin']:g}, the others undecided.",
        how=f"Across `{result['across']}`; verdicts are corrected for the number of classifiers (Holm).",
        more=more,
        group="useful",
    )


# -------------------------------------------------------------------------------------------------------------- real

_ASKS_REAL = "Would another random seed have found the same latents?"
_CHANCE = 0.01
"""Fractions of latents that differ by less count as equal."""


def _real(results: Sequence[Result]) -> Answer:
    result = _first(results, "comparison")
    if result is None:
        more = "Train a second seed and compare: `saekit train … --seeds 0,1 --out RUN`, `saekit compare RUN --out DIR`"
        return Answer("Real?", _ASKS_REAL, "not asked", "none", more=more)
    shared, null, settings = result["shared"], result.get("shared_null"), result["settings"]
    word, tone = _stability(shared, null)
    value, interval = parts_of(shared, ".1%")
    chance = "" if null is None else f" Random dictionaries of the same shape: {told(null, '.1%')}."
    bars = [("another seed", shared, False), *([("random", null, True)] if null is not None else [])]
    return Answer(
        question="Real?",
        asks=_ASKS_REAL,
        word=word,
        tone=tone,
        value=value,
        unit=f"of latents return in another seed{_within(interval, settings)}",
        sentence=f"{value} of the latents of one SAE are found in another, from other random weights.{chance}",
        chart=intervals(bars, x="fraction of latents"),
        how=f"{len(result['saes'])} SAEs; found: decoder and encoder, matched independently, agree on the partner and "
        f"both cosines are above {number(settings['threshold'])}. Intervals: {settings['intervals']['over']}."
        f"{_others(results, 'comparison')}",
        more=_more_seeds(result),
        group="real",
    )


def _more_seeds(result: Result) -> str:
    told_of = [each.get("code") for each in result.get("warnings") or () if isinstance(each, Mapping)]
    more = []
    if "undertrained" in told_of:
        more.append("The SAEs still improved when training ended: train longer before you conclude.")
    if len(result["saes"]) < 3:
        more.append("Two seeds leave the spread between seeds unknown: three or more give an interval over seeds.")
    return " ".join(more)


def _stability(shared: Quantity, null: Quantity | None) -> tuple[str, str]:
    """Return a verdict from the interval: above chance or not, then which part of the latents."""
    chance = {"value": 0.0, "low": 0.0, "high": 0.0} if null is None else null
    if not has_interval(shared) or not has_interval(chance):
        return "undecided", "open"
    gap = Measured(shared["value"] - chance["value"], shared["low"] - chance["high"], shared["high"] - chance["low"])
    said = verdict(gap, _CHANCE)
    if said != "better":
        return ("undecided", "open") if said == "undecided" else ("no more than chance", "no")
    if shared["low"] > 0.5:
        return "mostly", "yes"
    return ("a minority", "partly") if shared["high"] < 0.5 else ("about half", "partly")


# ---------------------------------------------------------------------------------------------------------- how many

_ASKS_MANY = "How few of the latents keep what all of them give?"


def _how_many(results: Sequence[Result]) -> Answer:
    result = _first(results, "size_curve", "progressive")
    points = [] if result is None else _points(result)
    if result is None or len(points) < 2:
        more = "Measure sizes: `saekit prune SAE --by energy --sizes 64,256 --model M --data D --out DIR`"
        return Answer("How many?", _ASKS_MANY, "not asked", "none", more=more)
    metric = next((name for name in ("ce_sae", "fvu") if all(has_interval(p.get(name, {})) for _, p in points)), "fvu")
    sizes = {size: metrics[metric] for size, metrics in points if metric in metrics}
    n, title, margin = max(sizes), heading(metric), METRICS[metric].margin
    words, gaps, paired = _compared_sizes(result, metric, sizes)
    why = no_intervals(gaps.values() if gaps else sizes.values())
    word, tone, chosen = ("undecided", "open", min(words)) if why else _enough(words, n)
    (text, interval), shown = parts_of(sizes[chosen]), [*sizes][-4:]
    value, unit = f"{chosen:,} of {n:,}", f"latents: {title} {text}{_within(interval, result['settings'])}"
    if tone != "yes" and chosen in gaps:
        gap, ends = parts_of(gaps[chosen])
        value = gap if gap.startswith("−") else f"+{gap}"
        unit = f"{title}, {chosen:,} latents minus all {n:,}{_within(ends, result['settings'])}"
    return Answer(
        question="How many?",
        asks=_ASKS_MANY,
        word=word,
        tone=tone,
        value=value,
        unit=unit,
        sentence=f"With {chosen:,} latents {title} is {text}, with all {n:,} it is {parts_of(sizes[n])[0]}"
        f"{_by(gaps.get(chosen))}.",
        chart=intervals(
            [(f"{size:,}", sizes[size], size != chosen) for size in shown], x=f"{title}, by latents", from_zero=False
        ),
        how=f"{_measured_on(result)}; a size is enough where {title} lies within {margin:g} of that of the whole SAE, "
        f"by the interval of {paired}.{_others(results, 'size_curve', 'progressive')}",
        more=_more_rows(why) if tone == "open" else "",
        group="many",
    )


def _more_rows(why_none: str) -> str:
    """Return what would decide which size is enough."""
    if not why_none:
        return "This sample cannot narrow it: measure on more rows."
    told = not_decided(why_none)
    return f"{capital(told)}."


def _compared_sizes(
    result: Result, metric: str, sizes: Mapping[int, Quantity]
) -> tuple[dict[int, str], dict[int, Quantity], str]:
    """Return by size below the largest its verdict and its difference from that, and what the interval is of."""
    found = {size: point.get("from_largest") or {} for size, point in _size_points(result) if size in sizes}
    words = {size: each.get("verdicts", {}).get(metric) for size, each in found.items() if size != max(sizes)}
    if all(words.values()):
        gaps = {size: found[size]["differences"][metric] for size in words}
        return {size: str(word) for size, word in words.items()}, gaps, "the paired difference"
    sign = -1 if METRICS[metric].better == "lower" else 1
    said = {size: verdict(_against(sizes[size], sizes[max(sizes)], sign), METRICS[metric].margin) for size in words}
    return said, {}, "the difference as far as both intervals allow (measure again for the paired one)"


def _by(gap: Quantity | None) -> str:
    return "" if gap is None or gap["value"] is None else f"; the difference is {told(gap)}"


def _enough(words: Mapping[int, str], n: int) -> tuple[str, str, int]:
    """Return the verdict, its tone, and the size that it is about."""
    first, last = enough(words, n)
    if first == last:
        return (f"all {n:,}", "no", max(words)) if first == n else (f"{first:,} of {n:,}", "yes", first)
    return f"between {first:,} and {last:,}", "open", first


def _measured_on(result: Result) -> str:
    name = result["sae"]["name"] if result["kind"] == "size_curve" else result["curves"][0]["name"]
    return f"{name}, measured on {result['n_rows']:,} rows"


def _points(result: Result) -> list[tuple[int, Mapping[str, Quantity]]]:
    """Return size and metrics of each point of the curve that the answer is about."""
    return [(size, point.get("metrics", point)) for size, point in _size_points(result)]


def _size_points(result: Result) -> list[tuple[int, Mapping[str, Any]]]:
    """Return the points of the only curve, or of the first way."""
    if result["kind"] == "size_curve":
        return [(point["size"], point) for point in result["points"]]
    first = result["curves"][0]["name"] if result["curves"] else None
    return [(point["size"], point) for point in result["curves"] if point["name"] == first]


def _against(part: Quantity, whole: Quantity, sign: int) -> Measured:
    """Return part minus whole, turned so that more is better, with the widest interval that both allow."""
    if not (has_interval(part) and has_interval(whole)):
        return Measured(math.nan)
    ends = sorted((sign * (part["low"] - whole["high"]), sign * (part["high"] - whole["low"])))
    return Measured(sign * (part["value"] - whole["value"]), *ends)


# ---------------------------------------------------------------------------------------------------------- sentence


def sentence(results: Sequence[Result], date: str = "") -> str:
    """Say which SAEs of which model were measured on which data, and when."""
    saes = {each["digest"]: each for result in results for each in _saes_of(result) if each.get("digest")}
    known = [each.get("provenance") or {} for each in saes.values()]
    text = " ".join(filter(None, (_counted(list(saes.values())), _placed(known)))) + _trained(known)
    measured = _first(results, "evaluation", "size_curve", "progressive")
    if measured is not None:
        own, split = measured["rows"].get("data"), measured["rows"].get("data_split")
        where = f" of {_spoken([str(own)], 'corpus')}" if own else ""
        part = "held-out rows" if split == "heldout" else f"rows of the split {split}" if split else "rows"
        text += f"{' and' if ', trained' in text else ','} measured on {measured['n_rows']:,} {part}{where}"
    return f"{text}; {date}." if date else f"{text}."


def _counted(saes: Sequence[Mapping[str, Any]]) -> str:
    widths = sorted({each["n_latents"] for each in saes if each.get("n_latents")})
    words = ("Results", "One SAE", "Two SAEs", "Three SAEs", "Four SAEs", "Five SAEs")
    count = words[len(saes)] if len(saes) < len(words) else f"{len(saes)} SAEs"
    return f"{count} of {' and '.join(f'{width:,}' for width in widths[:3])} latents" if widths else count


def _placed(known: Sequence[Mapping[str, Any]]) -> str:
    layers = list(dict.fromkeys(_layer(each) for each in known if each.get("hook")))
    models = list(dict.fromkeys(str(each["model"]) for each in known if each.get("model")))
    parts = [f"on {' and '.join(layers[:3])}" if layers else "", f"of {_spoken(models[:2], 'model')}" if models else ""]
    return " ".join(filter(None, parts))


def _trained(known: Sequence[Mapping[str, Any]]) -> str:
    rows = sorted({each["rows_seen"] for each in known if each.get("rows_seen")})
    data = list(dict.fromkeys(str(each["data"]) for each in known if each.get("data")))
    own = f" of {_spoken(data[:2], 'corpus')}" if data else ""
    return f", trained on {number(rows[-1])} rows{own}" if rows else ""


def _layer(known: Mapping[str, Any]) -> str:
    """Return where an SAE belongs: the residual stream after a block by its number, other modules by path."""
    layer = known.get("layer")
    return f"layer {layer}" if isinstance(layer, int) and known["hook"] == f"layers.{layer}" else str(known["hook"])


def _spoken(names: Sequence[str], what: str) -> str:
    return " and ".join(f"the built-in {what}" if name == "builtin" else name for name in names)


def _saes_of(result: Result) -> list[Mapping[str, Any]]:
    if result["kind"] in ("evaluation", "comparison"):
        return [each["sae"] for each in result["entries" if result["kind"] == "evaluation" else "saes"]]
    found = result.get("saes") or ([result["sae"]] if isinstance(result.get("sae"), Mapping) else [])
    return [each for each in found if isinstance(each, Mapping)]
