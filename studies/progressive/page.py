"""README.md of the study, from results/*.json alone: every number on the page is in those files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saekit.files import write_bytes

PRUNED = "topk pruned by energy"
APART = "topk trained separately"
NESTED = "matryoshka"
LOWER = {"fvu", "ce_sae", "description_length"}
NAMES = {
    "fvu": "FVU", "ce_sae": "CE", "ce_recovered_zero": "CE recovered", "rsa": "RSA", "cka": "CKA",
    "purity": "token purity", "detection": "detection AUC", "ring_purity": "purity of the ring",
    "ring_detection": "detection AUC of the ring", "description_length": "bits per row", "shared": "shared by seeds",
    "macro_f1": "probe macro-F1", "parent_cosine": "cosine to the parent", "handed_over": "handed over",
    "coactivation": "fires with the parent",
}  # fmt: skip

INTRO = """# How many latents are needed?

The claims of *Empirical Evaluation of Progressive Coding for Sparse Autoencoders* (2505.00190) on two small language
models. Made by `make study-progressive`; this page is written from `results/*.json` alone.

The paper used gemma-2-2b with 2^14 to 2^16 latents and 50 million tokens; a few hundred thousand rows and 256 to 4,096
latents show the same mechanisms at a size that two cores can repeat over seeds, and need not show the same numbers.
Numbers of the paper are quoted where they are known.

