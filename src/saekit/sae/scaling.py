"""Input scaling: what happens to a row before the encoder and is undone after the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError

KINDS = ("none", "scalar", "standardize", "layer_norm", "row_norm")


@dataclass(frozen=True, eq=False)
class Scaling:
    """How rows are scaled: ``u = apply(x)``, ``x_hat = undo(u_hat)``.

    ========== =====================================================
    kind        u
    ========== =====================================================
    none        x
    scalar      x * scale
    standardize (x - mean) * scale
    layer_norm  (x - mean(x)) / (std(x) + eps), per row, unbiased std;
                undone by ``u_hat * std(x) + mean(x)``
    row_norm    x * sqrt(d_in) / ‖x‖, per row; a row of zeros stays
    ========== =====================================================

    The statistics of ``layer_norm`` and ``row_norm`` belong to each row; `apply` returns them and `undo` takes them
    back, so nothing is remembered in between.
    """

    kind: str = "none"
    scale: Tensor | None = None
    """Factor: a scalar tensor ``[]`` for ``scalar``, ``[d_in]`` for ``standardize``."""
    mean: Tensor | None = None
    """Centre ``[d_in]``, for ``standardize``, in the units of x."""
    eps: float = 1e-5
    """Added to the standard deviation (``layer_norm``), in the units of x."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"Scaling: `kind` must be one of {', '.join(KINDS)}; got {self.kind!r}. Choose one of them."
            )
        needed = {"scalar": ("scale",), "standardize": ("scale", "mean")}.get(self.kind, ())
        for name in ("scale", "mean"):
            if (getattr(self, name) is not None) != (name in needed):
                verb = "needs" if name in needed else "takes no"
                raise ConfigError(f"Scaling: kind {self.kind!r} {verb} `{name}`; got {getattr(self, name)!r}.")

    @property
    def per_row(self) -> bool:
        """Whether each row is scaled by its own statistics, so that `undo` needs what `apply` returned."""
        return self.kind in ("layer_norm", "row_norm")

    def apply(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Scale rows ``[n, d_in]``; also return what `undo` needs: None, or (shift, factor) of each row."""
        if self.kind == "none":
            return x, None
        if self.kind == "layer_norm":
            mean = x.mean(dim=-1, keepdim=True)
            std = x.std(dim=-1, keepdim=True)
            return (x - mean) / (std + self.eps), (mean, std)  # undone without eps, as every library does
        if self.kind == "row_norm":
            norm = x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
            norm = torch.where(norm > 0, norm, torch.ones_like(norm))
            return x / norm, (torch.zeros_like(norm), norm)
        assert self.scale is not None  # __post_init__ saw to it
        centred = x - self.mean if self.mean is not None else x
        return centred * self.scale, None

    def undo(self, u: Tensor, context: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return rows in the units of x, from scaled rows and the context that `apply` returned."""
        if self.kind == "none":
            return u
        if self.per_row:
            if context is None:
                raise ShapeError(
                    "decode: this SAE scales each row by its own statistics, so it needs the rows; got none. "
                    "Call sae.decode(codes, x)."
                )
            mean, std = context
            return u * std + mean
        assert self.scale is not None  # __post_init__ saw to it
        x = u / self.scale
        return x + self.mean if self.mean is not None else x

    def scaled(self, x: Tensor, context: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return what `undo` would turn into `x`, with the context that `apply` returned for other rows."""
        if context is None:
            return self.apply(x)[0]
        shift, factor = context
        return (x - shift) / torch.where(factor > 0, factor, torch.ones_like(factor))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store, by name."""
        return {name: t for name in ("scale", "mean") if (t := getattr(self, name)) is not None}

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Scaling:
        """Return the same scaling on another device or in another dtype."""
        moved = {name: t.to(device=device, dtype=dtype) for name, t in self.tensors().items()}
        return Scaling(**{**{f.name: getattr(self, f.name) for f in fields(self)}, **moved})

    def settings(self) -> dict[str, Any]:
        """Return what is needed besides the tensors to rebuild this value; JSON-able."""
        return {"kind": self.kind} if self.kind != "layer_norm" else {"kind": self.kind, "eps": self.eps}
