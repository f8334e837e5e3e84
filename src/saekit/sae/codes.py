"""Codes: the activations of an SAE's latents on rows, kept sparse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ShapeError

if TYPE_CHECKING:
    import scipy.sparse


@dataclass(frozen=True, eq=False)
class Codes:
    """Compressed sparse rows of latent activations: only the latents that fired are stored.

    Row r holds ``indices[offsets[r]:offsets[r + 1]]`` with the activations in `values` at the same positions. The order
    of the latents within a row has no meaning. A stored value is never zero.
    """

    offsets: Tensor
    """``[n_rows + 1]`` int64, not decreasing, from 0 to nnz."""
    indices: Tensor
    """``[nnz]`` int64, each in ``0 .. n_latents - 1``."""
    values: Tensor
    """``[nnz]`` activations, in the units of the SAE's input."""
    n_latents: int
    """Number of latents, fired or not."""

    def __post_init__(self) -> None:
        if self.offsets.ndim != 1 or len(self.offsets) < 1 or self.indices.shape != self.values.shape:
            raise ShapeError(
                "Codes: `offsets` must be [n_rows + 1] and `indices` and `values` of one length; "
                f"got {tuple(self.offsets.shape)}, {tuple(self.indices.shape)} and {tuple(self.values.shape)}. "
                "Build codes with Codes.from_dense or Codes.from_topk."
            )

    @classmethod
    def from_dense(cls, z: Tensor) -> Codes:
        """Make codes of a dense ``[n_rows, n_latents]`` array: its entries that are not zero."""
        rows, indices = z.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=z.shape[0])
        return cls(_offsets(counts), indices, z[rows, indices], z.shape[1])

    @classmethod
    def from_topk(cls, values: Tensor, indices: Tensor, n_latents: int, *, signed: bool = False) -> Codes:
        """Make codes of ``[n_rows, k]`` values and latents; entries that are not positive did not fire: dropped.

        With `signed`, a negative entry is a code too, and only zeros are dropped.
        """
        fired = values != 0 if signed else values > 0
        return cls(_offsets(fired.sum(dim=1)), indices[fired], values[fired], n_latents)

    @classmethod
    def cat(cls, parts: Sequence[Codes]) -> Codes:
        """Concatenate the rows of all `parts`, in order. They must have the same number of latents."""
        if len({part.n_latents for part in parts}) != 1:
            raise ShapeError(
                f"Codes.cat: all parts must have the same n_latents; got {sorted({p.n_latents for p in parts})}. "
                "Concatenate codes of one SAE only."
            )
        counts = torch.cat([part.offsets.diff() for part in parts])
        indices = torch.cat([part.indices for part in parts])
        return cls(_offsets(counts), indices, torch.cat([part.values for part in parts]), parts[0].n_latents)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    @property
    def nnz(self) -> int:
        """Number of codes stored."""
        return len(self.indices)

    def __len__(self) -> int:
        return self.n_rows

    def l0(self) -> float:
        """Return the mean number of latents that fired per row; 0 for no rows."""
        return self.nnz / max(self.n_rows, 1)

    def row_of(self) -> Tensor:
        """Return the row of each stored code, ``[nnz]`` int64."""
        return torch.repeat_interleave(self.offsets.diff())

    def to_dense(self) -> Tensor:
        """Return the dense ``[n_rows, n_latents]`` array. Large: meant for small data and tests."""
        z = self.values.new_zeros((self.n_rows, self.n_latents))
        z[self.row_of(), self.indices] = self.values
        return z

    def to_scipy(self) -> scipy.sparse.csr_array:
        """Return a ``scipy.sparse.csr_array`` ``[n_rows, n_latents]``, latents sorted within each row."""
        import scipy.sparse

        values = self.values.detach().cpu()
        values = values if values.dtype in (torch.float32, torch.float64) else values.float()
        arrays = (values.numpy(), self.indices.cpu().numpy(), self.offsets.cpu().numpy())
        csr = scipy.sparse.csr_array(arrays, shape=(self.n_rows, self.n_latents), copy=True)
        csr.sort_indices()
        return csr

    def rows(self, which: slice | Sequence[int] | Tensor) -> Codes:
        """Return the codes of some rows, in the order given (a slice, indices, or a boolean mask)."""
        index = torch.arange(self.n_rows, device=self.offsets.device)
        index = index[which] if isinstance(which, slice) else index[torch.as_tensor(which, device=index.device)]
        counts = self.offsets.diff()[index]
        offsets = _offsets(counts)
        # Index of every kept code: the start of its old row plus its index within the row.
        within = torch.arange(int(offsets[-1]), device=index.device) - torch.repeat_interleave(offsets[:-1], counts)
        at = torch.repeat_interleave(self.offsets[:-1][index], counts) + within
        return Codes(offsets, self.indices[at], self.values[at], self.n_latents)

    def take(self, m: int) -> Codes:
        """Return the codes of the first `m` latents, selected by the rule BEFORE (a row may keep fewer than k)."""
        keep = self.indices < m
        counts = torch.bincount(self.row_of()[keep], minlength=self.n_rows)
        return Codes(_offsets(counts), self.indices[keep], self.values[keep], min(m, self.n_latents))

    def permute(self, order: Tensor) -> Codes:
        """Return codes in which new latent j is old latent ``order[j]``."""
        new_place = torch.empty_like(order)
        new_place[order] = torch.arange(len(order), device=order.device)
        return Codes(self.offsets, new_place[self.indices], self.values, self.n_latents)

    def to(self, device: torch.device | str) -> Codes:
        """Return the codes on another device."""
        return Codes(self.offsets.to(device), self.indices.to(device), self.values.to(device), self.n_latents)

    def __repr__(self) -> str:
        return f"Codes({self.n_rows:,} rows × {self.n_latents:,} latents, {self.nnz:,} fired, l0={self.l0():.4g})"


def _offsets(counts: Tensor) -> Tensor:
    """Return the running starts of segments with these lengths: ``[len(counts) + 1]``."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
