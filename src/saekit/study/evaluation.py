"""The result of an evaluation: plain data, its table and its notebook view."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import FormatError, did_you_mean
from ..files import read_json, write_json
from ..measure import METRICS, DensityHistogram, Measured, html_table, result_from_json, result_to_json, text_table


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

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("measured values cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("measured values cannot be changed")

    def __reduce__(self) -> tuple[type[Metrics], tuple[dict[str, Measured]]]:
        return Metrics, (self._values,)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        return "Metrics(" + ", ".join(f"{name}={value!r}" for name, value in self.items()) + ")"

    def to_json(self) -> dict[str, Any]:
        """Name to plain `Measured`."""
        return {name: value.to_json() for name, value in self.items()}

    @classmethod
    def from_json(cls, plain: Any, where: str = "metrics") -> Metrics:
        """The inverse of `to_json`.

        Raises
        ------
        FormatError
            Not an object of measured values.
        """
        if not isinstance(plain, dict):
            raise FormatError(f"`{where}` must be a JSON object; it is {plain!r}.")
        return cls({name: Measured.from_json(value, f"{where}.{name}") for name, value in plain.items()})


@dataclass(frozen=True)
class Control:
    """The same numbers for something that the SAE must beat."""

    metrics: Metrics
    """Its own values."""
    differences: Metrics
    """The SAE's value minus its own, over the same resamples of documents (paired)."""
    about: dict[str, Any] = field(default_factory=dict)
    """How it was made."""


@dataclass(frozen=True)
class Entry:
    """What was measured about one SAE."""

    name: str
    """What tables call it; unique within an evaluation."""
    sae: dict[str, Any]
    """n_latents, d_in, rule, digest of all tensors, provenance."""
    on_training_rows: bool | None
    """Whether the rows are the ones it was trained on (same digest); None where that is not known."""
    metrics: Metrics
    """Its values."""
    density: DensityHistogram
    """How often its latents fire."""
    controls: dict[str, Control]
    """By name: ``untrained``, ``frozen-decoder`` where given, ``pca``."""


@dataclass(frozen=True)
class Evaluation:
    """How well SAEs reconstruct rows, and what they cost the language model, beside their controls.

    Examples
    --------
    ::

        result = sk.evaluate(saes, rows)
        result.metrics.fvu.value                              # of the first SAE
        result.entries[1].controls["pca"].differences["fvu"]  # SAE minus PCA, with its interval
    """

    KIND: ClassVar[str] = "evaluation"
    SCHEMA: ClassVar[int] = 1

    saekit: str
    """Release that made it."""
    versions: dict[str, str]
    """Releases of what it ran on."""
    settings: dict[str, Any]
    """What it was asked for, with the level and the source of intervals."""
    rows: dict[str, Any]
    """``info`` of the rows: model, hook, data, digest, filters."""
    n_rows: int
    """Rows seen."""
    language_model: dict[str, Any] | None
    """Model, hook, texts and tokens of the cross-entropies; None without them."""
    entries: list[Entry]
    """One per SAE, in the order given."""

    @property
    def metrics(self) -> Metrics:
        """Of the first SAE."""
        return self.entries[0].metrics

    @property
    def controls(self) -> dict[str, Control]:
        """Of the first SAE."""
        return self.entries[0].controls

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: everything, and `metrics` of the first SAE once more at the top level."""
        plain = result_to_json(self)
        return {"kind": plain.pop("kind"), "schema": plain.pop("schema"), "metrics": self.metrics.to_json(), **plain}

    @classmethod
    def from_json(cls, plain: Any) -> Evaluation:
        """The inverse of `to_json`.

        Raises
        ------
        FormatError
            Another kind, a newer schema, a key that is unknown, missing or contradicts another.
        """
        top = plain.get("metrics") if isinstance(plain, dict) else None
        rest = {key: value for key, value in plain.items() if key != "metrics"} if isinstance(plain, dict) else plain
        result = result_from_json(cls, rest)
        if not result.entries:
            raise FormatError("`evaluation.entries` must hold at least one SAE; it is empty.")
        if top != result.metrics.to_json():
            raise FormatError("`metrics` must equal those of the first entry; they differ. The file was altered.")
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file `path`, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read a file that `save` wrote.

        Raises
        ------
        FormatError
            See `from_json`.
        FileNotFoundError
            There is no such file.
        """
        return cls.from_json(read_json(path))

    def table(self, names: tuple[str, ...] | None = None) -> list[list[str]]:
        """Rows of text, headings first; each SAE is followed by its controls.

        Parameters
        ----------
        names
            Metrics to show; by default fvu, l0, dead_fraction, cosine and, with a language model, ce_sae,
            ce_recovered_zero, ce_recovered_mean, kl.
        """
        names = names or tuple(name for name in _SHOWN if name in self.metrics)
        lines = [["", *(_HEADINGS.get(name, name) for name in names)]]
        for entry in self.entries:
            lines.append([entry.name, *(_cell(entry.metrics, name) for name in names)])
            lines += [
                [f"  {label}", *(_cell(control.metrics, name) for name in names)]
                for label, control in entry.controls.items()
            ]
        return lines

    def __repr__(self) -> str:
        return text_table(self.table(), self._caption())

    def _repr_html_(self) -> str:
        return html_table(self.table(), self._caption())

    def _caption(self) -> str:
        tokens = "" if self.language_model is None else f", {self.language_model['n_tokens']:,} predicted tokens"
        seen = "; rows that the SAE was trained on" if any(entry.on_training_rows for entry in self.entries) else ""
        return f"{self.n_rows:,} rows{tokens}; {self.settings['intervals']['level']:.0%} intervals{seen}"


_SHOWN = ("fvu", "l0", "dead_fraction", "cosine", "ce_sae", "ce_recovered_zero", "ce_recovered_mean", "kl")
_HEADINGS = {
    "dead_fraction": "dead",
    "ce_sae": "ce",
    "ce_recovered_zero": "recovered (zero)",
    "ce_recovered_mean": "recovered (mean)",
}


def _cell(metrics: Metrics, name: str) -> str:
    return str(metrics[name]) if name in metrics else "–"
