"""The best affine map from rows to the rows that a transcoder predicts: the dense baseline of a transcoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .pca import Covariance

_SMALLEST = 1e-12
"""Variance of the inputs along a direction, as a fraction of the largest, below which it predicts nothing."""


@dataclass(frozen=True)
class AffineMap:
    """``y_hat = mean_out + (x - mean_in) @ encoder @ decoder``: least squares of rank k (reduced-rank regression).

    With the rows themselves as targets it is PCA with k components.
    """

    encoder: Tensor
    """``float32 [d_in, k]``."""
    decoder: Tensor
    """``float32 [k, d_out]``, orthonormal rows, largest explained variance first."""
    mean_in: Tensor
    """``float32 [d_in]``."""
    mean_out: Tensor
    """``float32 [d_out]``."""

    def predict(self, x: Tensor) -> Tensor:
        """Predict target rows ``[n, d_out]`` from rows ``[n, d_in]``."""
        encoder, decoder, mean_in, mean_out = (
            t.to(x.device) for t in (self.encoder, self.decoder, self.mean_in, self.mean_out)
        )
        return mean_out + ((x.to(mean_in.dtype) - mean_in) @ encoder) @ decoder

    def take(self, k: int) -> AffineMap:
        """Return the best map of rank `k`."""
        return AffineMap(self.encoder[:, :k], self.decoder[:k], self.mean_in, self.mean_out)


class Regression:
    """Streamed least squares of targets on rows; float64.

    Parameters
    ----------
    d_in, d_out
        Widths; memory is ``(d_in + d_out)^2`` float64.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        self.d_in = d_in
        self._joint = Covariance(d_in + d_out)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows ``[n, d_in]`` with their targets ``[n, d_out]``."""
        self._joint.update(torch.cat([x, y.to(x)], dim=1))

    @property
    def n_rows(self) -> int:
        """Rows seen."""
        return self._joint.n_rows

    def compute(self) -> AffineMap:
        """Return the best affine map of full rank; its `take` gives the best ones of lower rank."""
        d, scatter, mean = self.d_in, self._joint.scatter, self._joint.mean
        values, vectors = torch.linalg.eigh(scatter[:d, :d])
        kept = values > _SMALLEST * values.max().clamp_min(torch.finfo(torch.float64).tiny)
        inverse = torch.where(kept, 1 / torch.where(kept, values, torch.ones_like(values)), torch.zeros_like(values))
        whole = (vectors * inverse) @ (vectors.T @ scatter[:d, d:])
        explained = scatter[:d, d:].T @ whole
        directions = torch.linalg.eigh((explained + explained.T) / 2)[1].flip(1)[:, :d]
        return AffineMap(
            (whole @ directions).float().contiguous(), directions.T.float().contiguous(),
            mean[:d].float(), mean[d:].float(),
        )  # fmt: skip
