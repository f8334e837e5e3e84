"""The table of metrics: what each is called, its unit, which way is better, and its formula.

A formula never changes under a name: a new formula gets a new name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import FormatError, did_you_mean
from .results import Measured
from .settings import MARGIN
from .tables import html_table


@dataclass(frozen=True)
class Metric:
    """The declaration of a metric.

    Parameters
    ----------
    name
        Lower snake case; the key in results.
    unit
        Unit of the value.
    better
        ``"lower"``, ``"higher"``, or ``"neither"`` where it depends on the purpose.
    formula
        In plain text: ``x`` a row, ``xh`` its reconstruction, ``f`` its codes. Sums run over all rows before any
        division.
    since
        The release in which the formula got this name.
    least, most
        Ends of its range, where it has them; intervals are cut there.
    """

    name: str
    unit: str
    better: Literal["lower", "higher", "neither"]
    formula: str
    since: str = "0.1"
    least: float | None = None
    most: float | None = None
    margin: float = MARGIN
    """Differences smaller than this count as none, in verdicts."""


_FVU = "sum ||x - xh||^2 / sum ||x - mean(x)||^2: 0 is perfect, 1 is as good as predicting the mean row"
_LEGACY = "mean over rows of 1 - ||x - xh||^2 / ||x - m||^2 with m the mean row: an older formula, not 1 - fvu"
_DEAD = "fraction of latents with f = 0 on every row seen; its interval is a jackknife over documents"
_REDUNDANCY = "mean over latents of the largest cosine (absolute where codes have signs) with any other row of the"
_NULL = "expected largest cosine with any other row in a random dictionary of the same shape"
_RSA = "Spearman correlation, over pairs of a sample of rows, of 1 - Pearson(x_i, x_j) and 1 - Pearson(xh_i, xh_j)"
_CKA = "linear CKA, each HSIC in its unbiased form, over a sample of rows, of x and"
_MEAN = "mean over latents that fire"
_LENGTH = "sum_f H_b(p_f) + p_f H(hist_f), p_f the fraction of rows with f != 0, activations in 8 levels per octave"
_DETECTION = f"{_MEAN} of the area under the ROC curve: rows ordered by how often it fired on their token elsewhere"
_PARENT = "mean over latents that are new at this size of the largest cosine of their decoder row with an older one"
_COACTIVATION = "fraction of the firings of new latents on rows where the parent fires at the size before"
_HANDED_OVER = "fraction of those on which the parent no longer fires at this size: splitting and absorption"
_SHARED = "fraction of latents whose partner in decoder and encoder matching is the same, both cosines above 0.7"
_PROJECTION = (
    "upper quartile, over rows and latents, of (x - mean(x)) . d / (||d|| r), d a decoder row, r the root mean square "
    "of ||x - mean(x)||: of SAEs of one width, on the same rows, it is lowest near the right L0 (after 2508.16560)"
)
_CE = "next-token cross-entropy"
_TOKEN = "nats per token"
_SPARED = "; tokens that are no rows (BOS) stay as they are"

_DECLARED = (
    Metric("fvu", "fraction", "lower", _FVU, least=0),
    Metric("l0", "latents per row", "lower", "mean count of f != 0", least=0),
    Metric("dead_fraction", "fraction", "lower", _DEAD, least=0, most=1),
    Metric(
        "dense_fraction",
        "fraction",
        "lower",
        "fraction of latents with f != 0 on more than 10 % of rows",
        least=0,
        most=1,
    ),
    Metric("cosine", "cosine", "higher", "mean of x . xh / (||x|| ||xh||), 0 where either is 0", least=-1, most=1),
    Metric("l2_ratio", "ratio", "neither", "sum ||xh|| / sum ||x||: below 1 is shrinkage", least=0),
    Metric("relative_reconstruction_bias", "ratio", "neither", "sum ||xh||^2 / sum x . xh: 1 is unbiased"),
    Metric(
        "mse", "squared activation units", "lower", "mean over rows of ||x - xh||^2, summed over dimensions", least=0
    ),
    Metric("ev_legacy", "fraction", "higher", _LEGACY, most=1),
    Metric("decoder_redundancy", "cosine", "lower", f"{_REDUNDANCY} decoder", least=-1, most=1),
    Metric("encoder_redundancy", "cosine", "lower", f"{_REDUNDANCY} encoder", least=-1, most=1),
    Metric("redundancy_null", "cosine", "neither", _NULL, least=-1, most=1),
    Metric("decoder_projection", "row lengths", "neither", _PROJECTION),
    Metric("rsa", "correlation", "higher", _RSA, least=-1, most=1),
    Metric("cka", "fraction", "higher", f"{_CKA} xh", most=1),
    Metric("cka_codes", "fraction", "higher", f"{_CKA} f", most=1),
    Metric("description_length", "bits per row", "lower", _LENGTH, least=0, margin=1.0),
    Metric("purity", "fraction", "higher", f"{_MEAN} of max_t p(t), p(t) = sum f [token = t] / sum f", least=0, most=1),
    Metric("purity_chance", "fraction", "neither", "the same if firings fell on tokens at random", least=0, most=1),
    Metric("detection", "AUC", "higher", _DETECTION, least=0, most=1),
    Metric("ring_purity", "fraction", "higher", "purity of the latents that are new at this size", least=0, most=1),
    Metric("ring_detection", "AUC", "higher", "detection of the latents that are new at this size", least=0, most=1),
    Metric("parent_cosine", "cosine", "neither", _PARENT, least=-1, most=1),
    Metric("coactivation", "fraction", "neither", _COACTIVATION, least=0, most=1),
    Metric("handed_over", "fraction", "lower", _HANDED_OVER, least=0, most=1),
    Metric("shared", "fraction", "higher", _SHARED, least=0, most=1),
    Metric("ce_clean", _TOKEN, "lower", f"{_CE} of the untouched language model", least=0),
    Metric("ce_sae", _TOKEN, "lower", f"{_CE} with xh in place of x", least=0),
    Metric("ce_zero", _TOKEN, "neither", f"{_CE} with 0 in place of x{_SPARED}", least=0),
    Metric("ce_mean", _TOKEN, "neither", f"{_CE} with mean(x) in place of x{_SPARED}", least=0),
    Metric("ce_recovered_zero", "fraction", "higher", "(ce_zero - ce_sae) / (ce_zero - ce_clean)"),
    Metric("ce_recovered_mean", "fraction", "higher", "(ce_mean - ce_sae) / (ce_mean - ce_clean)"),
    Metric("kl", _TOKEN, "lower", "mean over tokens of sum_v p_clean (log p_clean - log p_sae)", least=0),
)

SHOWN = 6
"""Metrics that a short text names."""

METRICS: dict[str, Metric] = {metric.name: metric for metric in _DECLARED}
"""Every metric by name, in the order in which tables show them."""


RECOVERED = ("ce_recovered_mean", "ce_recovered_zero")
"""Recovered cross-entropies; which of them leads is said by `leading_ablation`."""


def leading_ablation(ce_zero: float, ce_mean: float) -> str:
    """Return the ablation that recovered cross-entropies are stated against: the one that costs the model less.

    Where BOS passes through, zero-ablation often costs more than a model that knows nothing (its cross-entropy is above
    the logarithm of the vocabulary), and against such a baseline anything recovers nearly all.

    >>> leading_ablation(10.3, 5.3)
    'mean'
    """
    return "zero" if ce_zero < ce_mean else "mean"


def leading_recovered(recovered: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the recovered cross-entropies that were measured, the leading one first: it recovers less.

    Parameters
    ----------
    recovered
        By name a `Measured`, or what its `to_json` gives.
    """

    def value(name: str) -> float:
        each = recovered[name]
        found = each["value"] if isinstance(each, Mapping) else each.value
        return math.inf if found is None or math.isnan(found) else found

    return tuple(sorted((name for name in RECOVERED if name in recovered), key=value))


