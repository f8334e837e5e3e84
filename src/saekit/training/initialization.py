"""Initialization: the centre and the scale of the rows, weights, and levels for thresholds; from the first rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError, NonFiniteError, ShapeError, listed
from ..rows.source import Batch, Source

FIRST_ROWS = 100_000
"""Maximum number of rows from which centre and scale are computed: the error of their mean is 0.3% of a standard
deviation. Unit: rows."""

FIRST_BYTES = 512 * 2**20
"""Maximum memory of these rows (float32), so that wide rows fit an ordinary machine. Unit: bytes."""

MEDIAN_ROWS = 16_384
"""Rows (evenly spaced among the first ones) that the geometric median is computed from, in up to 200 passes. Unit:
rows."""

SAMPLE_ROWS = 2_048
"""Rows that initial thresholds are fitted on: enough to place a quantile, cheap at any width. Unit: rows."""

AFFINE_ROWS = 8_192
"""Rows that `affine_map` takes into double precision at a time. Unit: rows."""

LEAST_EIGENVALUE = 1e-10
"""Directions of the rows with less than this fraction of the largest eigenvalue explain nothing in `affine_map`, since
float32 rows do not determine them."""

LEAST_NORM = 1e-12
"""Lengths are divided by at least this, so that a row of zeros stays one."""

BLOCK_BYTES = 16 * 2**20
"""Memory of the pre-activations that `level_of` computes at a time: about a processor's cache. Unit: bytes."""


@dataclass(frozen=True)
class Targets:
    """What is known of the targets of a transcoder before its first step."""

    bias: Tensor
    """Initial `b_dec` ``[d_out]``, in the units of the targets."""
    scale: Tensor | None
    """Factor ``[]`` from targets to scaled targets; None for none."""
    sample: Tensor
    """Targets ``[n, d_out]`` of the rows that thresholds are fitted on, in their own units."""
    affine: tuple[Tensor, Tensor] | None = None
    """From `affine_map`, for a skip path that begins there."""

    def scaled(self, y: Tensor) -> Tensor:
        """Return numbers in the units of the targets as those of scaled targets."""
        return y if self.scale is None else y * self.scale


