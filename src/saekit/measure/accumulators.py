"""Streamed accumulators: ``update`` with a batch, ``merge`` with another, ``compute`` at the end.

Everything is summed in float64 before any division, so the way rows were cut into batches changes nothing but the last
bits. Sums are kept per group of documents (see `saekit.measure.intervals`), from which the intervals come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, ShapeError
from ..ranks import Member, everyones, summed
from ..sae.codes import Codes
from ..variance import SAME_ROWS, fraction_unexplained
from .intervals import N_GROUPS, Estimate, Sample

DENSE = 0.1
"""Fraction of rows above which a latent is dense."""

FIRE_GROUPS = 64
"""Firings are kept per latent for this many coarser groups: a `[64, n_latents]` table of int32."""

HALVES = 32
"""Random halves of the documents for the interval of the fraction of dense latents."""

HISTOGRAM_STEP = 0.25
"""Width of the bins of the density histogram, in powers of ten."""


class Sums:
    """Named sums of per-row numbers, one sum per group of documents."""

    def __init__(self, n_groups: int = N_GROUPS) -> None:
        self.n_groups = n_groups
        self._totals: dict[str, Tensor] = {}

    def update(self, group: Tensor, **rows: Tensor) -> None:
        """Add per-row numbers.

        Parameters
        ----------
        group
            ``int64 [n]`` in ``[0, n_groups)``.
        rows
            Name to ``[n]`` numbers. ``n`` itself counts the rows.
        """
        group = group.to(_home(group))
        rows = {"n": torch.ones_like(group, dtype=torch.float64), **rows}
        for name, values in rows.items():
            values = double(values)
            total = self._totals.get(name)
            if total is None:
                total = self._totals[name] = torch.zeros(self.n_groups, dtype=torch.float64, device=values.device)
            total.index_add_(0, group.to(total.device), values.to(total.device))

    def merge(self, other: Sums, groups: Tensor | None = None) -> None:
        """Add the sums of `other`, which saw other rows.

        Parameters
        ----------
        other
            The other sums.
        groups
            Which groups those of `other` are here, ``int64 [other.n_groups]``, each once; None: the same.
        """
        for name, total in other._totals.items():
            mine = self._totals.get(name)
            if mine is None:
                mine = self._totals[name] = torch.zeros(self.n_groups, dtype=torch.float64, device=total.device)
            if groups is None:
                self._totals[name] = mine + total.to(mine.device)
            else:
                mine[groups.to(mine.device)] += total.to(mine.device)

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process gets: everything, on the CPU."""
        return {**vars(self), "_totals": {name: total.cpu() for name, total in self._totals.items()}}

    def sample(self, given: Sample | None, empty: str) -> Sample:
        """Return the sample given, by default of the groups seen; raises `DataError` `empty` where nothing was."""
        n = self["n"]
        if not n.sum():
            raise DataError(empty)
        return Sample.over(n) if given is None else given

    def __getitem__(self, name: str) -> np.ndarray:
        """``float64 [n_groups]``; zeros where nothing was added."""
        total = self._totals.get(name)
        return np.zeros(self.n_groups) if total is None else total.cpu().numpy()