class Metrics(Mapping[str, Measured]):
    """Measured values by name, as items and as attributes: ``metrics["fvu"]`` is ``metrics.fvu``."""

    __slots__ = ("_values",)
    _values: dict[str, Measured]

    def __init__(self, values: Mapping[str, Measured]) -> None:
        # In the order of the table of metrics, whatever order they were computed in.
        names = [name for name in METRICS if name in values] + [name for name in values if name not in METRICS]
        object.__setattr__(self, "_values", {name: values[name] for name in names})

    def __getitem__(self, name: str) -> Measured:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Measured:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self._values[name]
        except KeyError:
            advice = (
                "It needs a causal language model: pass `model` and `data`."
                if name.startswith(("ce_", "kl"))
                else did_you_mean(name, self._values)
            )
            raise AttributeError(f"there is no metric `{name}` here. {advice}") from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("measured values cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("measured values cannot be changed")

    def __reduce__(self) -> tuple[type[Metrics], tuple[dict[str, Measured]]]:
        return Metrics, (self._values,)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        shown = [f"{name}={value.value:.3g}" for name, value in list(self.items())[:SHOWN]]
        return f"Metrics({', '.join(shown)}{f', … {len(self)} in all' if len(self) > SHOWN else ''})"

    def _repr_html_(self) -> str:
        lines = [[name, str(value), value.unit] for name, value in self.items()]
        return html_table([["metric", "value", "unit"], *lines], "")

    def to_json(self) -> dict[str, Any]:
        """Name to plain `Measured`."""
        return {name: value.to_json() for name, value in self.items()}

    @classmethod
    def from_json(cls, plain: object, where: str = "metrics") -> Metrics:
        """Return what `to_json` made it from.

        Raises
        ------
        FormatError
            Not an object of measured values.
        """
        if not isinstance(plain, dict):
            raise FormatError(f"`{where}` must be a JSON object; it is {plain!r}.")
        return cls({name: Measured.from_json(value, f"{where}.{name}") for name, value in plain.items()})
