"""Edits of codes: what a latent's code is changed to, and what that adds to the rows that an SAE writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import kernels
from ..errors import ConfigError, nearest
from ..measure.normal_equations import column_factors, row_factors
from ..sae.codes import Codes
from ..sae.model import SAE
from ..settings import is_number, is_whole

Kind = Literal["set", "add", "scale", "clamp", "ablate"]


@dataclass(frozen=True)
class Edit:
    """A change of one latent's code z. Make one with `set`, `add`, `scale`, `clamp` or `ablate`.

    ======== ==========================
    set      z' = value
    add      z' = z + value
    scale    z' = z · value
    clamp    z' = min(max(z, low), high)
    ablate   z' = 0
    ======== ==========================

    Values are codes: multiples of the latent's decoder row, in the units of the SAE's scaled input. A latent that does
    not fire has z = 0, so `set`, `add` and `clamp` with ``low`` above 0 write it everywhere.

    Raises
    ------
    ConfigError
        A number is missing or not finite, or `low` is above `high`.
    """

    kind: Kind
    """Which change."""
    value: float = 0.0
    """Operand of `set`, `add` and `scale`."""
    low: float = -math.inf
    """Lower end of `clamp`."""
    high: float = math.inf
    """Upper end of `clamp`."""

    def __post_init__(self) -> None:
        if not is_number(self.value):
            raise ConfigError(f"an edit's `value` must be a finite number; got {self.value!r}.")
        for end in (self.low, self.high):
            if not is_number(end) and end not in (-math.inf, math.inf):
                raise ConfigError(f"an edit's `low` and `high` must be numbers; got {self.low!r} and {self.high!r}.")
        if self.low > self.high or math.inf in (self.low, -self.high):
            raise ConfigError(f"an edit's `low` must be at most its `high`; got {self.low:g} and {self.high:g}.")

    @classmethod
    def set(cls, value: float) -> Edit:
        """Return the edit z' = value."""
        return cls("set", value)

    @classmethod
    def add(cls, value: float) -> Edit:
        """Return the edit z' = z + value."""
        return cls("add", value)

    @classmethod
    def scale(cls, value: float) -> Edit:
        """Return the edit z' = z · value."""
        return cls("scale", value)

    @classmethod
    def clamp(cls, low: float = -math.inf, high: float = math.inf) -> Edit:
        """Return the edit z' = min(max(z, low), high)."""
        return cls("clamp", low=low, high=high)

    @classmethod
    def ablate(cls) -> Edit:
        """Return the edit z' = 0."""
        return cls("ablate")

    @classmethod
    def parse(cls, text: str) -> Edit:
        """Return the edit that a text means: ``8`` (set), ``+8``, ``*2``, ``0..3`` (clamp) or ``ablate``.

        Raises
        ------
        ConfigError
            It is none of these.
        """
        text = text.strip()
        low, dots, high = text.partition("..")
        try:
            if text == "ablate":
                return cls.ablate()
            if dots and (low or high):
                return cls.clamp(float(low or "-inf"), float(high or "inf"))
            if text[:1] in ("+", "*"):
                return cls("add" if text[0] == "+" else "scale", float(text[1:]))
            return cls.set(float(text))
        except ValueError:
            raise ConfigError(
                f"an edit must be a number (set), `+2` (add), `*2` (scale), `0..3` (clamp) or `ablate`; got {text!r}."
                f"{nearest(text, ['ablate'])}"
            ) from None

    def __call__(self, codes: Tensor) -> Tensor:
        """Return the codes that this edit makes of `codes`, of any shape."""
        if self.kind == "set":
            return torch.full_like(codes, self.value)
        if self.kind == "add":
            return codes + self.value
        if self.kind == "scale":
            return codes * self.value
        if self.kind == "clamp":
            return codes.clamp(self.low, self.high)
        return torch.zeros_like(codes)

    def __str__(self) -> str:
        if self.kind == "clamp":
            return f"clamp to {self.low:g}..{self.high:g}"
        return self.kind if self.kind == "ablate" else f"{self.kind} {self.value:g}"


