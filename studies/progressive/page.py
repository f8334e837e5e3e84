"""README.md of the study, from results/*.json alone: every number on the page is in those files."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from saekit.files import write_bytes
from saekit.measure.metrics import METRICS
from saekit.measure.results import Measured
from saekit.measure.verdicts import Claim, Stored, family_verdicts, non_inferiority

PRUNED = "topk pruned by energy"
APART = "topk trained separately"
NESTED = "matryoshka"
DRAWN = "matryoshka, sizes drawn"
NAMES = {
    "fvu": "FVU", "ce_sae": "CE", "ce_recovered_mean": "CE recovered (from the mean row)", "rsa": "RSA", "cka": "CKA",
    "purity": "token purity", "detection": "detection AUC", "ring_purity": "purity of the ring",
    "ring_detection": "detection AUC of the ring", "description_length": "bits per row", "shared": "shared by seeds",
    "macro_f1": "probe macro-F1", "parent_cosine": "cosine to the parent", "handed_over": "handed over",
    "coactivation": "fires with the parent",
}  # fmt: skip

INTRO = """# How many latents are needed?

The claims of *Empirical Evaluation of Progressive Coding for Sparse Autoencoders* (2505.00190) on two small language
models. Made by `make study-progressive`; this page is written from `results/*.json` alone.

**Before you read on.** The paper used gemma-2-2b with 2^14 to 2^16 latents and 50 million tokens. Here two language
models of 0.26 and 2.9 million parameters, {rows} and
{sizes} show the mechanisms at a size that one core
repeats over {seeds} seeds in about half an hour: what is found here need not hold there. With {seeds} seeds small
differences are not decided. Numbers of the paper are quoted where they are known.

**Is the widest SAE trained to the end?** The pruned SAEs are cut from it: where a narrower one reconstructs better,
what is pruned is not the best that pruning can do. How wide the widest are was chosen so that few of their latents are
dead (that fired on none of the last {last_rows} rows of the training), and for time.{added}

{widest}

**How.** Vanilla TopK SAEs of every size and one Matryoshka SAE with these sizes see the same rows in the same order,
for every seed, with the defaults of saekit (since then the rates for 256 and 512 latents of the built-in model are
lower, and end lower by about 1%: `python benchmarks/rates.py --only builtin-topk-512-k16-600000`). So do others of
half and of twice the k, and a Matryoshka SAE whose sizes are drawn in every step (`sampled`: as many as there are
fixed ones, the largest always, the others log-uniform from a 64th of it up, which is below the smallest fixed one
too). The widest vanilla SAE is pruned by rankings measured on every second held-out document; everything is measured
on the others. A prefix of a TopK SAE selects its k among its own latents, so all ways have the same k at the same
size. Interpretability needs no judge: *detection* is the area under the ROC curve with which the tokens that a latent
fired on in some documents tell where it fires in others; *purity* is the largest fraction of its activation on one
token. Both measure how lexical a latent is, not what it means.