def first_rows(total_rows: int, d_in: int) -> int:
    """Return the number of rows that the initialization of a run is computed from."""
    return min(FIRST_ROWS, total_rows, max(FIRST_BYTES // (4 * d_in), 1))


def geometric_median(x: Tensor, *, tolerance: float = 1e-6, max_iterations: int = 200) -> Tensor:
    """Return the point that minimizes ``sum_i ||x_i - m||``, by Weiszfeld's iteration from the mean.

    Parameters
    ----------
    x
        Rows ``[n, d]``.
    tolerance
        Stop when the point moves by less than this fraction of the rows' mean distance from it.
    max_iterations
        Stop after this many in any case.

    Returns
    -------
    Tensor
        ``[d]``. Unlike the mean it does not follow a few far rows.
    """
    # From the first row on: sums of rows far from 0 round, and rows that are all alike must give that very row.
    offset = x - x[0]
    median = offset.mean(0)
    for _ in range(max_iterations):
        distance = (offset - median).norm(dim=1)
        typical = distance.mean()
        # A row at the point itself would get infinite weight.
        weight = 1 / distance.clamp(min=1e-6 * float(typical) + 1e-30)
        following = (weight @ offset) / weight.sum()
        moved = (following - median).norm()
        median = following
        if float(moved) <= tolerance * float(typical):
            break
    return x[0] + median


def initial_bias(x: Tensor, kind: str) -> Tensor:
    """Return the initial `b_dec` ``[d]`` in the units of the rows: ``geometric-median``, ``mean`` or ``zero``."""
    if kind == "zero":
        return torch.zeros(x.shape[1])
    if kind == "mean":
        return x.double().mean(0).float()
    stride = -(-len(x) // MEDIAN_ROWS)
    return geometric_median(x[::stride])


def initial_scale(x: Tensor, kind: str, bias: Tensor) -> Tensor | None:
    """Return the factor ``[]`` that gives rows a mean length of ``sqrt(d_in)``; None for ``none``, 1 for length 0.

    The length of a row is its distance from `bias` ``[d_in]`` for ``centered``, its norm for ``scalar``. Losses see
    centred rows: a factor from norms shrinks them where the mean of the rows is far from 0, and no learning rate,
    bandwidth or coefficient fits them then.
    """
    if kind == "none":
        return None
    norm = (x - bias if kind == "centered" else x).norm(dim=1).double().mean().float()
    return torch.where(norm > 0, x.shape[1] ** 0.5 / norm, torch.ones(()))


def initial_weights(
    n_latents: int,
    d_in: int,
    generator: torch.Generator,
    like: Tensor | None = None,
    span: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return random unit decoder rows, an encoder that copies them, and a bias of zeros.

    The encoder is the decoder's transpose at first because few latents then die (2406.04093); its memory is its own.
    The rows are uniform on the sphere or, with `like`, Gaussian with the covariance of these rows ``[n, d_in]`` before
    they are scaled to length 1: a decoder that stays as it is then is the stronger baseline (2602.14111). With `span`
    ``[r, d_in]`` they are projected onto the space of its rows, which are orthonormal (2508.16929).
    """
    W_dec = torch.randn(n_latents, d_in, generator=generator)
    if like is not None:
        W_dec = W_dec @ covariance_root(like).T
    if span is not None:
        W_dec = W_dec @ span.T @ span
    W_dec = unit_rows(W_dec)
    return {"W_enc": W_dec.clone(), "b_enc": torch.zeros(n_latents), "W_dec": W_dec}


def initial_transcoder(
    n_latents: int,
    widths: tuple[int, int],
    generator: torch.Generator,
    like: Tensor | None = None,
    spans: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return random unit encoder rows ``[n_latents, d_in]`` and decoder rows ``[n_latents, d_out]``, and zeros as bias.

    They cannot be tied, as those of an SAE are. Decoder rows that point where the targets of each encoder row's rows
    lie end no better: an MLP of stories260K, 512 latents, k 16, 200,000 rows, two seeds each: FVU .2473 and .2465
    against .2473 and .2420; with a skip path .2312 and .2282 against .2332 and .2331.

    Parameters
    ----------
    n_latents, widths
        Number of latents; d_in and d_out.
    generator
        Draws the encoder, then the decoder.
    like, spans
        As in `initial_weights`: targets ``[n, d_out]``; directions ``[r, d_in]`` and ``[r, d_out]``.
    """
    of_enc, of_dec = (None, None) if spans is None else spans
    encoder = initial_weights(n_latents, widths[0], generator, span=of_enc)
    decoder = initial_weights(n_latents, widths[1], generator, like, of_dec)
    return {**encoder, "W_dec": decoder["W_dec"]}


def unit_rows(W: Tensor) -> Tensor:
    """Return the rows of ``[n, d]`` at length 1; those of zeros stay so."""
    return W / W.norm(dim=1, keepdim=True).clamp(min=LEAST_NORM)


def affine_map(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return W ``[d_in, d_out]`` and b ``[d_out]`` with the least squared error of ``x W + b`` for y, in float32.

    Where several W do, the shortest: columns of x that say the same share what they explain.
    """
    at_x, at_y = x.double().mean(0), y.double().mean(0)
    squares, products = (at_x.new_zeros(len(at_x), len(each)) for each in (at_x, at_y))
    for rows, targets in zip(x.split(AFFINE_ROWS), y.split(AFFINE_ROWS)):
        away = rows.double() - at_x
        squares += away.T @ away
        products += away.T @ (targets.double() - at_y)
    W = torch.linalg.pinv(squares, rtol=LEAST_EIGENVALUE, hermitian=True) @ products
    return W.float(), (at_y - at_x @ W).float()


def principal_directions(x: Tensor, fraction: float) -> Tensor:
    """Return the directions ``[r, d]`` of largest variance of rows ``[n, d]``, r a fraction of d, at least 1.

    There are no more of them than the rows span. A threshold on the variance would give r = 1 where one rogue dimension
    has nearly all of it; hence the fraction of the dimensions.
    """
    centred = x.double() - x.double().mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    spanned = int((values > 1e-6 * values.max()).sum())
    return directions[: max(1, min(round(fraction * x.shape[1]), spanned))].to(x.dtype)


def covariance_root(x: Tensor) -> Tensor:
    """Return the lower triangular L ``[d, d]`` with ``L L^T`` the covariance of rows, also of rows in a subspace."""
    centred = x.double() - x.double().mean(0)
    covariance = centred.T @ centred / len(x)
    typical = float(covariance.trace()) / len(covariance)
    ridge = (1e-6 * typical or 1.0) * torch.eye(len(covariance), dtype=torch.float64)
    return torch.linalg.cholesky(covariance + ridge).to(x.dtype)


def level_of(x: Tensor, W_enc: Tensor, bias: Tensor, l0: float) -> Tensor:
    """Return the value ``[]`` that `l0` pre-activations of a row reach on average, the largest such value.

    Works on a block of rows at a time and keeps ``l0 * n`` values.

    Parameters
    ----------
    x
        Centred rows ``[n, d]``, at least one.
    W_enc, bias
        Encoder ``[n_latents, d]`` and ``[n_latents]``.
    l0
        0 to n_latents; ``l0 * n`` is rounded, and at least 1.
    """
    wanted = min(max(round(l0 * len(x)), 1), len(x) * len(bias))
    block = max(1, BLOCK_BYTES // (4 * len(bias)))
    largest = bias.new_empty(0)
    for rows in x.split(block):
        found = torch.addmm(bias, rows, W_enc.T).flatten()
        if len(largest) == wanted:
            found = found[found > largest.min()]
        largest = torch.cat([largest, found])
        if len(largest) > wanted:
            largest = largest.topk(wanted, sorted=False).values
    return largest.min()


def read_first_rows(batches: Iterable[Batch], wanted: int) -> tuple[list[Batch], list[Tensor]]:
    """Read whole batches until `wanted` rows are there.

    Returns the batches, and on the CPU those rows ``[wanted or fewer, d]`` and, where they have some, their targets.
    """
    head: list[Batch] = []
    have = 0
    for batch in batches:
        head.append(batch)
        have += len(batch.x)
        if have >= wanted:
            break
    parts = zip(*(batch.matrices for batch in head))
    return head, [torch.cat(each)[:wanted].float().cpu() for each in parts]


def check_first_rows(matrices: Sequence[Tensor], source: Source, names: Sequence[str] = ()) -> None:
    """Refuse rows, and targets, that cannot be trained on; `names` are those of the learners, for the message.

    Raises
    ------
    ShapeError
        The rows have another width than the source says, or targets that it promises are missing.
    NonFiniteError
        A value is NaN or infinite.
    DataError
        The square of a norm is too large for float32.
    """
    widths = {"d_in": source.d_in} | ({} if source.info.get("d_out") is None else {"d_out": source.info["d_out"]})
    if [each.shape[1] for each in matrices] != list(widths.values()):
        raise ShapeError(
            f"train: rows{' and targets' if len(widths) > 1 else ''} must have width "
            f"{' and '.join(f'{name}={width}' for name, width in widths.items())}, as the source says; got "
            f"{' and '.join(str(tuple(each.shape)) for each in matrices)}."
        )
    for rows in matrices:
        _check_numbers(rows, names)


def _check_numbers(rows: Tensor, names: Sequence[str]) -> None:
    if not bool(torch.isfinite(rows).all()):
        where = f"; learners {listed(names)}" if names else ""
        raise NonFiniteError(
            f"train: rows must be finite; NaN or infinity among the first {len(rows)} rows, before step 1{where}. "
            "No checkpoint exists. Look for overflow in the captured model (half precision)."
        )
    squares = rows.pow(2).sum(1)
    if not bool(torch.isfinite(squares).all()):
        row = int((~torch.isfinite(squares)).nonzero()[0])
        raise DataError(
            f"train: squared norms of rows must fit into float32; row {row} has numbers up to "
            f"{float(rows[row].abs().max()):.3g}. Scale the rows."
        )
