"""What a training step needs on a CPU: pairs of rows and latents, their sums, gradients and updates.

`saekit.kernels.cuda.ops` has the same names for a CUDA device.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..reference import Adam
from . import adam_numba, decode_numba, gradients_numba, low_bit_matmul, rounding_numba
from .buffers import CHUNK, _spread, buffer
from .encode import _encode, _encode_above, _encode_prefixes, _round, _round_latents, _Rounded

PANEL_BYTES = 12 * 2**20
"""Columns of the rows and of their gradients that are read over and over, latent by latent. Unit: bytes."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder at one step: what it subtracts from rows is a part of the bias."""

    W: Tensor
    bias: Tensor
    """``b_enc - W_enc @ offset``, ``[n_latents]``."""
    rounded: _Rounded


@dataclass(frozen=True, eq=False)
class Pairs:
    """(row, latent) pairs, row by row."""

    offsets: np.ndarray
    """``[n_rows + 1]`` int64."""
    latents: np.ndarray
    """``[n_pairs]`` int64."""
    values: np.ndarray
    """Pre-activations or codes, ``[n_pairs]`` float32."""

    def where(self, kept: np.ndarray) -> Pairs:
        """The pairs that `kept` ``[n_pairs]`` bool marks."""
        before = np.zeros(len(kept) + 1, np.int64)
        np.cumsum(kept, out=before[1:])
        return Pairs(before[self.offsets], self.latents[kept], self.values[kept])


@dataclass(frozen=True, eq=False)
class Fit:
    """A reconstruction, differentiated."""

    error: float
    """Sum over rows of ``||x - x_hat||^2``."""
    gradient: Tensor
    """Of the loss by ``x_hat``, ``[n, d]``."""
    slopes: np.ndarray
    """``gradient . W_dec[latent]`` of each pair."""
    columns: np.ndarray
    """``gradient`` summed over rows, ``[d]``."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradient of all weights with a latent axis."""

    of_enc: np.ndarray
    of_dec: np.ndarray
    """Before projection."""
    of_bias: np.ndarray
    along: np.ndarray
    """``of_dec[j] . W_dec[j]``, ``[n_latents]``."""
    squares: np.ndarray
    """``|of_dec[j]|^2 + |of_enc[j]|^2``, ``[n_latents]``."""
    of_offset: np.ndarray
    """What the bias passes on to the offset, ``[d]``."""
    counts: np.ndarray
    """Pairs of each latent, ``[n_latents]``."""


array = np
"""The library that the numbers of a step belong to."""


def number(value: Tensor) -> np.float32:
    """A running value to compute with."""
    return np.float32(float(value))


def numbers(t: Tensor) -> np.ndarray:
    """A tensor to compute with, in the same memory."""
    return t.numpy()


def tensor(values: np.ndarray) -> Tensor:
    """The inverse of `numbers`."""
    return torch.from_numpy(values)


def counts_of(latents: np.ndarray, n_latents: int) -> np.ndarray:
    """How often each latent is there, ``[n_latents]`` int64."""
    return np.bincount(latents, minlength=n_latents)


def sums_of(latents: np.ndarray, weights: np.ndarray, n_latents: int) -> np.ndarray:
    """Sum of the weights of each latent's pairs, ``[n_latents]`` float64."""
    return np.bincount(latents, weights, n_latents).astype(np.float64, copy=False)


def smallest_of_largest(values: np.ndarray, count: int) -> np.float32:
    """The smallest of the `count` largest values."""
    more = len(values) - count
    return np.partition(values, more)[more]


def room_for(x: Tensor, count: int) -> Tensor:
    """Memory of undefined content for `count` sets of rows like `x`, one after the other."""
    return buffer("sets of rows", (count * len(x), x.shape[1]))


def centered(x: Tensor, scale: Tensor | None, center: Tensor) -> Tensor:
    """``x * scale - center`` in memory that the next call on this thread uses again."""
    x = x.detach().contiguous()
    out = buffer("centered rows", tuple(x.shape))
    factor = np.float32(1.0 if scale is None else float(scale))
    _spread(rounding_numba.center_rows, len(x), 4 * x.shape[1], x.numpy(), factor, center.numpy(), out.numpy())
    return out


