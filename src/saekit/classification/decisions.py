"""Why a linear classifier of latents decides as it does: what each latent adds, and how much of it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..terminal import plain

TOP_LATENTS = 10
"""Latents that an explanation shows, and that the card names for each class."""


@dataclass(frozen=True)
class Firing:
    """A token where a latent fired."""

    position: int
    """Place of the token in the text, from 0."""
    token: str
    activation: float


@dataclass(frozen=True)
class Reason:
    """What one latent contributed to a decision."""

    latent: int
    label: str
    """Tokens that it responds to, found offline in the training texts."""
    value: float
    """Pooled activation in this text."""
    coefficient: float
    """Weight for the class, per unit of `value`."""
    contribution: float
    """``coefficient * value``: what it adds to the logit of the class."""
    tokens: tuple[Firing, ...]
    """Where it fired, strongest first."""


@dataclass(frozen=True)
class Explanation:
    """Why a text was put into a class.

    The logit of the class is `intercept` plus the contributions of all latents; those of `reasons` are the largest in
    size, `rest` is the sum of the others.
    """

    text: str
    predicted: str
    probabilities: dict[str, float]
    logit: float
    intercept: float
    reasons: tuple[Reason, ...]
    rest: float
    logit_fraction: float | None
    """Sum of the contributions of `reasons` over that of all latents: below 0 or above 1 where the others cancel them;
    None where all latents add nothing."""
    shown_fraction: float | None
    """The same of the magnitudes of the contributions, 0 to 1: how much of what moved the logit is shown."""
    n_latents: int | None = None
    """Latents that the classifier reads; None for all."""
    sparse: Explanation | None = None
    """The same text by the sparse arm of the classifier; None where it has none."""

    @property
    def shown(self) -> float:
        """Sum of the contributions of `reasons`."""
        return sum(each.contribution for each in self.reasons)

    def __repr__(self) -> str:
        lines = self._lines()
        if self.sparse is not None:
            first, *rest = self.sparse._lines()
            lines += [f"by the sparse arm, of {self.sparse.n_latents} latents: {first}", *rest]
        return "\n".join(map(plain, lines))

    def _lines(self) -> list[str]:
        lines = [f"{self.predicted} ({self.probabilities[self.predicted]:.0%})"]
        for each in self.reasons:
            where = ", ".join(f"{firing.token!r}" for firing in each.tokens[:4])
            lines.append(f"  {each.contribution:+.2f}  latent {each.latent} {each.label}  at {where}")
        lines.append(f"  {self.rest:+.2f}  all other latents;  {self.intercept:+.2f}  intercept")
        if self.shown_fraction is not None:
            part = "" if self.logit_fraction is None else f" ({self.logit_fraction:.0%})"
            lines.append(
                f"  the {len(self.reasons)} latents shown carry {self.shown:+.2f} of the {self.shown + self.rest:+.2f} "
                f"that latents add to the logit{part}, and {self.shown_fraction:.0%} of what they add in magnitude"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        from ..measure.results import to_plain

        return {name: to_plain(getattr(self, name)) for name in self.__dataclass_fields__}


@dataclass(frozen=True, eq=False)
class LinearRule:
    """A fitted linear pipeline as one coefficient per class and latent.

    For two classes the logits are those of a softmax with the first one's fixed at 0.
    """

    pipeline: Any
    coefficients: np.ndarray
    """``[n_classes, n_latents]`` per unit of (binarized) pooled activation; 0 for latents that do not reach it."""
    intercepts: np.ndarray
    """``[n_classes]``."""

    @classmethod
    def of(cls, pipeline: Any, n_latents: int) -> LinearRule:
        """Return the rule of a fitted pipeline of selections, scalings and a logistic regression."""
        model = pipeline.steps[-1][1]
        coefficients, columns = np.asarray(model.coef_, dtype=float), np.arange(n_latents)
        for _, step in pipeline.steps[:-1]:
            if hasattr(step, "get_support"):
                columns = columns[step.get_support()]
            elif hasattr(step, "scale_"):
                coefficients = coefficients / step.scale_
        intercepts = np.asarray(model.intercept_, dtype=float).ravel()
        if len(coefficients) == 1:
            coefficients = np.concatenate([np.zeros_like(coefficients), coefficients])
            intercepts = np.concatenate([[0.0], intercepts])
        found = np.zeros((len(coefficients), n_latents))
        found[:, columns] = coefficients
        return cls(pipeline, found, intercepts)

    @property
    def n_selected(self) -> int | None:
        """How many latents a selection lets through; None without one."""
        kept = [int(step.get_support().sum()) for _, step in self.pipeline.steps[:-1] if hasattr(step, "get_support")]
        return kept[-1] if kept else None

    def read(self, X: Any) -> Any:
        """Return pooled codes as the coefficients take them."""
        for name, step in self.pipeline.steps[:-1]:
            X = step.transform(X) if name == "binarize" else X
        return X

    def against_rest(self, chosen: int) -> tuple[np.ndarray, float]:
        """Return coefficients and intercept of a class minus those of the other one, or of the mean class of more."""
        if len(self.coefficients) == 2:
            beside, level = self.coefficients[1 - chosen], self.intercepts[1 - chosen]
        else:
            beside, level = self.coefficients.mean(0), self.intercepts.mean()
        return self.coefficients[chosen] - beside, float(self.intercepts[chosen] - level)

    def shown_fractions(self, X: Any, top: int = TOP_LATENTS) -> np.ndarray:
        """Return per text what fraction of the magnitude of all contributions the `top` largest carry.

        Texts in which no latent adds anything are left out.
        """
        chosen, read = np.asarray(self.pipeline.predict_proba(X)).argmax(1), self.read(X).tocsr()
        rows = np.stack([self.against_rest(each)[0] for each in range(len(self.coefficients))])
        found = []
        for i, one in enumerate(chosen):
            mine = slice(read.indptr[i], read.indptr[i + 1])
            size = np.sort(np.abs(rows[one][read.indices[mine]] * read.data[mine]))[::-1]
            if size.sum() > 0:
                found.append(size[:top].sum() / size.sum())
        return np.array(found)
