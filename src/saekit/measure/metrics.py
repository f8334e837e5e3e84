"""The table of metrics: what each is called, its unit, which way is better, and its formula.

A formula never changes under a name: a new formula gets a new name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """The declaration of a metric.

    Parameters
    ----------
    name
        Lower snake case; the key in results.
    unit
        Of the value.
    better
        ``"lower"``, ``"higher"``, or ``"neither"`` where it depends on the purpose.
    formula
        In plain text: ``x`` a row, ``xh`` its reconstruction, ``f`` its codes. Sums run over all rows before any
        division.
    since
        The release in which the formula got this name.
    """

    name: str
    unit: str
    better: Literal["lower", "higher", "neither"]
    formula: str
    since: str = "0.1"


_DECLARED = (
    Metric(
        "fvu",
        "fraction",
        "lower",
        "sum ||x - xh||^2 / sum ||x - mean(x)||^2: 0 is perfect, 1 is as good as predicting the mean row",
    ),
    Metric("l0", "latents per row", "lower", "mean count of f != 0"),
    Metric(
        "dead_fraction",
        "fraction",
        "lower",
        "share of latents with f = 0 on every row seen; its interval is a document jackknife",
    ),
    Metric("dense_fraction", "fraction", "lower", "share of latents with f != 0 on more than 10 % of the rows seen"),
    Metric("cosine", "cosine", "higher", "mean of x . xh / (||x|| ||xh||), 0 where either is 0"),
    Metric("l2_ratio", "ratio", "neither", "sum ||xh|| / sum ||x||: below 1 is shrinkage"),
    Metric(
        "relative_reconstruction_bias",
        "ratio",
        "neither",
        "sum ||xh||^2 / sum x . xh: 1 is unbiased, below 1 is shrinkage",
    ),
    Metric("mse", "squared activation units", "lower", "mean over rows of ||x - xh||^2, summed over dimensions"),
    Metric(
        "ev_legacy",
        "fraction",
        "higher",
        "mean over rows of 1 - ||x - xh||^2 / ||x - m||^2 with m the mean row: an older formula, not 1 - fvu",
    ),
    Metric(
        "decoder_redundancy", "cosine", "lower", "mean over latents of the largest cosine with any other decoder row"
    ),
    Metric(
        "encoder_redundancy", "cosine", "lower", "mean over latents of the largest cosine with any other encoder row"
    ),
    Metric(
        "redundancy_null",
        "cosine",
        "neither",
        "expected largest cosine with any other row in a random dictionary of the same shape",
    ),
    Metric("ce_clean", "nats per token", "lower", "next-token cross-entropy of the untouched language model"),
    Metric("ce_sae", "nats per token", "lower", "next-token cross-entropy with xh in place of x"),
    Metric("ce_zero", "nats per token", "neither", "next-token cross-entropy with 0 in place of x"),
    Metric("ce_mean", "nats per token", "neither", "next-token cross-entropy with mean(x) in place of x"),
    Metric("ce_recovered_zero", "fraction", "higher", "(ce_zero - ce_sae) / (ce_zero - ce_clean)"),
    Metric("ce_recovered_mean", "fraction", "higher", "(ce_mean - ce_sae) / (ce_mean - ce_clean)"),
    Metric("kl", "nats per token", "lower", "mean over tokens of sum_v p_clean (log p_clean - log p_sae)"),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _DECLARED}
"""Every metric by name, in the order in which tables show them."""
