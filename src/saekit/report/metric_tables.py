"""Measured metrics in tables: headings, their order, rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .parts import Cell, measured_cell

HEADINGS = {
    "fvu": "FVU",
    "l0": "L0",
    "dead_fraction": "dead",
    "dense_fraction": "dense",
    "ce_clean": "CE clean",
    "ce_sae": "CE with SAE",
    "ce_zero": "CE zeroed",
    "ce_mean": "CE mean",
    "ce_recovered_zero": "recovered (zero)",
    "ce_recovered_mean": "recovered (mean)",
    "kl": "KL",
    "rsa": "RSA",
    "cka": "CKA",
    "cka_codes": "CKA of codes",
}
MAIN_METRICS = ("fvu", "l0", "dead_fraction", "cosine", "ce_sae", "ce_recovered_mean", "ce_recovered_zero", "kl")


def heading(name: str) -> str:
    """Return the name of a metric as a heading.

    >>> heading("fvu"), heading("max_cosine")
    ('FVU', 'max cosine')
    """
    return HEADINGS.get(name, name.replace("_", " "))


def metric_row(name: str, metrics: Mapping[str, object], names: Sequence[str]) -> list[Cell]:
    """Return a row: a name, then the metrics called `names`, empty where there is none."""
    return [Cell(name), *(measured_cell(metrics.get(each), where=f"{name}.{each}") for each in names)]
