"""What a training step needs on a CPU: pairs of rows and latents, their sums, gradients and updates.

`saekit.kernels.cuda.ops` has the same names for a CUDA device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..step_interface import Adam, Encoder, Fit, Gradients, Pairs, Revived, Scalar, Terms
from . import adam_numba, decode_numba, gradients_numba, rows_numba
from .adam_numba import Factors, LatentGradient, LatentWeights
from .buffers import buffer
from .decode_numba import Codes, Decoder, Differentiated
from .encode import encode_above, encode_prefixes
from .gradients_numba import More, OfDecoder, OfEncoder, PairTerms, Panel, Rows, SortedTerms, Sums
from .rounded import CACHED, round_fastest, round_for_some
from .threads import CHUNK, spread

PANEL_BYTES = 12 * 2**20
"""Columns of the rows and of their gradients that are read over and over, latent by latent: they should stay in the
last cache. Unit: bytes."""

LATENT_WEIGHTS = ("W_enc", "W_dec", "b_enc")
"""Names of the weights that are updated latent by latent."""


array = np
"""The library that the numbers of a step belong to."""


def number(value: Tensor) -> Scalar:
    """Return a running value to compute with."""
    return np.float32(float(value))


def numbers(t: Tensor) -> np.ndarray:
    """Return a tensor to compute with, in the same memory."""
    return t.numpy()


def tensor(values: np.ndarray) -> Tensor:
    """Return the inverse of `numbers`."""
    return torch.from_numpy(values)


def counts_of(latents: np.ndarray, n_latents: int) -> np.ndarray:
    """Return how often each latent occurs, ``[n_latents]`` int64."""
    return np.bincount(latents, minlength=n_latents)


def sums_of(latents: np.ndarray, weights: np.ndarray, n_latents: int) -> np.ndarray:
    """Return the sum of the weights of each latent's pairs, ``[n_latents]`` float64."""
    return np.bincount(latents, weights, n_latents).astype(np.float64, copy=False)


def smallest_of_largest(values: np.ndarray, count: int) -> Scalar:
    """Return the smallest of the `count` largest values."""
    more = len(values) - count
    return np.partition(values, more)[more]


def room_for(x: Tensor, count: int) -> Tensor:
    """Return memory of undefined content for `count` sets of rows like `x`, one after the other."""
    return buffer("sets of rows", (count * len(x), x.shape[1]))


def centered(x: Tensor, scale: Tensor | None, center: Tensor) -> Tensor:
    """Return ``x * scale - center`` in memory that the next call on this thread uses again."""
    x = x.detach().contiguous()
    out = buffer("centered rows", tuple(x.shape))
    factor = np.float32(1.0 if scale is None else float(scale))
    spread(rows_numba.center_rows, len(x), 4 * x.shape[1], x.numpy(), factor, center.numpy(), out.numpy())
    return out