def variance(x: Tensor) -> float:
    """``mean over rows of ||x - mean(x)||^2``, at least 1e-12."""
    n, d = x.shape
    parts = -(-n // CHUNK)
    columns, squares = buffer("columns", (parts, d)).numpy(), np.empty(parts, np.float32)
    _spread(rounding_numba.column_sums, parts, CHUNK * d, CHUNK, x.numpy(), columns)
    mean = (columns.sum(0, dtype=np.float64) / n).astype(np.float32)
    _spread(rounding_numba.squares_around, parts, CHUNK * d, CHUNK, x.numpy(), mean, squares)
    return max(float(squares.sum(dtype=np.float64)) / n, 1e-12)


def row_norms(W: Tensor) -> np.ndarray:
    """Length of each row of ``W [n, d]``."""
    norms = np.empty(len(W), np.float32)
    _spread(rounding_numba.row_norms, len(W), W.shape[1], W.numpy(), norms)
    return norms


def encoder_at(W_enc: Tensor, b_enc: Tensor, offset: Tensor, x: Tensor) -> Encoder:
    """The encoder for rows like `x`, from which `offset` is yet to be subtracted."""
    buffer("of enc", tuple(W_enc.shape))  # the copy lies in it, and `gradients` wants it this large
    rounded = _round_latents(W_enc, "W", x, offset)
    return Encoder(W_enc, b_enc - torch.from_numpy(rounded.dot), rounded)


def join(parts: Sequence[Pairs]) -> Pairs:
    """Pairs of several sets of rows, one set after the other."""
    starts = np.cumsum([0, *(len(part.latents) for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts)]
    latents, values = (np.concatenate([getattr(part, name) for part in parts]) for name in ("latents", "values"))
    return Pairs(np.concatenate([*offsets, starts[-1:]]), latents, values)


def even_pairs(values: np.ndarray, latents: np.ndarray) -> Pairs:
    """As many pairs in every row, ``[n, k]`` each."""
    n, k = values.shape
    return Pairs(
        np.arange(0, n * k + 1, k), np.ascontiguousarray(latents).ravel(), np.ascontiguousarray(values).ravel()
    )


def topk_pairs(x: Tensor, encoder: Encoder, k: int, exact: bool = True) -> Pairs:
    """The `k` largest of each row, after ReLU (0 where the pre-activation was not positive)."""
    values, indices = _encode(x, encoder.W, encoder.bias, encoder.rounded, k, None, exact)
    return Pairs(np.arange(0, len(x) * k + 1, k), indices.view(-1).numpy(), values.view(-1).numpy())


def topk_pairs_of_prefixes(x: Tensor, encoder: Encoder, prefixes: Sequence[tuple[int, int]]) -> list[Pairs]:
    """`topk_pairs` of the first `size` latents for each ``(size, k)``, from one product of all latents."""
    found = _encode_prefixes(x, encoder.W, encoder.bias, encoder.rounded, prefixes, None, True)
    return [even_pairs(values.numpy(), indices.numpy()) for values, indices in found]


def topk_pairs_of_some(x: Tensor, W_enc: Tensor, bias: Tensor, k: int, exact: bool = True) -> Pairs:
    """The `k` largest of each row among some latents, after ReLU, in no order; an `Encoder` loses its copy.

    Always from bf16: the order follows the format, and the choice of that what other encoders have met.
    """
    values, indices = _encode(
        x, W_enc, bias, _round(W_enc, "some", packed=low_bit_matmul.pays()), k, None, exact, False
    )
    return even_pairs(values.numpy(), indices.numpy())


def pairs_above(x: Tensor, encoder: Encoder, level: Tensor, room: int) -> Pairs | None:
    """All pre-activations above a level ``[n_latents]`` of any sign; None when a row has more than `room`, or when
    something is not finite.
    """
    found = _encode_above(x, encoder.W, encoder.bias, encoder.rounded, level, room, None, all_or_none=True)
    return None if found is None else Pairs(*found[:3])


def reconstruct(
    x: Tensor, pairs: Pairs, codes: np.ndarray, W_dec: Tensor, offset: Tensor, weight: float = 1.0, name: str = ""
) -> Fit:
    """Decode the pairs and differentiate ``weight * mean over rows of ||x - x_hat||^2``."""
    n, d = x.shape
    parts = -(-n // CHUNK)
    gradient, columns = buffer(f"gradient {name}", (n, d)), buffer("columns", (parts, d)).numpy()
    slopes, squares = buffer(f"slopes {name}", (len(codes),)).numpy(), buffer("squares", (n,)).numpy()
    _spread(
        decode_numba.reconstruct, parts, 4 * CHUNK * d * len(codes) / max(n, 1),
        CHUNK, x.numpy(), pairs.offsets, codes, pairs.latents, W_dec.numpy(), offset.numpy(),
        np.float32(2 * weight / n), gradient.numpy(), slopes, squares, columns,
    )  # fmt: skip
    return Fit(float(squares.sum(dtype=np.float64)), gradient, slopes, columns.sum(0))


def gradients(
    x: Tensor, offset: Tensor, weights: dict[str, Tensor], pairs: Pairs, wanted: np.ndarray, codes: np.ndarray,
    slopes: np.ndarray, gradient: Tensor, *, stretch: np.ndarray | None = None,
    revived: tuple[Tensor, ...] | None = None, sections: Sequence[int] = (), name: str = "",
) -> Gradients:  # fmt: skip
    """Sums over each latent's pairs: ``of_dec = sum code * gradient[row]``, ``of_enc = sum slope * (x[row] - offset)``.

    Parameters
    ----------
    x, offset, weights
        Centred rows ``[n, d]``, ``b_dec`` minus the centre ``[d]``, and at least ``W_enc`` and ``W_dec``.
    pairs, wanted, codes, slopes
        Pairs; which of them count ``[n_pairs]`` bool; their codes, and the gradient of their pre-activations. With
        more rows than `x` has they are row r + n, r + 2 n, ... of it.
    gradient
        Of the loss by the reconstruction, ``[n, d]`` or ``[m * n, d]``.
    stretch
        ``[n_latents]``; ``stretch[j] * W_dec[j]`` is added to `of_dec`.
    revived
        Latents ``[m]`` int64 and a further gradient of their decoder rows, encoder rows and biases.
    sections
        Edges of groups of latents, each of which takes the next n rows of `gradient`.
    name
        The gradients lie in memory that the next call with this name uses again.
    """
    n, d = x.shape
    W_enc, W_dec = weights["W_enc"], weights["W_dec"]
    n_latents = len(W_enc)
    slot, more = np.full(n_latents, -1, np.int32), [torch.empty((0, d)), torch.empty((0, d)), torch.empty(0)]
    if revived is not None:
        slot[revived[0].numpy()] = np.arange(len(revived[0]), dtype=np.int32)
        more = list(revived[1:])
    offsets = np.zeros(n_latents + 1, np.int64)
    gradients_numba.count_by_latent(pairs.latents, wanted, offsets)
    count = int(offsets[-1])
    rows = buffer("rows", (count,), torch.int32).numpy()
    code, slope = buffer("code", (count,)).numpy(), buffer("slope", (count,)).numpy()
    gradients_numba.sort_by_latent(
        pairs.offsets, codes, pairs.latents, slopes, wanted, offsets[:-1].copy(), rows, code, slope
    )  # fmt: skip
    sources = rows
    if len(pairs.offsets) - 1 > n:
        rows = sources % np.int32(n)
    elif sections:
        sources = rows.copy()
        for edge in sections:
            sources[offsets[edge] :] += np.int32(n)
    chunks = -(-n_latents // CHUNK)
    of_dec, of_enc = (buffer(f"{name}of {part}", (n_latents, d)).numpy() for part in ("dec", "enc"))
    of_bias, of_offset = np.empty(n_latents, np.float32), buffer("of offset", (chunks, d)).numpy()
    along, squares = np.zeros(n_latents, np.float32), np.zeros(n_latents)
    stretch = np.zeros(n_latents, np.float32) if stretch is None else stretch
    cost = 4 * count * d / n_latents
    for left, right in _panels(len(gradient), d):
        _spread(
            gradients_numba.gradient_of_decoder, n_latents, cost, left, right, offsets, sources, code, gradient.numpy(),
            W_dec.numpy(), slot, more[0].numpy(), stretch, of_dec, along, squares,
        )  # fmt: skip
    for left, right in _panels(n, d):
        _spread(
            gradients_numba.gradient_of_encoder, chunks, CHUNK * cost, CHUNK, left, right, offsets, rows, slope,
            x.numpy(),
            offset.numpy(), W_enc.numpy(), slot, more[1].numpy(), more[2].numpy(), of_enc, of_bias, of_offset,
            squares,
        )  # fmt: skip
    return Gradients(of_enc, of_dec, of_bias, along, squares, -of_offset.sum(0), np.diff(offsets))


def _panels(n: int, d: int) -> list[tuple[int, int]]:
    """Columns of ``[n, d]`` in panels that stay in the last cache."""
    panels = max(1, round(4 * n * d / PANEL_BYTES))
    edges = [16 * (d * panel // (16 * panels)) for panel in range(panels)] + [d]
    return list(itertools.pairwise(edges))


def descend(
    weights: dict[str, Tensor], first: dict[str, Tensor], second: dict[str, Tensor], g: Gradients,
    others: dict[str, np.ndarray], adam: Adam, *, clip: float | None, unit: bool, rates: Mapping[str, float] = {},
) -> float:  # fmt: skip
    """Clipping, Adam and (with `unit`) decoder rows of length 1, in place; returns the length of the gradient.

    `others` are gradients of further weights, `b_dec` among them; ``others["b_enc"]`` stands in for the gradient of the
    bias in `g`. `rates` multiply the learning rate of some of them.
    """
    W_enc, W_dec, b_enc = (weights[name].numpy() for name in ("W_enc", "W_dec", "b_enc"))
    of_bias = others.get("b_enc", g.of_bias)
    lengths = g.squares + np.square(of_bias, dtype=np.float64)
    if unit:  # what projection removes from the gradient of a row of length 1 is the square of `along`
        lengths -= np.square(g.along, dtype=np.float64)
    # Sorted, so that the sum does not depend on the order of the latents.
    total = np.sort(lengths).sum()
    for name, gradient in others.items():
        if name != "b_enc":
            total += np.sort(np.square(gradient, dtype=np.float64)).sum()
    norm = float(np.sqrt(np.maximum(total, 0.0)))
    factor = min(1.0, clip / (norm + 1e-6)) if clip is not None else 1.0
    if not np.isfinite(norm):
        factor = np.nan  # as in plain torch: nothing survives, and the caller sees it
    memory1, memory2, rate, root, eps = adam.factors()

    def numbers(name: str) -> tuple[np.float32, ...]:
        values = factor, memory1, memory2, rate * rates.get(name, 1.0), root, eps
        return tuple(np.float32(value) for value in values)

    moments = [group[name].numpy() for group in (first, second) for name in ("W_enc", "W_dec", "b_enc")]
    _spread(
        adam_numba.update_latents, len(W_enc), 32 * W_enc.shape[1], g.of_dec, g.of_enc, of_bias, g.along,
        W_enc, W_dec, b_enc, *moments, unit, *numbers("W_enc"),
    )  # fmt: skip
    for name, gradient in others.items():
        if name != "b_enc":
            moving = (group[name].numpy() for group in (weights, first, second))
            adam_numba.adam_row(gradient.astype(np.float32, copy=False), *moving, *numbers(name))
    return norm