@dataclass(frozen=True)
class AblateTop:
    """Ablate the `m` latents that fire most, by magnitude, at each token; ``m = n_latents`` ablates all."""

    m: int
    """How many."""

    def __post_init__(self) -> None:
        if not is_whole(self.m) or self.m < 1:
            raise ConfigError(f"AblateTop: `m` must be a whole number of at least 1; got {self.m!r}.")


Edits = Mapping[int, "Edit | float | str"] | AblateTop
"""Which latents change to what (a number sets the code, a text is read by `Edit.parse`), or the top of each token."""


def checked_edits(sae: SAE, edits: Edits) -> Mapping[int, Edit] | AblateTop:
    """Return edits with numbers as `Edit.set`, after checking the latents.

    Raises
    ------
    ConfigError
        A latent that the SAE does not have, or something that is no edit.
    """
    if isinstance(edits, AblateTop):
        return edits
    if not isinstance(edits, Mapping):
        raise ConfigError(f"`edits` must map latents to edits, {{17: 8.0}} say, or be AblateTop(m); got {edits!r}.")
    found: dict[int, Edit] = {}
    for latent, edit in edits.items():
        if not is_whole(latent) or not 0 <= latent < sae.n_latents:
            raise ConfigError(f"`edits` must name latents within 0..{sae.n_latents - 1}; got {latent!r}.")
        if not isinstance(edit, Edit):
            if not isinstance(edit, str) and not is_number(edit):
                raise ConfigError(f"an edit must be a number, a text or an `Edit`; got {edit!r} for latent {latent}.")
            edit = Edit.parse(edit) if isinstance(edit, str) else Edit.set(float(edit))
        found[int(latent)] = edit
    return found


def difference_of(codes: Codes, edits: Mapping[int, Edit] | AblateTop) -> Codes:
    """Return ``z' - z`` of all codes, sparse: entries that the edits do not change are not stored.

    The latents that fire are never chosen again: an edit of one latent leaves the codes of all others as they are.
    """
    if isinstance(edits, AblateTop):
        return _without_top(codes, edits.m)
    latents = torch.tensor(sorted(edits), dtype=torch.int64, device=codes.indices.device)
    before = columns_of(codes, latents)
    after = torch.stack([edits[int(j)](z) for j, z in zip(latents, before.T, strict=True)], 1) if edits else before
    row, column = (after - before).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=codes.n_rows)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Codes(offsets, latents[column], (after - before)[row, column], codes.n_latents)


def columns_of(codes: Codes, latents: Tensor) -> Tensor:
    """Return the codes of some latents as a dense array ``[n_rows, len(latents)]``."""
    place = torch.full((codes.n_latents,), -1, dtype=torch.int64, device=codes.indices.device)
    place[latents] = torch.arange(len(latents), device=place.device)
    column = place[codes.indices]
    chosen = column >= 0
    dense = codes.values.new_zeros(codes.n_rows, len(latents))
    dense[codes.row_of()[chosen], column[chosen]] = codes.values[chosen]
    return dense


def _without_top(codes: Codes, m: int) -> Codes:
    row = codes.row_of()
    # Sorted by row, then by magnitude: the first m entries of each row are its top.
    order = torch.argsort(codes.values.abs(), descending=True, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    rank = torch.arange(codes.nnz, device=row.device) - codes.offsets[row[order]]
    top = order[rank < m].sort().values
    counts = torch.bincount(row[top], minlength=codes.n_rows)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Codes(offsets, codes.indices[top], -codes.values[top], codes.n_latents)


def written_by(sae: SAE, difference: Codes, x: Tensor) -> Tensor:
    """Return what a difference of codes of rows `x` ``[n, d_in]`` adds, ``[n, d_out]``: scaling undone, no bias."""
    u = kernels.csr_decode(difference.offsets, difference.indices, difference.values, sae.W_dec)
    return u * column_factors(sae) * row_factors(sae, x)[:, None]