**Verdicts** follow the one rule of saekit ([concepts](../../docs/concepts.md)). Differences are paired by seed, with
95 % intervals (Student's t). At a size the first way is *better* where the whole interval lies beyond the margin
(0.01 of FVU, nats, RSA, AUC or purity) on its side, *worse* where it lies beyond it on the other, *equivalent* where
it lies within both, *undecided* otherwise; all sizes of all models of a claim are corrected together (Holm), with
every k of a claim that is made for several. The largest size, where pruning removes nothing, does not count. A claim
*holds* where it holds at every size of every model. Drawing the sizes costs nothing (*holds*) where the whole interval
of what it gains lies above the negative margin, and that is *refuted* where it lies below it; both lines of it are
corrected together, the largest size counts. A power law is claimed only where every seed fits an exponential worse and
no seed fits a log-normal or exponential better.
"""

ADDED = (
    " Four seeds were decided on\nbefore these SAEs were trained: of an earlier version's, three left many verdicts "
    "undecided."
)


def rows_seen(found: Sequence[Mapping[str, Any]]) -> str:
    """How many rows SAEs were trained on, and how often each was seen."""
    often = sorted({f"{each['plan']['tokens'] / each['distinct_rows']:.1f}" for each in found})
    seen = "each once" if often == ["1.0"] else f"each {' to '.join(often)} times"
    return f"{found[0]['plan']['tokens']:,} rows ({seen})"


def sizes_of(found: Sequence[Mapping[str, Any]]) -> str:
    """The smallest and largest number of latents of each model."""
    said = [(each["plan"]["sizes"][0], each["plan"]["sizes"][-1], each["model"]) for each in found]
    return " or ".join(f"{least} to {most:,} latents ({model})" for least, most, model in said)


def widest(found: Sequence[Mapping[str, Any]]) -> str:
    """For each k FVU of the widest vanilla SAE next to the best of the narrower, and dead latents of two."""
    lines, gaps = [], {}
    for each in found:
        full = str(each["plan"]["sizes"][-1])
        for k, dead in each["dead"].items():
            fvu = curves_at(each, int(k) / each["plan"]["k"])[APART]["fvu"]
            best = min((size for size in fvu if size != full), key=lambda size: fvu[size]["value"])
            gaps[f"{each['model']} {k}"] = paired(fvu[full], fvu[best])
            lines.append([each["model"], k, f"{shown(fvu[full])} with {full}", f"{shown(fvu[best])} with {best}",
                          *(f"{dead[way]['value']:.1%}" for way in (APART, NESTED))])  # fmt: skip
    [(_, words)] = decided([[gaps]], -1, METRICS["fvu"].margin)
    heading = ["", "k", "FVU of the widest", "of the best narrower", "dead", "dead of Matryoshka", "the widest is"]
    return table([heading, *([*line, word] for line, word in zip(lines, words))])


def curves_at(result: Mapping[str, Any], factor: float) -> Mapping[str, Any]:
    """The curves at a multiple of the model's k."""
    curves: Mapping[str, Any] = (
        result["curves"] if factor == 1 else result["levels"][str(round(result["plan"]["k"] * factor))]
    )
    return curves


def write(results: Iterable[Path], readme: Path) -> None:
    """Write the page."""
    found = [json.loads(path.read_text()) for path in results]
    said = {
        "rows": rows_seen(found),
        "sizes": sizes_of(found),
        "last_rows": f"{next(iter(found[0]['dead'].values()))['last_rows']:,}",
        "seeds": str(len(found[0]["plan"]["seeds"])),
        "widest": widest(found),
        "added": ADDED if len(found[0]["plan"]["seeds"]) > 3 else "",
    }
    intro = INTRO
    for name, text in said.items():
        intro = intro.replace(f"{{{name}}}", text)
    parts = [intro, "## Verdicts\n", claims(found), *(details(each) for each in found)]
    readme.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(readme, "\n".join(parts).encode())


def claims(found: Sequence[Mapping[str, Any]]) -> str:
    """A line per claim: the paper's number, ours for each model, and one verdict over all models."""
    lines = [["claim", "the paper", *(f"{each['model']} (d = {each['plan']['d_in']})" for each in found), "verdict"]]
    for text, where, by in (
        ("importance (energy) follows a power law", "power_laws", "energy"),
        ("… and so does the spectrum of the decoder", "spectra", "decoder covariance"),
    ):
        words, cells = zip(*(law(each, where, by) for each in found))
        lines.append([text, "yes; exponent not known", *cells, together(words)])
    for text, paper, metric, one, other in VERSUS:
        factors = FACTORS if (metric, one, other) in AT_EVERY_K else {1: ""}
        for more, (cells, words) in zip(factors.values(), versus(found, metric, one, other, tuple(factors))):
            lines.append([more or text, "" if more else paper, *cells, together(words)])
    for text, (cells, words) in zip(DRAWN_CLAIMS, drawn(found)):
        lines.append([text, "future work", *cells, together(words)])
    cells, words = rings(found)
    lines.append(["inner Matryoshka latents are the more interpretable ones",
                  "0.74 innermost to 0.57 outermost (Pearson)", *cells, together(words)])  # fmt: skip
    lines.append(["one Matryoshka costs about 1.25 times one vanilla SAE", "1.25", *(cost(each) for each in found),
                  "no interval, no verdict"])  # fmt: skip
    return table(lines)


VERSUS = [
    ("Matryoshka has a lower FVU than the pruned SAE", "yes, at every size", "fvu", NESTED, PRUNED),
    ("… a lower cross-entropy", "yes", "ce_sae", NESTED, PRUNED),
    ("… and a higher RSA", "yes", "rsa", NESTED, PRUNED),
    ("Matryoshka has a lower FVU than SAEs trained separately", "yes (2503.17547: slightly higher)", "fvu", NESTED,
     APART),
    ("pruned SAEs are more interpretable (detection)", "yes", "detection", PRUNED, NESTED),
    ("pruned SAEs are more interpretable (purity)", "yes", "purity", PRUNED, NESTED),
    ("energy beats frequency (FVU)", "yes", "fvu", PRUNED, "topk pruned by frequency"),
    ("energy beats unsorted (FVU)", "yes", "fvu", PRUNED, "topk unsorted"),
    ("frequency beats unsorted (FVU)", "yes", "fvu", "topk pruned by frequency", "topk unsorted"),
    ("attribution beats energy (CE)", "not asked", "ce_sae", "topk pruned by attribution", PRUNED),
]  # fmt: skip
"""Claim, the paper, metric, the way that is claimed to be better, the other."""
AT_EVERY_K = {("fvu", NESTED, PRUNED), ("fvu", NESTED, APART)}
FACTORS = {1: "", 0.5: "… with half the k", 2: "… with twice the k"}
"""Multiples of a model's k at which these are claimed, together."""
DRAWN_CLAIMS = ("drawing the sizes costs nothing at the fixed ones (FVU)", "… and is better in between")


def together(words: Iterable[str]) -> str:
    """One verdict over every size and model: it holds where it holds in all of them."""
    found = list(words)
    said = {
        "better": "holds", "holds": "holds", "equivalent": "no difference", "worse": "the reverse holds",
        "refuted": "refuted", "undecided": "undecided",
    }  # fmt: skip
    counts = {word: found.count(word) for word in said if word in found}
    if not counts:
        return "not measured"
    if len(counts) == 1:
        return f"**{said[next(iter(counts))]}**"
    split = (
        "holds at some, the reverse at others" if {"better", "worse"} <= set(counts)
        else "holds at some" if {"better", "holds"} & set(counts)
        else "the reverse at some" if "worse" in counts
        else "refuted at some" if "refuted" in counts
        else "undecided"
    )  # fmt: skip
    return f"**{split}**: {', '.join(f'{word} {count}' for word, count in counts.items())} of {len(found)}"


def law(result: Mapping[str, Any], where: str, by: str) -> tuple[str, str]:
    """Whether it is a power law, and exponent, R² and what the likelihood ratio tests say.

    It is one only where every seed fits an exponential worse and no seed another distribution better; it is none where
    some distribution fits better in every seed.
    """
    fit = result[where].get(by)
    if fit is None:
        return "undecided", "no fit"
    seeds = len(fit["alpha"]["by_seed"])
    rivals = [
        f"{name} fits better in {verdicts.count(name)}, worse in {verdicts.count('power law')} of {seeds}"
        for name, verdicts in fit["rivals"].items()
    ]
    is_better = [
        any(verdicts[seed] == name for name, verdicts in fit["rivals"].items()) for seed in range(seeds)
    ]  # fmt: skip
    beaten = fit["rivals"].get("exponential", []).count("power law") == seeds
    word = "worse" if all(is_better) else "better" if beaten and not any(is_better) else "undecided"
    return word, f"exponent {shown(fit['alpha'])}, R² {fit['r2']['value']:.3f}; {'; '.join(rivals)}"


def law_row(result: Mapping[str, Any], where: str, by: str) -> tuple[str, str]:
    """What the tests say, and the verdict."""
    word, text = law(result, where, by)
    return text, {"better": "yes", "worse": "no"}.get(word, "undecided")


def differences(curves: Mapping[str, Any], metric: str, one: str, other: str) -> dict[str, Stored]:
    """By size, `one` minus `other` paired by seed."""
    left, right = (curves.get(way, {}).get(metric, {}) for way in (one, other))
    return {size: paired(left[size], right[size]) for size in left if size in right}


def paired(one: Mapping[str, Any], other: Mapping[str, Any]) -> Stored:
    """`one` minus `other`, seed by seed, to be decided."""
    pairs = zip(one["by_seed"], other["by_seed"])
    return stored([a - b if a is not None and b is not None else None for a, b in pairs])


Line = tuple[list[str], list[str]]
"""Of a claim: a cell per model, and the verdict of every size of every model."""


def versus(
    found: Sequence[Mapping[str, Any]], metric: str, one: str, other: str, factors: Sequence[float] = (1,)
) -> list[Line]:
    """A line for each multiple of k; all sizes of all models and lines are one family of claims (Holm)."""
    lines = [[differences(curves_at(each, factor), metric, one, other) for each in found] for factor in factors]
    for each, by_size in ((each, by_size) for line in lines for each, by_size in zip(found, line)):
        by_size.pop(str(each["plan"]["sizes"][-1]), None)  # pruning removes nothing there
    declared = METRICS[metric]
    return decided(lines, -1 if declared.better == "lower" else 1, declared.margin)


def drawn(found: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Two lines: a nested SAE with drawn sizes and one with fixed ones, at the fixed sizes and between them."""
    gaps = [differences(each["sampled"], "fvu", DRAWN, NESTED) for each in found]
    lines = [
        [{size: own[size] for size in map(str, each["plan"][key])} for each, own in zip(found, gaps)]
        for key in ("sizes", "between")
    ]
    return decided(lines, -1, METRICS["fvu"].margin, (non_inferiority, None))


def decided(
    lines: Sequence[Sequence[Mapping[str, Stored]]], sign: int, margin: float, rules: Sequence[Any] | None = None
) -> list[Line]:
    """The verdicts of differences by size, model and line, which are claimed together; a rule per line."""
    claims = [
        Claim(gap.oriented(sign), margin, rule)
        for line, rule in zip(lines, rules or [None] * len(lines))
        for by_size in line
        for gap in by_size.values()
    ]
    words = iter(family_verdicts(claims, least=None, most=None))
    said = [[[next(words) for _ in by_size] for by_size in line] for line in lines]
    return [
        ([_at_sizes(gaps, own) for gaps, own in zip(line, words_of)], [word for own in words_of for word in own])
        for line, words_of in zip(lines, said)
    ]


def _at_sizes(gaps: Mapping[str, Stored], words: Sequence[str]) -> str:
    if not gaps:
        return "not measured"
    tally = ", ".join(f"{word} at {words.count(word)}" for word in dict.fromkeys(words))
    smallest, gap = next(iter(gaps.items()))
    return f"{tally} of {len(words)} sizes; {gap.difference:+.3f} at {smallest}"


def rings(found: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Interpretability from the innermost to the outermost ring: a cell and a verdict per model."""
    cells, gaps = [], []
    for each in found:
        by_size = each["curves"].get(NESTED, {}).get("ring_detection", {})
        if by_size:
            first, *_, last = by_size.values()
            gaps.append(paired(first, last))
        cells.append(f"{shown(first)} innermost to {shown(last)} outermost" if by_size else "not measured")
    [(_, words)] = decided([[{"": gap} for gap in gaps]], 1, METRICS["ring_detection"].margin)
    return cells, words


def cost(result: Mapping[str, Any]) -> str:
    """Ratios of seconds per step."""
    plain = result["cost"]["plain"]
    text = (
        f"{plain['matryoshka_to_one']:.2f} (plain steps; separate SAEs of all sizes: "
        f"{plain['separate_to_one']:.2f}; HierarchicalTopK: {plain['hierarchical_to_one']:.2f})"
    )
    fused = result["cost"].get("fused")
    return text if fused is None else f"{text}; {fused['matryoshka_to_one']:.2f} of the fastest vanilla step"


def details(result: Mapping[str, Any]) -> str:
    """Tables of one model."""
    plan, curves = result["plan"], result["curves"]
    sizes = [str(size) for size in plan["sizes"]]
    parts = [
        f"\n## {result['model']}\n",
        f"Residual stream after block {plan['layer']} (width {plan['d_in']}), k = {plan['k']}, {plan['tokens']:,} rows "
        f"of training in batches of {plan['batch_rows']}, {len(plan['seeds'])} seeds; measured on {result['n_rows']:,} "
        f"rows and {result['n_tokens']:,} predicted tokens (clean cross-entropy {result['ce_clean']:.3f}).\n",
    ]
    for metric, name in NAMES.items():
        rows = [
            [way, *(shown(curves[way][metric].get(size)) for size in sizes)] for way in curves if metric in curves[way]
        ]
        if rows:
            parts += [f"\n**{name}** by latents\n", table([["", *sizes], *rows])]
    for k, level in result["levels"].items():
        rows = [[way, *(shown(level[way]["fvu"].get(size)) for size in sizes)] for way in level]
        parts += [f"\n**FVU with k = {k}** by latents\n", table([["", *sizes], *rows])]
    drawn_at = sorted(result["sampled"][NESTED]["fvu"], key=int)
    many = result["many_k"]
    parts += [
        "\n**FVU of nested SAEs** with fixed sizes and with sizes drawn in every step, by latents\n",
        table([["", *drawn_at], *([way, *(shown(each["fvu"][size]) for size in drawn_at)]
                                 for way, each in result["sampled"].items())]),
        f"\n**One SAE for many k**: FVU with {many['latents']} latents\n",
        table([["k", *map(str, many["ks"])],
               *([name, *(shown(value) for value in by_k.values())] for name, by_k in many["fvu"].items())]),
        "\n**Power laws**\n",
        table([["", "energy and others", "a power law"],
               *([by, *law_row(result, where, by)] for where in ("power_laws", "spectra") for by in result[where])]),
        "\n**Seconds per training step**, medians, each kind in turn\n",
        table([["step", *result["cost"]["plain"]["seconds_per_step"]],
               *([step, *(f"{v:.4f}" for v in result["cost"][step]["seconds_per_step"].values())]
                 for step in ("plain", "fused") if step in result["cost"])]),
    ]  # fmt: skip
    return "\n".join(parts)


def interval(values: list[float]) -> dict[str, Any]:
    """Mean over seeds with the 95 % interval of Student's t."""
    kept = [value for value in values if value is not None and not math.isnan(value)]
    if len(kept) < len(values) or not kept:
        return {"value": None, "low": None, "high": None, "by_seed": values}
    mean = sum(kept) / len(kept)
    if len(kept) < 2:
        return {"value": mean, "low": None, "high": None, "by_seed": kept}
    reach = float(stdtrit(len(kept) - 1, 0.975)) * statistics.stdev(kept) / math.sqrt(len(kept))
    return {"value": mean, "low": mean - reach, "high": mean + reach, "by_seed": kept}


def stored(values: list[float]) -> Stored:
    """The mean over seeds with its interval, to be decided."""
    found = interval(values)
    value = math.nan if found["value"] is None else found["value"]
    return Stored(Measured(value, found["low"], found["high"]), max(len(values) - 1, 1))


def shown(measured: Mapping[str, Any] | None, *, sign: bool = False) -> str:
    """A value with its interval."""
    if measured is None or measured["value"] is None:
        return "–"
    form = "{:+.3f}" if sign else "{:.1f}" if abs(measured["value"]) >= 100 else "{:.3f}"
    text = form.format(measured["value"])
    if measured["low"] is None:
        return text
    return f"{text} [{form.format(measured['low'])}, {form.format(measured['high'])}]"


def table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is the heading."""
    heading, *rows = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    rule = ["---"] * len(heading)
    return "\n".join("| " + " | ".join(line) + " |" for line in (heading, rule, *rows))