def variance(x: Tensor) -> Scalar:
    """Return ``mean over rows of ||x - mean(x)||^2``, at least 1e-12."""
    n, d = x.shape
    parts = -(-n // CHUNK)
    columns, squares = buffer("columns", (parts, d)).numpy(), np.empty(parts, np.float32)
    spread(rows_numba.column_sums, parts, CHUNK * d, CHUNK, x.numpy(), columns)
    mean = (columns.sum(0, dtype=np.float64) / n).astype(np.float32)
    spread(rows_numba.squares_around, parts, CHUNK * d, CHUNK, x.numpy(), mean, squares)
    return max(float(squares.sum(dtype=np.float64)) / n, 1e-12)


def row_norms(W: Tensor) -> np.ndarray:
    """Return the length of each row of ``W [n, d]``."""
    norms = np.empty(len(W), np.float32)
    spread(rows_numba.row_norms, len(W), W.shape[1], W.numpy(), norms)
    return norms


def encoder_at(W_enc: Tensor, b_enc: Tensor, offset: Tensor, x: Tensor) -> Encoder:
    """Return the encoder for rows like `x`, from which `offset` is yet to be subtracted."""
    buffer("of enc", tuple(W_enc.shape))  # the copy lies in it, and `gradients` wants it this large
    rounded = round_fastest(W_enc, "W", x, offset)
    return Encoder(W_enc, b_enc - torch.from_numpy(rounded.facts.dot), rounded)


def join(parts: Sequence[Pairs[np.ndarray]]) -> Pairs[np.ndarray]:
    """Pairs[np.ndarray] of several sets of rows, one set after the other."""
    starts = np.cumsum([0, *(len(part.latents) for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts)]
    latents, values = (np.concatenate([getattr(part, name) for part in parts]) for name in ("latents", "values"))
    return Pairs(np.concatenate([*offsets, starts[-1:]]), latents, values)


def even_pairs(values: np.ndarray, latents: np.ndarray) -> Pairs[np.ndarray]:
    """Return as many pairs in every row, from ``[n, k]`` each."""
    n, k = values.shape
    return Pairs(
        np.arange(0, n * k + 1, k), np.ascontiguousarray(latents).ravel(), np.ascontiguousarray(values).ravel()
    )


def topk_pairs(x: Tensor, encoder: Encoder, k: int) -> Pairs[np.ndarray]:
    """See `saekit.kernels.step_interface.StepKernels.topk_pairs`."""
    [pairs] = topk_pairs_of_prefixes(x, encoder, [(len(encoder.W), k)])
    return pairs


def topk_pairs_of_prefixes(
    x: Tensor, encoder: Encoder, prefixes: Sequence[tuple[int, int]]
) -> list[Pairs[np.ndarray]]:  # fmt: skip
    """See `saekit.kernels.step_interface.StepKernels.topk_pairs_of_prefixes`."""
    found = encode_prefixes(x, encoder.W, encoder.bias, encoder.rounded, prefixes)
    return [even_pairs(values.numpy(), indices.numpy()) for values, indices in found]


def topk_pairs_of_some(x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> Pairs[np.ndarray]:
    """See `saekit.kernels.step_interface.StepKernels.topk_pairs_of_some`.

    Never from whole numbers: the order follows the format, and the choice of that what other encoders have met.
    """
    rounded = round_for_some(W_enc, "some")
    [(values, indices)] = encode_prefixes(x, W_enc, bias, rounded, [(len(W_enc), k)], in_order=False)
    return even_pairs(values.numpy(), indices.numpy())


def pairs_above(x: Tensor, encoder: Encoder, level: Tensor, room: int) -> Pairs[np.ndarray] | None:
    """See `saekit.kernels.step_interface.StepKernels.pairs_above`."""
    found = encode_above(x, encoder.W, encoder.bias, encoder.rounded, level, room=room, all_or_none=True)
    return None if found is None else Pairs(found.offsets, found.latents, found.values)


def reconstruct(
    x: Tensor,
    pairs: Pairs[np.ndarray],
    codes: np.ndarray,
    W_dec: Tensor,
    offset: Tensor,
    weight: float = 1.0,
    name: str = "",
) -> Fit[np.ndarray]:
    """See `saekit.kernels.step_interface.StepKernels.reconstruct`."""
    n, d = x.shape
    parts = -(-n // CHUNK)
    gradient, columns = buffer(f"gradient {name}", (n, d)), buffer("columns", (parts, d)).numpy()
    slopes, squares = buffer(f"slopes {name}", (len(codes),)).numpy(), buffer("squares", (n,)).numpy()
    cost = 4 * CHUNK * d * len(codes) / max(n, 1)
    given = Codes(pairs.offsets, pairs.latents, codes)
    decoder = Decoder(W_dec.numpy(), offset.numpy(), np.float32(2 * weight / n))
    out = Differentiated(gradient.numpy(), slopes, squares, columns)
    spread(decode_numba.reconstruct, parts, cost, CHUNK, x.numpy(), given, decoder, out)
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
    W_enc, W_dec, gradient = weights["W_enc"].numpy(), weights["W_dec"].numpy(), terms.gradient.numpy()
    n_latents = len(W_enc)
    offsets, by_latent = _by_latent(terms, n_latents)
    rows = sources = by_latent.rows
    if len(terms.pairs.offsets) - 1 > n:
        rows = sources % np.int32(n)
    elif terms.sections:
        sources = rows.copy()
        for edge in terms.sections:
            sources[offsets[edge] :] += np.int32(n)
    chunks = -(-n_latents // CHUNK)
    of_dec, of_enc = (buffer(f"{name}of {part}", (n_latents, d)).numpy() for part in ("dec", "enc"))
    squares = np.zeros(n_latents)
    slot, (more_dec, more_enc, more_bias) = _slots(revived, n_latents, d)
    stretch = np.zeros(n_latents, np.float32) if stretch is None else stretch
    written = (np.diff(offsets) > 0) | (slot >= 0) | (stretch != 0)
    # Whole cache lines: memory of this size begins with one.
    past_caches = 4 * n_latents * d > CACHED and d % 16 == 0
    decoder = OfDecoder(Rows(of_dec, written, past_caches), np.zeros(n_latents, np.float32), squares)
    of_bias, of_chunks = np.empty(n_latents, np.float32), buffer("of offset", (chunks, d)).numpy()
    encoder = OfEncoder(Rows(of_enc, written, past_caches), of_bias, of_chunks, squares)
    cost = 4 * len(rows) * d / n_latents
    for panel in _panels(len(gradient), d):
        sums, more = Sums(offsets, sources, by_latent.codes, gradient), More(slot, more_dec, more_bias)
        spread(gradients_numba.gradient_of_decoder, n_latents, cost, panel, sums, more, stretch, W_dec, decoder)
    for panel in _panels(n, d):
        sums, more = Sums(offsets, rows, by_latent.slopes, x.numpy()), More(slot, more_enc, more_bias)
        given = CHUNK, panel, sums, more, (W_enc, offset.numpy()), encoder
        spread(gradients_numba.gradient_of_encoder, chunks, CHUNK * cost, *given)
    of_offset = -encoder.offset.sum(0)  # a fixed number of chunks: the same for any number of threads
    return Gradients(of_enc, of_dec, of_bias, decoder.along, squares, of_offset, np.diff(offsets), written)


def filled(g: Gradients[np.ndarray]) -> Gradients[np.ndarray]:
    """See `saekit.kernels.step_interface.StepKernels.filled`."""
    assert g.written is not None
    g.of_enc[~g.written] = g.of_dec[~g.written] = 0
    return replace(g, written=np.ones_like(g.written))


def _by_latent(terms: Terms[np.ndarray], n_latents: int) -> tuple[np.ndarray, SortedTerms]:
    """Return the wanted pairs sorted by latent, and where each latent's begin."""
    pairs = terms.pairs
    offsets = np.zeros(n_latents + 1, np.int64)
    gradients_numba.count_by_latent(pairs.latents, terms.wanted, offsets)
    shape = (int(offsets[-1]),)
    out = SortedTerms(
        buffer("rows", shape, torch.int32).numpy(), buffer("code", shape).numpy(), buffer("slope", shape).numpy()
    )
    given = PairTerms(pairs.offsets, pairs.latents, terms.codes, terms.slopes, terms.wanted)
    gradients_numba.sort_by_latent(given, offsets[:-1].copy(), out)
    return offsets, out


def _slots(revived: Revived | None, n_latents: int, d: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Return where each latent's further gradient is, -1 for none, and that of decoder, encoder and biases."""
    slot = np.full(n_latents, -1, np.int32)
    if revived is None:
        none = np.empty((0, d), np.float32)
        return slot, (none, none, np.empty(0, np.float32))
    which, *more = revived
    slot[which.numpy()] = np.arange(len(which), dtype=np.int32)
    return slot, tuple(part.numpy() for part in more)


def _panels(n: int, d: int) -> list[Panel]:
    """Return the columns of ``[n, d]`` in panels that stay in the last cache."""
    panels = max(1, round(4 * n * d / PANEL_BYTES))
    edges = [16 * (d * panel // (16 * panels)) for panel in range(panels)] + [d]  # whole cache lines
    return [Panel(left, right) for left, right in itertools.pairwise(edges)]


def descend(
    weights: dict[str, Tensor],
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    g: Gradients[np.ndarray],
    others: dict[str, np.ndarray],
    adam: Adam,
) -> Scalar:
    """See `saekit.kernels.step_interface.StepKernels.descend`."""
    of_bias = others.get("b_enc", g.of_bias)
    others = {name: gradient for name, gradient in others.items() if name != "b_enc"}
    lengths = g.squares + np.square(of_bias, dtype=np.float64)
    if adam.unit:  # what projection removes from the gradient of a row of length 1 is the square of `along`
        lengths -= np.square(g.along, dtype=np.float64)
    norm = _length(lengths, *(np.square(gradient, dtype=np.float64) for gradient in others.values()))
    clip = 1.0 if adam.clip is None else min(1.0, adam.clip / (norm + 1e-6))
    if not np.isfinite(norm):
        clip = np.nan  # as in plain torch: nothing survives, and the caller sees it

    def factors(name: str) -> Factors:
        return Factors(np.float32(clip), *(np.float32(value) for value in adam.factors(name)))

    assert g.written is not None
    moving = [LatentWeights(*(group[name].numpy() for name in LATENT_WEIGHTS)) for group in (weights, first, second)]
    gradient = LatentGradient(g.of_enc, g.of_dec, of_bias, g.along, g.written)
    n_latents, d = g.of_dec.shape
    spread(adam_numba.update_latents, n_latents, 32 * d, gradient, *moving, adam.unit, factors("W_enc"))
    for name, vector in others.items():
        w, m, v = (group[name].numpy() for group in (weights, first, second))
        adam_numba.adam_row(vector.astype(np.float32, copy=False), w, m, v, factors(name))
    return norm


def _length(*squares: np.ndarray) -> float:
    """Return the root of the sum of squares; each set is sorted, so that the order of the latents does not matter."""
    total = 0.0
    for part in squares:
        total += np.sort(part).sum()
    return float(np.sqrt(np.maximum(total, 0.0)))  # rounding may leave a negative sum