class Moments:
    """Count, mean and squared deviation of rows per group, combined by Chan's update: exact at any offset.

    Parameters
    ----------
    d
        Width of the rows.
    n_groups
        Number of groups of documents; memory is ``n_groups * d`` float64.

    References
    ----------
    Chan, Golub & LeVeque (1983), *Algorithms for computing the sample variance*, equation 1.5b.
    """

    def __init__(self, d: int, n_groups: int = N_GROUPS) -> None:
        self.d = d
        self.n_groups = n_groups
        self._n = torch.zeros(n_groups, dtype=torch.float64)
        self._mean = torch.zeros(n_groups, d, dtype=torch.float64)
        self._deviation = torch.zeros(n_groups, dtype=torch.float64)
        self._denominators: tuple[Sample, np.ndarray] | None = None

    def update(self, x: Tensor, group: Tensor) -> None:
        """Add rows ``x [n, d]`` with their groups ``int64 [n]``.

        Raises
        ------
        ShapeError
            `x` is not ``[n, d]``.
        DataError
            `x` holds NaN or infinity.
        """
        check_rows(x, self.d)
        if self._n.device != _home(x):
            self._n, self._mean, self._deviation = (t.to(_home(x)) for t in (self._n, self._mean, self._deviation))
        group, inverse = torch.unique(group.to(self._n.device), return_inverse=True)
        x = double(x)
        n = torch.zeros(len(group), dtype=torch.float64, device=x.device).index_add_(0, inverse, x.new_ones(len(x)))
        mean = x.new_zeros(len(group), self.d).index_add_(0, inverse, x) / n[:, None]
        squares = (x - mean[inverse]).square().sum(1)
        deviation = x.new_zeros(len(group)).index_add_(0, inverse, squares)
        self._combine(group, n, mean, deviation)

    def merge(self, other: Moments, groups: Tensor | None = None) -> None:
        """Add the rows that `other` saw; `groups` as in `Sums.merge`."""
        if self._n.device != other._n.device:
            self._n, self._mean, self._deviation = (
                part.to(other._n.device) for part in (self._n, self._mean, self._deviation)
            )
        group = torch.nonzero(other._n).squeeze(1)
        parts = (part[group] for part in (other._n, other._mean, other._deviation))
        self._combine(group if groups is None else groups.to(group.device)[group], *parts)

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process gets: everything, on the CPU."""
        tensors = {name: value.cpu() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {**vars(self), **tensors}

    def _combine(self, group: Tensor, n: Tensor, mean: Tensor, deviation: Tensor) -> None:
        old_n, total = self._n[group], self._n[group] + n
        step = mean - self._mean[group]
        self._mean[group] += step * (n / total)[:, None]
        self._deviation[group] += deviation + step.square().sum(1) * old_n * n / total
        self._n[group] = total
        self._denominators = None

    @property
    def n_rows(self) -> int:
        """Rows seen."""
        return int(self._n.sum())

    @property
    def rows_per_group(self) -> np.ndarray:
        """``float64 [n_groups]`` row counts."""
        return self._n.cpu().numpy()

    @property
    def mean(self) -> Tensor:
        """``float64 [d]`` mean row over everything seen."""
        return (self._n[:, None] * self._mean).sum(0) / self._n.sum()

    def total(self) -> float:
        """``sum ||x - mean(x)||^2`` over everything seen."""
        spread = self._n * (self._mean - self.mean).square().sum(1)
        return float(self._deviation.sum() + spread.sum())

    def square(self) -> float:
        """``sum ||x||^2`` over everything seen."""
        return self.total() + self.n_rows * float(self.mean.square().sum())

    def totals(self, sample: Sample) -> np.ndarray | None:
        """Return the same without each part of the sample, about the mean of what stays: ``float64 [n]``."""
        if sample.weights is None:
            return None
        if self._denominators is None or self._denominators[0].weights is not sample.weights:
            n = self._n.cpu().numpy()
            centred = (self._mean - self.mean).cpu().numpy() * (n > 0)[:, None]
            within = self._deviation.cpu().numpy() + n * np.square(centred).sum(1)
            shift = sample.weights @ (n[:, None] * centred)
            totals = sample.weights @ within - np.square(shift).sum(1) / (sample.weights @ n)
            self._denominators = (sample, totals)
        return self._denominators[1]


class Reconstruction:
    """How well ``x_hat`` stands for ``x``: fvu, mse, cosine, l2_ratio, relative_reconstruction_bias, ev_legacy.

    Parameters
    ----------
    d
        Width of the rows.
    centre
        ``[d]`` mean row for `ev_legacy`, whose per-row ratios need it before the first row; None leaves that out.
    moments
        Statistics of the rows themselves that someone else updates, to share them between several reconstructions;
        by default this object keeps its own.
    """

    def __init__(
        self, d: int, *, centre: Tensor | None = None, moments: Moments | None = None, n_groups: int = N_GROUPS
    ) -> None:
        self._shared = moments is not None
        self.moments = Moments(d, n_groups) if moments is None else moments
        self._centre = None if centre is None else double(centre)
        self._sums = Sums(n_groups)

    def update(self, x: Tensor, x_hat: Tensor, group: Tensor | None = None) -> None:
        """Add rows and their reconstructions, both ``[n, d]``.

        Parameters
        ----------
        group
            ``int64 [n]`` groups of documents; None counts all rows as one document.

        Raises
        ------
        ShapeError
            The shapes differ.
        DataError
            NaN or infinity in either.
        """
        if group is None:
            group = torch.zeros(len(x), dtype=torch.long, device=x.device)
        if not self._shared:
            self.moments.update(x, group)
        if x_hat.shape != x.shape:
            raise ShapeError(
                f"`x_hat` must have the shape of `x`, {tuple(x.shape)}; it is {tuple(x_hat.shape)}. "
                "Reconstruct the same rows."
            )
        x, x_hat = double(x), double(x_hat)
        group = group.to(x.device)
        sse = (x - x_hat).square().sum(1)
        if not bool(torch.isfinite(sse).all()):
            raise DataError("`x_hat` must be finite; it holds NaN or infinity. Check the weights of the SAE.")
        norm, norm_hat, dot = x.norm(dim=1), x_hat.norm(dim=1), (x * x_hat).sum(1)
        lengths = norm * norm_hat
        rows = {
            "sse": sse,
            "norm": norm,
            "norm_hat": norm_hat,
            "square_hat": norm_hat.square(),
            "dot": dot,
            "cosine": dot / lengths.clamp_min(torch.finfo(torch.float64).tiny),
        }
        if self._centre is not None:
            spread = (x - self._centre.to(x.device)).square().sum(1)
            rows["legacy"] = 1 - sse / spread.clamp_min(torch.finfo(torch.float64).tiny)
        self._sums.update(group, **rows)

    def merge(self, other: Reconstruction, groups: Tensor | None = None) -> None:
        """Add what `other` saw (and its rows' moments, unless they are shared); `groups` as in `Sums.merge`."""
        self._sums.merge(other._sums, groups)
        if not self._shared:
            self.moments.merge(other.moments, groups)

    def compute(self, sample: Sample | None = None) -> dict[str, Estimate]:
        """Return the metrics by name, with intervals from `sample` (by default over the groups seen).

        Raises
        ------
        DataError
            No row was added.
        """
        sums, n = self._sums, self._sums["n"]
        sample = sums.sample(sample, "a metric needs at least one row; none was added.")
        left_out = None
        totals = self.moments.totals(sample)
        if sample.weights is not None and totals is not None:
            square = self.moments.square() / n.sum() * (sample.weights @ n)
            left_out = fraction_unexplained(sample.weights @ sums["sse"], totals, square)
        fvu = sample.estimate(
            float(fraction_unexplained(sums["sse"].sum(), self.moments.total(), self.moments.square())),
            left_out,
            undefined=SAME_ROWS,
        )
        estimates = {
            "fvu": fvu,
            "mse": sample.ratio(sums["sse"], n),
            "cosine": sample.ratio(sums["cosine"], n),
            "l2_ratio": sample.ratio(sums["norm_hat"], sums["norm"], undefined="all rows are zero"),
            "relative_reconstruction_bias": sample.ratio(
                sums["square_hat"], sums["dot"], undefined="reconstructions are orthogonal to their rows"
            ),
        }
        if self._centre is not None:
            same = math.isnan(fvu.value)
            estimates["ev_legacy"] = fvu if same else sample.ratio(sums["legacy"], n)
        return estimates


@dataclass(frozen=True)
class DensityHistogram:
    """How often latents fire.

    Parameters
    ----------
    log10_edges
        Bin edges, powers of ten of the density (fraction of rows on which a latent fires); the first bin starts below
        one firing in all rows seen.
    counts
        Latents per bin; the last bin includes a density of 1.
    dead
        Latents that never fired, which no bin holds.
    n_rows
        Rows seen.
    """

    log10_edges: list[float]
    counts: list[int]
    dead: int
    n_rows: int


class Sparsity:
    """How many latents are active: l0, dead_fraction, dense_fraction and the density of each latent.

    Parameters
    ----------
    n_latents
        Width of the codes.
    """

    def __init__(self, n_latents: int, n_groups: int = N_GROUPS) -> None:
        self.n_latents = n_latents
        self._sums = Sums(n_groups)
        self._fires = torch.zeros(FIRE_GROUPS, n_latents, dtype=torch.int32)
        self._rows = torch.zeros(FIRE_GROUPS, dtype=torch.int64)

    def update(self, codes: Codes, group: Tensor | None = None) -> None:
        """Add the codes of a batch of rows.

        Raises
        ------
        ShapeError
            The codes have another width.
        """
        if codes.n_latents != self.n_latents:
            raise ShapeError(f"codes must have {self.n_latents} latents; they have {codes.n_latents}.")
        device = codes.indices.device
        if self._fires.device != device:
            self._fires, self._rows = self._fires.to(device), self._rows.to(device)
        if group is None:
            group = torch.zeros(codes.n_rows, dtype=torch.long)
        group = group.to(device)
        coarse = group.remainder(FIRE_GROUPS)
        row = torch.repeat_interleave(
            torch.arange(codes.n_rows, device=device), codes.offsets.diff(), output_size=len(codes.indices)
        )
        fired = codes.values != 0
        row, latent = row[fired], codes.indices[fired]
        key = coarse[row] * self.n_latents + latent
        self._fires.view(-1).index_add_(0, key, torch.ones_like(key, dtype=torch.int32))
        self._rows.index_add_(0, coarse, torch.ones_like(coarse))
        count = torch.zeros(codes.n_rows, dtype=torch.float64, device=_home(codes.values))
        count.index_add_(0, row.to(count.device), torch.ones(len(row), dtype=torch.float64, device=count.device))
        self._sums.update(group, fires=count)

    def merge(self, other: Sparsity) -> None:
        """Add what `other` saw."""
        self._sums.merge(other._sums)
        self._fires = self._fires + other._fires.to(self._fires.device)
        self._rows = self._rows + other._rows.to(self._rows.device)

    def merge_ranks(self, ranks: Member) -> None:
        """Add on rank 0 what the others saw. All of it are whole numbers, so that no order changes a bit."""
        self._fires, self._rows = (summed(ranks, each) for each in (self._fires, self._rows))
        first, *others = everyones(ranks, self._sums) or [self._sums]
        for other in others:
            first.merge(other)
        self._sums = first

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process gets: everything, on the CPU."""
        return {**vars(self), "_fires": self._fires.cpu(), "_rows": self._rows.cpu()}

    @property
    def n_rows(self) -> int:
        """Rows seen: counted from the codes, never from what was planned."""
        return int(self._rows.sum())

    def fires(self) -> Tensor:
        """``int64 [n_latents]``: rows on which each latent fired."""
        return self._fires.sum(0, dtype=torch.int64)

    def density(self) -> Tensor:
        """``float64 [n_latents]``: fraction of the rows seen on which each latent fired."""
        return self.fires().cpu().double() / max(self.n_rows, 1)

    def histogram(self) -> DensityHistogram:
        """Latents by density on a log scale, bins taken from the data."""
        fires, n = self.fires().cpu().numpy(), max(self.n_rows, 1)
        start = math.floor(math.log10(1 / n)) if n > 1 else -1
        n_bins = round(-start / HISTOGRAM_STEP)
        place = np.log10(fires[fires > 0] / n) - start
        bins = np.clip(np.floor(place / HISTOGRAM_STEP + 1e-9).astype(int), 0, n_bins - 1)
        counts = np.bincount(bins, minlength=n_bins)
        edges = [start + HISTOGRAM_STEP * index for index in range(n_bins + 1)]
        return DensityHistogram(edges, [int(c) for c in counts], int((fires == 0).sum()), self.n_rows)

    def compute(self, sample: Sample | None = None) -> dict[str, Estimate]:
        """Return the metrics by name.

        A sample without some documents always has more dead latents: what is left out tells the error of that fraction,
        not its bias. Whether a latent is dense changes by jumps: there halves of the documents stand in.

        Raises
        ------
        DataError
            No row was added.
        """
        sums, n = self._sums, self._sums["n"]
        sample = sums.sample(sample, "a metric needs at least one row; none was added.")
        return {
            "l0": sample.ratio(sums["fires"], n),
            "dead_fraction": self._dead(sample),
            "dense_fraction": self._dense(sample),
        }

    def _dead(self, sample: Sample) -> Estimate:
        value = float((self._fires.sum(0) == 0).double().mean())
        coarse = self._coarse(sample)
        if coarse.weights is None:
            return Estimate(value, reason=coarse.reason)
        fired = self._fires[self._rows > 0] > 0
        # Without group g, the latents that fire in g alone are dead as well.
        alone = (fired & (fired.sum(0) == 1)).sum(1).double().cpu().numpy() / self.n_latents
        return Estimate(value, value + alone - alone.mean(), coarse, coarse.reason)

    def _dense(self, sample: Sample) -> Estimate:
        value = float((self.density() > DENSE).double().mean())
        coarse = self._coarse(sample)
        if coarse.weights is None:
            return Estimate(value, reason=coarse.reason)
        rows, fires = self._rows.cpu().float(), self._fires.cpu()
        halves = _halves(np.flatnonzero(rows.numpy()), len(rows))
        limit = DENSE * (halves @ rows)
        dense = torch.zeros(len(halves))
        for block in fires.split(8192, dim=1):
            dense += ((halves @ block.float()) > limit[:, None]).sum(1)
        gaps = (dense.double() / self.n_latents).numpy() - value
        # Both signs of every gap: their mean square is the error, as if each came from leaving out one part.
        gaps = np.concatenate([gaps, -gaps]) / math.sqrt(2 * len(gaps) - 1)
        return Estimate(value, value + gaps, coarse, coarse.reason)

    def _coarse(self, sample: Sample) -> Sample:
        """Return the sample of the groups that firings are kept for."""
        if sample.weights is None:
            return sample
        return Sample.over(self._rows.cpu().numpy(), reason=sample.reason)


def _halves(present: np.ndarray, n_groups: int) -> Tensor:
    """Return halves of the groups that hold rows, drawn at random, ``float32 [HALVES, n_groups]``: 1 for what stays."""
    generator = np.random.Generator(np.random.PCG64(0))
    halves = np.zeros((HALVES, n_groups), np.float32)
    for half in halves:
        half[generator.permutation(present)[: len(present) // 2]] = 1
    return torch.from_numpy(halves)


class Fidelity:
    """What replacing ``x`` by ``x_hat`` costs a language model: ce_*, ce_recovered_*, kl.

    Recovered fractions are ratios of sums over all tokens, never means of ratios.
    """

    def __init__(self, n_groups: int = N_GROUPS) -> None:
        self._sums = Sums(n_groups)

    def update(self, group: Tensor, *, clean: Tensor, sae: Tensor, zero: Tensor, mean: Tensor, kl: Tensor) -> None:
        """Add per-token numbers, each ``[n]`` in nats: the four cross-entropies and KL(clean || sae)."""
        self._sums.update(group, clean=clean, sae=sae, zero=zero, mean=mean, kl=kl)

    def merge(self, other: Fidelity, groups: Tensor | None = None) -> None:
        """Add what `other` saw; `groups` as in `Sums.merge`."""
        self._sums.merge(other._sums, groups)

    @property
    def tokens_per_group(self) -> np.ndarray:
        """``float64 [n_groups]`` predicted tokens."""
        return self._sums["n"]

    def compute(self, sample: Sample | None = None) -> dict[str, Estimate]:
        """Return the metrics by name.

        Raises
        ------
        DataError
            No token was added.
        """
        sums, n = self._sums, self._sums["n"]
        empty = "cross-entropy needs at least one predicted token; there was none. Give longer texts."
        sample = sums.sample(sample, empty)
        estimates = {f"ce_{name}": sample.ratio(sums[name], n) for name in ("clean", "sae", "zero", "mean")}
        estimates |= {f"ce_recovered_{name}": self._recovered(name, sample) for name in ("zero", "mean")}
        return estimates | {"kl": sample.ratio(sums["kl"], n)}

    def _recovered(self, name: str, sample: Sample) -> Estimate:
        """Return which fraction of what an ablation costs the SAE gives back."""
        sums = self._sums
        cost = sums[name] - sums["clean"]
        why = f"{name}-ablation costs the model nothing here"
        if cost.sum() <= 0:
            return Estimate(math.nan, reason=f"undefined: {why}")
        recovered = sample.ratio(sums[name] - sums["sae"], cost, undefined=why)
        if sample.weights is not None and (sample.weights @ cost <= 0).any():
            return Estimate(recovered.value, reason=f"no interval: {why} without some documents")
        return recovered


def fvu(x: Tensor, x_hat: Tensor) -> float:
    """Fraction of variance unexplained: ``sum ||x - x_hat||^2 / sum ||x - mean(x)||^2``.

    0 is perfect; 1 is as good as predicting the mean row. Float64; sums run over all rows before the division.

    Parameters
    ----------
    x, x_hat
        ``[n, d]`` rows and their reconstructions.

    Returns
    -------
    float
        At least 0; NaN if all rows of `x` are the same. Equals
        ``1 - r2_score(x, x_hat, multioutput="variance_weighted")``.

    Raises
    ------
    ShapeError, DataError
        See `Reconstruction.update`.

    Examples
    --------
    >>> x = torch.tensor([[0., 0.], [2., 2.]])
    >>> fvu(x, x.mean(0).expand(2, 2))
    1.0
    """
    accumulator = Reconstruction(x.shape[-1], n_groups=1)
    accumulator.update(x, x_hat)
    return accumulator.compute()["fvu"].value


def check_rows(x: Tensor, d: int) -> None:
    """Refuse rows that are not ``[n, d]`` or not finite.

    Raises
    ------
    ShapeError, DataError
    """
    if x.ndim != 2 or x.shape[1] != d:
        raise ShapeError(f"rows must have shape (n, {d}); they have {tuple(x.shape)}.")
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).any(1).nonzero()[0])
        raise DataError(
            f"rows must be finite; row {bad} of this batch of {len(x)} holds NaN or infinity. "
            "Look at the model's dtype (float16 overflows) or drop such rows before."
        )


def double(x: Tensor) -> Tensor:
    """`x` in float64, on the CPU where the device has none."""
    return x.detach().to(_home(x), torch.float64)


def _home(x: Tensor) -> torch.device:
    return torch.device("cpu") if x.device.type == "mps" else x.device