**How.** Vanilla TopK SAEs of every size and one Matryoshka SAE with these sizes see the same rows in the same order,
for every seed. The widest vanilla SAE is pruned by rankings measured on every second held-out document; everything is
measured on the others. A prefix of a TopK SAE selects its k among its own latents, so all ways have the same k at the
same size. Intervals: 95 %, Student's t over seeds; differences are paired by seed. A claim *holds* at a size where the
interval of the difference lies on its side of 0, is *contrary* where it lies on the other side, and *undecided*
otherwise. Interpretability needs no judge: *detection* is the area under the ROC curve with which the tokens that a
latent fired on in some documents tell where it fires in others; *purity* is the largest share of its activation on one
token. Both measure how lexical a latent is, not what it means.
"""


def write(results: Iterable[Path], readme: Path) -> None:
    """Write the page."""
    found = [json.loads(path.read_text()) for path in results]
    parts = [INTRO, "## Verdicts\n", claims(found), *(details(each) for each in found)]
    readme.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(readme, "\n".join(parts).encode())


def claims(found: Sequence[Mapping[str, Any]]) -> str:
    """A line per claim: the paper's number, ours for each model, the verdict."""
    lines = [
        ["claim", "the paper", *(f"{each['model']} (d = {each['plan']['d_in']})" for each in found)],
        ["importance (energy) follows a power law", "yes; exponent not known",
         *(law(each, "power_laws", "energy") for each in found)],
        ["… and so does the spectrum of the decoder", "yes; exponent not known",
         *(law(each, "spectra", "decoder covariance") for each in found)],
    ]  # fmt: skip
    versus = [
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
    for text, paper, metric, one, other in versus:
        lines.append([text, paper, *(verdict(each, metric, one, other) for each in found)])
    lines.append(["inner Matryoshka latents are the more interpretable ones",
                  "0.74 innermost to 0.57 outermost (Pearson)", *(rings(each) for each in found)])  # fmt: skip
    lines.append(["one Matryoshka costs about 1.25 times one vanilla SAE", "1.25", *(cost(each) for each in found)])
    return table(lines)


def law(result: Mapping[str, Any], where: str, by: str) -> str:
    """Exponent, R² and what the likelihood ratio tests say."""
    fit = result[where].get(by)
    if fit is None:
        return "no fit"
    seeds = len(fit["alpha"]["by_seed"])
    rivals = [
        f"{name} fits better in {verdicts.count(name)}, worse in {verdicts.count('power law')} of {seeds}"
        for name, verdicts in fit["rivals"].items()
    ]
    better = any(verdicts.count(name) == seeds for name, verdicts in fit["rivals"].items())
    word = "**no**" if better else "**not refuted**"
    return f"{word}: exponent {shown(fit['alpha'])}, R² {fit['r2']['value']:.3f}; {'; '.join(rivals)}"


def differences(result: Mapping[str, Any], metric: str, one: str, other: str) -> dict[str, dict[str, Any]]:
    """By size, `one` minus `other` paired by seed; sizes where both are the same SAE are left out."""
    from run import interval

    curves = result["curves"]
    left, right = (curves.get(way, {}).get(metric, {}) for way in (one, other))
    both = [size for size in left if size in right]
    full = str(result["plan"]["sizes"][-1])
    if one.startswith("topk") and other.startswith("topk"):  # the whole SAE, in another order
        both = [size for size in both if size != full]
    found = {}
    for size in both:
        pairs = zip(left[size]["by_seed"], right[size]["by_seed"])
        found[size] = interval([a - b if a is not None and b is not None else None for a, b in pairs])
    return found


def verdict(result: Mapping[str, Any], metric: str, one: str, other: str) -> str:
    """At how many sizes `one` is better than `other`, and by how much."""
    sign = -1 if metric in LOWER else 1
    full = str(result["plan"]["sizes"][-1])
    found = {size: each for size, each in differences(result, metric, one, other).items() if size != full}
    counts = {"holds": 0, "contrary": 0, "undecided": 0}
    for each in found.values():
        if each["low"] is None or each["low"] <= 0 <= each["high"]:
            counts["undecided"] += 1
        else:
            counts["holds" if sign * each["value"] > 0 else "contrary"] += 1
    if not found:
        return "not measured"
    total = len(found)
    word = (
        "holds" if counts["holds"] == total
        else "contrary" if counts["contrary"] == total
        else "mostly holds" if counts["holds"] > total / 2 and not counts["contrary"]
        else "mixed" if counts["holds"] and counts["contrary"]
        else "undecided" if counts["undecided"] > total / 2
        else "mostly contrary" if counts["contrary"] > counts["holds"]
        else "mostly holds"
    )  # fmt: skip
    tally = ", ".join(f"{name} at {count}" for name, count in counts.items() if count)
    smallest = next(iter(found))
    return f"**{word}** ({tally} of {total} sizes below the largest); {shown(found[smallest], sign=True)} at {smallest}"


def rings(result: Mapping[str, Any]) -> str:
    """Interpretability from the innermost to the outermost ring."""
    by_size = result["curves"].get(NESTED, {}).get("ring_detection", {})
    if not by_size:
        return "not measured"
    from run import interval

    first, *_, last = by_size.values()
    gap = interval([b - a for a, b in zip(first["by_seed"], last["by_seed"])])
    word = "undecided" if gap["low"] is None or gap["low"] <= 0 <= gap["high"] else "yes" if gap["value"] < 0 else "no"
    return f"**{word}**: detection {shown(first)} innermost to {shown(last)} outermost"


def cost(result: Mapping[str, Any]) -> str:
    """Ratios of seconds per step."""
    plain = result["cost"]["plain"]
    text = (
        f"**{plain['matryoshka_to_one']:.2f}** (plain steps; separate SAEs of all sizes: "
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
    many = result["many_k"]
    parts += [
        f"\n**One SAE for many k**: FVU with {many['latents']} latents, one seed\n",
        table([["k", *map(str, many["ks"])], *([n, *(f"{v:.3f}" for v in vs)] for n, vs in many["fvu"].items())]),
        "\n**Power laws**\n",
        table([["", "energy and others"], *([by, law(result, "power_laws", by)] for by in result["power_laws"]),
               *([by, law(result, "spectra", by)] for by in result["spectra"])]),
        "\n**Seconds per training step**, medians, each kind in turn\n",
        table([["step", *result["cost"]["plain"]["seconds_per_step"]],
               *([step, *(f"{v:.4f}" for v in result["cost"][step]["seconds_per_step"].values())]
                 for step in ("plain", "fused") if step in result["cost"])]),
    ]  # fmt: skip
    return "\n".join(parts)


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
