"""What orphans are: the result, its table and its caption."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..measure.results import Measured, Result
from ..settings import brief


@dataclass(frozen=True)
class Property:
    """One property of orphans compared with that of shared latents."""

    __repr__ = brief

    name: str
    meaning: str
    orphans: Measured
    """Median over the orphans of an SAE: mean over SAEs."""
    shared: Measured
    """Median over the shared latents."""
    auc: Measured
    """Chance that an orphan has more of it than a shared latent, mean over SAEs; ties count half, 0.5: none."""
    p: float | None
    """Two-sided Mann-Whitney test: the largest p over the SAEs, times the number of properties (at most 1)."""
    auc_matched: Measured
    """The same chance among orphans and shared latents of equal frequency."""
    p_matched: float | None


@dataclass(frozen=True)
class Ablated:
    """How much worse the reconstruction gets when some latents are ablated."""

    __repr__ = brief

    latents: str
    """Which."""
    n_latents: float
    """How many, mean over SAEs."""
    fvu: Measured
    """Rise of FVU: mean over SAEs."""
    ce: Measured | None
    """Rise of the language model's cross-entropy, in nats per token; None without one."""


@dataclass(frozen=True)
class Span:
    """How alike the subspaces are that latents of two seeds span: mean squared cosine of their principal angles."""

    __repr__ = brief

    rank: int
    """Dimensions of each subspace: those in which the unit decoder rows are longest."""
    orphans: Measured
    """Orphans of one SAE against orphans of another: mean over pairs."""
    shared: Measured
    """Shared latents against shared latents."""
    null: Measured
    """Random subspaces: rank / d is expected; the interval holds 95 % of draws."""
    rows: Measured | None
    """Orphans against the principal components of the rows: what the data alone explains."""


@dataclass(frozen=True, repr=False)
class Orphans(Result):
    """Latents that none of the other SAEs has, compared with those that at least one other has.

    SAEs are what intervals are about: each gives one number, and Student's t says how sure their mean is.

    Examples
    --------
    ::

        found = sk.orphans(saes, rows)
        found.property("frequency").auc         # 0.31: orphans are rarer
        found.spans[0].orphans, found.spans[0].null
    """

    KIND: ClassVar[str] = "orphans"
    SCHEMA: ClassVar[int] = 2
    PARTS: ClassVar[tuple[str, ...]] = ("properties", "silenced", "spans")

    rows: dict[str, Any]
    """Where the rows come from."""
    n_rows: int
    """Rows that properties were measured on."""
    language_model: dict[str, Any] | None
    """Model and texts of the cross-entropies."""
    names: list[str]
    """The SAEs."""
    n_orphans: list[int]
    """Number of orphans of each SAE."""
    n_shared: list[int]
    digests: list[str] = field(default_factory=list)
    """Digest of each SAE; none in results of older releases."""
    properties: list[Property] = field(default_factory=list)
    silenced: list[Ablated] = field(default_factory=list)
    fvu_difference: Measured | None = None
    """Rise of FVU without matched orphans minus that without as many shared latents of equal frequency."""
    ce_difference: Measured | None = None
    """The same of cross-entropy."""
    spans: list[Span] = field(default_factory=list)

    def property(self, name: str) -> Property:
        """Return one of `properties`.

        Raises
        ------
        KeyError
            It was not measured.
        """
        return {each.name: each for each in self.properties}[name]

    def table(self) -> list[list[str]]:
        """Return the properties as rows of text, headings first."""
        lines = [["", "orphans", "shared", "AUC", "p", "AUC, equal frequency", "p "]]
        for each in self.properties:
            p = ["–" if value is None else f"{value:.2g}" for value in (each.p, each.p_matched)]
            found = map(str, (each.orphans, each.shared, each.auc))
            lines.append([each.name, *found, p[0], str(each.auc_matched), p[1]])
        return lines

    def caption(self) -> str:
        """Return the line under the table: counts, costs of ablation, spans."""
        orphans, shared = sum(self.n_orphans), sum(self.n_shared)
        parts = [f"{orphans:,} orphans and {shared:,} shared latents of {len(self.names)} SAEs"]
        if self.fvu_difference is not None:
            parts.append(f"FVU lost without orphans minus without as many shared ones: {self.fvu_difference}")
        if self.ce_difference is not None:
            parts.append(f"cross-entropy: {self.ce_difference}")
        if self.spans:
            span = self.spans[0]
            parts.append(
                f"overlap of spans of rank {span.rank}: {span.orphans} (shared {span.shared}, null {span.null})"
            )
        return "; ".join(parts)
