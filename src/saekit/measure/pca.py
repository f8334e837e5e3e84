"""Principal components of streamed rows: the dense control with as many directions as an SAE uses latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .accumulators import check_rows, double


@dataclass(frozen=True)
class PCA:
    """A fitted linear projection: ``x_hat = mean + (x - mean) @ components.T @ components``.

    Parameters
    ----------
    components
        ``float32 [k, d]`` orthonormal rows, largest variance first.
    mean
        ``float32 [d]``.
    variance
        ``float64 [d]`` variance along every component, kept or not, falling.
    n_rows
        Rows that it was fitted on.
    """

    components: Tensor
    mean: Tensor
    variance: Tensor
    n_rows: int

    def reconstruct(self, x: Tensor) -> Tensor:
        """Rows ``[n, d]`` projected onto the kept components."""
        mean, components = self.mean.to(x.device), self.components.to(x.device)
        centred = x.to(mean.dtype) - mean
        return mean + (centred @ components.T) @ components

    def take(self, k: int) -> PCA:
        """Return the same with the first `k` components only."""
        return PCA(self.components[:k], self.mean, self.variance, self.n_rows)


class Covariance:
    """Streamed mean and covariance of rows; float64, Chan's update.

    Parameters
    ----------
    d
        Width; memory is ``d * d`` float64.
    """

    def __init__(self, d: int) -> None:
        self.d = d
        self.n_rows = 0
        self._mean = torch.zeros(d, dtype=torch.float64)
        self._scatter = torch.zeros(d, d, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Add rows ``[n, d]``.

        Raises
        ------
        ShapeError, DataError
            Not ``[n, d]``, or not finite.
        """
        check_rows(x, self.d)
        if len(x) == 0:
            return
        x = double(x)
        mean = x.mean(0)
        centred = x - mean
        self._combine(len(x), mean.cpu(), (centred.T @ centred).cpu())

    def merge(self, other: Covariance) -> None:
        """Add the rows that `other` saw."""
        if other.n_rows:
            self._combine(other.n_rows, other._mean, other._scatter)

    def _combine(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.n_rows + n
        step = mean - self._mean
        self._scatter += scatter + torch.outer(step, step) * (self.n_rows * n / total)
        self._mean += step * (n / total)
        self.n_rows = total

    @property
    def mean(self) -> Tensor:
        """``float64 [d]`` mean row."""
        return self._mean.clone()

    @property
    def scatter(self) -> Tensor:
        """``float64 [d, d]`` sum over rows of the products of their distances from the mean."""
        return self._scatter.clone()

    def compute(self, k: int | None = None) -> PCA:
        """Return the first `k` principal components (all by default).

        Raises
        ------
        DataError
            Fewer than 2 rows were added.
        ConfigError
            `k` is not between 0 and `d`.
        """
        if self.n_rows < 2:
            raise DataError(f"principal components need at least 2 rows; there were {self.n_rows}.")
        k = self.d if k is None else k
        if not 0 <= k <= self.d:
            raise ConfigError(f"`k` must lie between 0 and the width {self.d}; got {k}.")
        values, vectors = torch.linalg.eigh(self._scatter / self.n_rows)
        components = vectors.flip(1).T
        # The sign of an eigenvector is arbitrary; fixing it makes the components the same on every machine.
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        components = components * torch.where(largest < 0, -1.0, 1.0)
        variance = values.flip(0).clamp_min(0)
        return PCA(components[:k].float().contiguous(), self._mean.float(), variance, self.n_rows)
