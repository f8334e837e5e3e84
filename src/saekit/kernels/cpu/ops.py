"""What a training step needs on a CPU: pairs of rows and latents, their sums, gradients and updates.

`saekit.kernels.cuda.ops` has the same names for a CUDA device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..step_interface import Adam, Encoder, Fit, Gradients, Pairs, Revived, Scalar, Terms
from . import adam_numba, decode_numba, gradients_numba, low_bit_matmul, rounding_numba
from .buffers import CHUNK, _spread, buffer
from .encode import _encode, _encode_above, _encode_prefixes, _round, _round_latents

PANEL_BYTES = 12 * 2**20
"""Columns of the rows and of their gradients that are read over and over, latent by latent. Unit: bytes."""


array = np
"""The library that the numbers of a step belong to."""


def number(value: Tensor) -> Scalar:
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


def smallest_of_largest(values: np.ndarray, count: int) -> Scalar:
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


def variance(x: Tensor) -> Scalar:
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


def join(parts: Sequence[Pairs[np.ndarray]]) -> Pairs[np.ndarray]:
    """Pairs[np.ndarray] of several sets of rows, one set after the other."""
    starts = np.cumsum([0, *(len(part.latents) for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts)]
    latents, values = (np.concatenate([getattr(part, name) for part in parts]) for name in ("latents", "values"))
    return Pairs(np.concatenate([*offsets, starts[-1:]]), latents, values)


def even_pairs(values: np.ndarray, latents: np.ndarray) -> Pairs[np.ndarray]:
    """As many pairs in every row, ``[n, k]`` each."""
    n, k = values.shape
    return Pairs(
        np.arange(0, n * k + 1, k), np.ascontiguousarray(latents).ravel(), np.ascontiguousarray(values).ravel()
    )


def topk_pairs(x: Tensor, encoder: Encoder, k: int) -> Pairs[np.ndarray]:
    """The `k` largest of each row, after ReLU (0 where the pre-activation was not positive)."""
    values, indices = _encode(x, encoder.W, encoder.bias, encoder.rounded, k, None, True)
    return Pairs(np.arange(0, len(x) * k + 1, k), indices.view(-1).numpy(), values.view(-1).numpy())


def topk_pairs_of_prefixes(x: Tensor, encoder: Encoder, prefixes: Sequence[tuple[int, int]]) -> list[Pairs[np.ndarray]]:
    """`topk_pairs` of the first `size` latents for each ``(size, k)``, from one product of all latents."""
    found = _encode_prefixes(x, encoder.W, encoder.bias, encoder.rounded, prefixes, None, True)
    return [even_pairs(values.numpy(), indices.numpy()) for values, indices in found]


def topk_pairs_of_some(x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> Pairs[np.ndarray]:
    """The `k` largest of each row among some latents, after ReLU, in no order; an `Encoder` loses its copy.

    Always from bf16: the order follows the format, and the choice of that what other encoders have met.
    """
    values, indices = _encode(x, W_enc, bias, _round(W_enc, "some", packed=low_bit_matmul.pays()), k, None, True, False)
    return even_pairs(values.numpy(), indices.numpy())


def pairs_above(x: Tensor, encoder: Encoder, level: Tensor, room: int) -> Pairs[np.ndarray] | None:
    """All pre-activations above a level ``[n_latents]`` of any sign; None when a row has more than `room`, or when
    something is not finite.
    """
    found = _encode_above(x, encoder.W, encoder.bias, encoder.rounded, level, room, None, all_or_none=True)
    return None if found is None else Pairs(*found[:3])


def reconstruct(
    x: Tensor,
    pairs: Pairs[np.ndarray],
    codes: np.ndarray,
    W_dec: Tensor,
    offset: Tensor,
    weight: float = 1.0,
    name: str = "",
) -> Fit[np.ndarray]:
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
    x: Tensor,
    offset: Tensor,
    weights: dict[str, Tensor],
    terms: Terms[np.ndarray],
    *,
    stretch: np.ndarray | None = None,
    revived: Revived | None = None,
    name: str = "",
) -> Gradients[np.ndarray]:
    """See `saekit.kernels.step_interface.StepKernels.gradients`."""
    n, d = x.shape
    pairs, wanted, gradient = terms.pairs, terms.wanted, terms.gradient
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
        pairs.offsets, terms.codes, pairs.latents, terms.slopes, wanted, offsets[:-1].copy(), rows, code, slope
    )  # fmt: skip
    sources = rows
    if len(pairs.offsets) - 1 > n:
        rows = sources % np.int32(n)
    elif terms.sections:
        sources = rows.copy()
        for edge in terms.sections:
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
    weights: dict[str, Tensor],
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    g: Gradients[np.ndarray],
    others: dict[str, np.ndarray],
    adam: Adam,
) -> Scalar:
    """See `saekit.kernels.step_interface.StepKernels.descend`."""
    W_enc, W_dec, b_enc = (weights[name].numpy() for name in ("W_enc", "W_dec", "b_enc"))
    of_bias = others.get("b_enc", g.of_bias)
    lengths = g.squares + np.square(of_bias, dtype=np.float64)
    if adam.unit:  # what projection removes from the gradient of a row of length 1 is the square of `along`
        lengths -= np.square(g.along, dtype=np.float64)
    # Sorted, so that the sum does not depend on the order of the latents.
    total = np.sort(lengths).sum()
    for name, gradient in others.items():
        if name != "b_enc":
            total += np.sort(np.square(gradient, dtype=np.float64)).sum()
    norm = float(np.sqrt(np.maximum(total, 0.0)))
    factor = 1.0 if adam.clip is None else min(1.0, adam.clip / (norm + 1e-6))
    if not np.isfinite(norm):
        factor = np.nan  # as in plain torch: nothing survives, and the caller sees it

    def numbers(name: str) -> tuple[np.float32, ...]:
        return tuple(np.float32(value) for value in (factor, *adam.factors(name)))

    moments = [group[name].numpy() for group in (first, second) for name in ("W_enc", "W_dec", "b_enc")]
    _spread(
        adam_numba.update_latents, len(W_enc), 32 * W_enc.shape[1], g.of_dec, g.of_enc, of_bias, g.along,
        W_enc, W_dec, b_enc, *moments, adam.unit, *numbers("W_enc"),
    )  # fmt: skip
    for name, gradient in others.items():
        if name != "b_enc":
            moving = (group[name].numpy() for group in (weights, first, second))
            adam_numba.adam_row(gradient.astype(np.float32, copy=False), *moving, *numbers(name))
    return norm
