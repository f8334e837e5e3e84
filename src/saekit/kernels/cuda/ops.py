"""Fast kernels for a CUDA device: torch's bf16 product, and Triton loops for everything sparse.

The functions have the names and the meaning of those in `saekit.kernels.cpu.ops`, on tensors instead of numpy arrays: a
product in bf16, a block of rows at a time into memory that the next block uses again, rules latents out; what is left
is multiplied again in fp32. No array of all rows by latents is made, and nothing waits for the device where the number
of pairs is known beforehand.

The bound is that of `saekit.kernels.cpu.ops`, with another term for the sum. A tensor core adds products to an fp32
accumulator and cuts bits off (Fasi et al. 2021, doi:10.7717/peerj-cs.330: at least as good as cutting at the 23rd bit
behind the largest term), so ``|x~.w~ - sum| <= d 2^-22 |x~| |w~|``. The bias is added to that sum in bf16, and what it
lost is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..step_interface import Adam, Encoder, Fit, Gradients, Pairs, Revived, Scalar, Terms
from . import triton_kernels as loops
from .triton_kernels import blocks_of

array = torch
"""The library that the numbers of this module belong to."""

BLOCK_BYTES = 64 * 2**20
"""Size of the buffer for one block of the product: most of it should stay in the last cache. Unit: bytes."""

SEGMENT = 256
"""Pairs of one latent that one program sums: a latent that fires in every row would keep one program busy for long."""

LARGEST_K = 512
"""Maximum latents per row: `best_of` sorts more than twice as many in registers. The plain kernel takes the rest."""

ROUNDING = 2.0**-8 * 1.01 + 2.0**-22
"""Rounding of a product to bf16, and the fp32 rounding of the reference: error relative to the bf16 value."""

ADDING = 2.0**-22
"""Error of one addition on a tensor core, relative to the product of the lengths."""


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()


def _panel(d: int, largest: int) -> int:
    """Return the columns that a program takes at a time: tiles are powers of two, and 16 wide at least."""
    return min(largest, max(16, _power_of_two(d)))


@contextlib.contextmanager
def _full_sums() -> Iterator[None]:
    """Let products inside add up in fp32 to the end: torch's default lets partial sums be rounded to bf16."""
    settings, name = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    before: Any = getattr(settings, name)
    with contextlib.suppress(AttributeError):  # torch has had two numbers there since 2.11
        before = before, getattr(settings, f"{name}_split_k")
    setattr(settings, name, False)
    try:
        yield
    finally:
        setattr(settings, name, before)


# ---------------------------------------------------------------- encode


@dataclass(frozen=True, eq=False)
class _Rounded:
    """bf16 copy of some rows, and upper bounds of their lengths and of what rounding lost of them."""

    bf16: Tensor
    """``[n, d]``."""
    norm: Tensor
    residual: Tensor
    dot: Tensor
    """Product of each row with an offset; undefined without one."""


def _round(x: Tensor, offset: Tensor | None = None) -> _Rounded:
    n, d = x.shape
    rounded = _Rounded(x.new_empty((n, d), dtype=torch.bfloat16), *x.new_empty((3, n)).unbind())
    if n:
        slack = 1.0 + (d + 8) * 2.0**-23  # a sum of d squares in fp32, as in `saekit.kernels.cpu.rounding_numba`
        loops.round_rows[(n,)](
            x, x if offset is None else offset, rounded.bf16, rounded.norm, rounded.residual, rounded.dot, d, slack,
            HAS_OFFSET=offset is not None, BLOCK_D=_panel(d, 1024),
        )  # fmt: skip
    return rounded


@dataclass(frozen=True, eq=False)
class _Bound:
    """How far a bf16 product may be off: ``row * latent + bias``, besides its own rounding."""

    row: Tensor
    latent: Tensor
    bias: Tensor
    most_latent: Tensor
    most_bias: Tensor
    low_bias: Tensor
    """The bias in bf16."""


def _bound(rows: _Rounded, W: _Rounded, bias: Tensor, size: Tensor | None = None) -> _Bound:
    """`size` bounds the numbers that the bias is a sum of; None: it is no sum."""
    d = rows.bf16.shape[1]
    # One factor for all latents, so that the bound of a pair is one product: what rounding lost of each is about the
    # same part of its length.
    loss = (W.residual / W.norm).max() + 2 * (d + 8) * ADDING
    row = torch.addcmul(rows.residual, rows.norm, loss).mul_(1 + 1e-6)
    low = bias.to(torch.bfloat16)
    lost = (bias - low).abs_().add_(bias.abs(), alpha=2 * (d + 12) * ADDING).add_(2.0**-120)
    if size is not None:
        lost.add_(size, alpha=2.0**-21)
    lost.mul_(1 + 1e-6)
    return _Bound(row, W.norm, lost, W.norm.max(), lost.max(), low)


def _blocks(rows: _Rounded, W: _Rounded, bound: _Bound, block_rows: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows with their bf16 pre-activations, in memory that the next block uses again."""
    n, n_latents = len(rows.norm), len(W.norm)
    # 16 rows at least, the height of a tile, even where the product does not stay in a cache.
    block = max(1, min(block_rows or n, n, max(16, BLOCK_BYTES // (2 * n_latents))))
    product = rows.bf16.new_empty((block, n_latents))
    for start in range(0, n, block):
        part = slice(start, min(start + block, n))
        with _full_sums():
            out = torch.addmm(bound.low_bias, rows.bf16[part], W.bf16.T, out=product[: part.stop - part.start])
        yield part, out


def lanes_for(n_latents: int, k: int) -> int:
    """Return how many lanes locate the k largest: a power of two, so many that few lanes hold two of them.

    At most 4,096, which a program of 8 warps keeps in registers, and no more than there are latents.
    """
    wanted = _power_of_two(max(8 * k, n_latents // 8, 256))
    return max(16, min(wanted, 4096, 1 << (n_latents.bit_length() - 1)))


def _select(
    product: Tensor, bound: _Bound, part: slice, candidates: Tensor, counts: Tensor, n_latents: int,
    k: int | None, exact: bool = True,
) -> None:  # fmt: skip
    """Find candidates for the k largest of the first `n_latents`, or with k None for those not below 0."""
    n, width = product.shape
    lanes = lanes_for(n_latents, k or 1)
    loops.select[(n,)](
        product.view(torch.int16), bound.row[part], bound.latent, bound.bias, bound.most_latent, bound.most_bias,
        candidates, counts, n_latents, width, k or 1, candidates.shape[1], ROUNDING, ABOVE=k is None, EXACT=exact,
        LANES=lanes, num_warps=4 if lanes <= 1024 else 8,
    )  # fmt: skip


def _rescore(x: Tensor, W: Tensor, bias: Tensor, candidates: Tensor, counts: Tensor, most: int | None = None) -> Tensor:
    (n, room), d = candidates.shape, x.shape[1]
    scores = x.new_empty((n, room))
    loops.rescore[(n, blocks_of(room if most is None else most, 16))](
        x, W, bias, candidates, counts, scores, d, room, BLOCK_C=16, BLOCK_D=_panel(d, 256)
    )  # fmt: skip
    return scores


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, block_rows: int | None = None, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """`saekit.kernels.reference.topk_encode` by a bf16 product and fp32 rescoring; float32 tensors on one device.

    Parameters
    ----------
    x, W_enc, b_enc, k, block_rows
        As there. `block_rows` also bounds the rows of one product.
    exact
        True: the codes of the fp32 product. False: latents are chosen by the bf16 product alone (about 1% of the
        choices differ); their values are fp32 all the same.

    Returns
    -------
    values, indices : Tensor ``[n, k]``
        As there; of equal values the latent with the smaller index comes first.
    """
    x, W_enc, b_enc = (t.detach().contiguous() for t in (x, W_enc, b_enc))
    return _encode(x, W_enc, b_enc, _round(W_enc), k, block_rows, exact)


def _encode(
    x: Tensor, W_enc: Tensor, bias: Tensor, W: _Rounded, k: int, block_rows: int | None, exact: bool
) -> tuple[Tensor, Tensor]:
    return _encode_prefixes(x, W_enc, bias, W, [(len(W_enc), k)], block_rows, exact)[0]


def _encode_prefixes(
    x: Tensor, W_enc: Tensor, bias: Tensor, W: _Rounded, prefixes: Sequence[tuple[int, int]], block_rows: int | None,
    exact: bool,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """For each ``(size, k)`` the k largest of the first `size` latents, all from one product."""
    n, d = x.shape
    # A row that is not finite is known by its norm, see `select`: `best_of_all` takes it.
    if max(k for _, k in prefixes) > LARGEST_K or not n:
        return [reference.topk_encode(x, W_enc[:m], bias[:m], k, block_rows=block_rows) for m, k in prefixes]
    found = [(x.new_empty((n, k)), torch.empty((n, k), dtype=torch.int64, device=x.device)) for _, k in prefixes]
    rows = _round(x)
    bound = _bound(rows, W, bias)
    for part, product in _blocks(rows, W, bound, block_rows):
        length = part.stop - part.start
        for (m, k), (values, indices) in zip(prefixes, found):
            room, size = min(_power_of_two(2 * k + 64), _power_of_two(m)), _power_of_two(max(k, 16))
            candidates = torch.empty((length, room), dtype=torch.int32, device=x.device)
            counts = torch.empty(length, dtype=torch.int32, device=x.device)
            _select(product, bound, part, candidates, counts, m, k, exact)
            scores = _rescore(x[part], W_enc, bias, candidates, counts)
            into = values[part], indices[part]
            warps = max(1, min(8, room // 128))
            loops.best_of[(length,)](candidates, scores, counts, *into, k, ROOM=room, num_warps=warps)
            loops.best_of_all[(length,)](
                x[part], W_enc, bias, counts, *into, m, d, k, room, SIZE=size, BLOCK_D=max(16, 4096 // size)
            )
    return found


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None, *, block_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`saekit.kernels.reference.threshold_encode` by a bf16 product and fp32 rescoring.

    Rows of which one has more than a sixteenth of the latents near its threshold are left to the plain kernel: there a
    dense product is cheaper.
    """
    x, W_enc, bias = (t.detach().contiguous() for t in (x, W_enc, b_enc))
    n_latents = len(W_enc)
    level = torch.zeros_like(bias) if threshold is None else threshold.detach().clamp(min=0).contiguous()
    room = max(n_latents // 16, min(n_latents, 64))
    found = _encode_above(x, W_enc, bias, _round(W_enc), level, room, block_rows)
    if found is None:
        return reference.threshold_encode(x, W_enc, bias, threshold, block_rows=block_rows)
    return found


def _encode_above(
    x: Tensor, W_enc: Tensor, bias: Tensor, W: _Rounded, level: Tensor, room: int, block_rows: int | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """All pre-activations above a level of any sign: offsets, latents and values, row by row, latents ascending.

    None when something is not finite or a row has more than `room` candidates.
    """
    if not len(x):
        return None
    rows = _round(x)
    bound = _bound(rows, W, bias - level, bias.abs() + level.abs())
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for part, product in _blocks(rows, W, bound, block_rows):
        length = part.stop - part.start
        candidates = torch.empty((length, room), dtype=torch.int32, device=x.device)
        counts = torch.empty(length, dtype=torch.int32, device=x.device)
        _select(product, bound, part, candidates, counts, len(W_enc), None)
        least, most = torch.stack(counts.aminmax()).tolist()
        if least < 0 or most > room:
            return None
        scores = _rescore(x[part], W_enc, bias, candidates, counts, most)[:, :most]
        latents = candidates[:, :most].long()
        there = torch.arange(most, device=x.device) < counts[:, None]
        kept = there & (scores > level[latents.where(there, 0)])
        parts.append((kept.sum(1), latents[kept], scores[kept]))
    counts, latents, values = (torch.cat(column) for column in zip(*parts))
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), latents, values


def csr_decode(offsets: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """`saekit.kernels.reference.csr_decode`. With pairs sorted by latent it is also the gradient of the weights."""
    W = W_dec.contiguous()
    n, d = len(offsets) - 1, W.shape[1]
    out = W.new_empty((n, d))
    block = _panel(d, 256)
    if n:
        loops.weighted_sums[(n, blocks_of(d, block))](
            offsets.contiguous(), indices.contiguous(), values.to(W.dtype).contiguous(), W, out, d, BLOCK_C=8,
            BLOCK_D=block,
        )  # fmt: skip
    return out


# ---------------------------------------------------------------- the training step


def number(value: Tensor) -> Scalar:
    """Return a running value to compute with: it stays on the device."""
    return value


def numbers(t: Tensor) -> Tensor:
    """Return a tensor to compute with: the tensor."""
    return t


def tensor(values: Tensor) -> Tensor:
    """Return the inverse of `numbers`."""
    return values


def room_for(x: Tensor, count: int) -> Tensor:
    """Return memory of undefined content for `count` sets of rows like `x`, one after the other."""
    return x.new_empty((count * len(x), x.shape[1]))


def counts_of(latents: Tensor, n_latents: int) -> Tensor:
    """Return how often each latent occurs, ``[n_latents]`` int64."""
    return latents.new_zeros(n_latents).scatter_add_(0, latents, torch.ones_like(latents))


def sums_of(latents: Tensor, weights: Tensor, n_latents: int) -> Tensor:
    """Return the sum of the weights of each latent's pairs, ``[n_latents]`` float64, in a fixed order."""
    order, starts = _by_latent(latents, n_latents)
    return torch.segment_reduce(weights.double()[order], "sum", offsets=starts)


def smallest_of_largest(values: Tensor, count: int) -> Scalar:
    """Return the smallest of the `count` largest values."""
    return values.sort(descending=True).values[count - 1]


def centered(x: Tensor, scale: Tensor | None, center: Tensor) -> Tensor:
    """Return ``x * scale - center``."""
    x = x.detach()
    return x - center if scale is None else torch.addcmul(-center, x, scale)


def variance(x: Tensor) -> Scalar:
    """Return ``mean over rows of ||x - mean(x)||^2``, at least 1e-12."""
    return ((x - x.mean(0)).pow(2).sum() / len(x)).clamp(min=1e-12)


def row_norms(W: Tensor) -> Tensor:
    """Return the length of each row of ``W [n, d]``."""
    return W.norm(dim=1)


def encoder_at(W_enc: Tensor, b_enc: Tensor, offset: Tensor, x: Tensor) -> Encoder:
    """Return the encoder for rows like `x`, from which `offset` is yet to be subtracted."""
    rounded = _round(W_enc, offset)
    return Encoder(W_enc, b_enc - rounded.dot, rounded)


def join(parts: Sequence[Pairs[Tensor]]) -> Pairs[Tensor]:
    """Pairs[Tensor] of several sets of rows, one set after the other."""
    ends, offsets = 0, []
    for part in parts:
        offsets.append(part.offsets[:-1] + ends)
        ends += len(part.latents)
    offsets.append(parts[-1].offsets[-1:] + (ends - len(parts[-1].latents)))
    return Pairs(torch.cat(offsets), *(torch.cat([getattr(p, name) for p in parts]) for name in ("latents", "values")))


def even_pairs(values: Tensor, latents: Tensor) -> Pairs[Tensor]:
    """Return as many pairs in every row, from ``[n, k]`` each."""
    n, k = values.shape
    offsets = torch.arange(0, n * k + 1, k, device=values.device)
    return Pairs(offsets, latents.reshape(-1), values.reshape(-1))


def topk_pairs(x: Tensor, encoder: Encoder, k: int) -> Pairs[Tensor]:
    """See `saekit.kernels.step_interface.StepKernels.topk_pairs`."""
    return even_pairs(*_encode(x, encoder.W, encoder.bias, encoder.rounded, k, None, True))


def topk_pairs_of_prefixes(x: Tensor, encoder: Encoder, prefixes: Sequence[tuple[int, int]]) -> list[Pairs[Tensor]]:
    """See `saekit.kernels.step_interface.StepKernels.topk_pairs_of_prefixes`."""
    found = _encode_prefixes(x, encoder.W, encoder.bias, encoder.rounded, prefixes, None, True)
    return [even_pairs(values, indices) for values, indices in found]


def topk_pairs_of_some(x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> Pairs[Tensor]:
    """See `saekit.kernels.step_interface.StepKernels.topk_pairs_of_some`."""
    return even_pairs(*_encode(x, W_enc, bias, _round(W_enc), k, None, True))


def pairs_above(x: Tensor, encoder: Encoder, level: Tensor, room: int) -> Pairs[Tensor] | None:
    """See `saekit.kernels.step_interface.StepKernels.pairs_above`."""
    found = _encode_above(x, encoder.W, encoder.bias, encoder.rounded, level, room, None)
    return None if found is None else Pairs(*found)


def reconstruct(
    x: Tensor, pairs: Pairs[Tensor], codes: Tensor, W_dec: Tensor, offset: Tensor, weight: float = 1.0, name: str = ""
) -> Fit[Tensor]:
    """Decode the pairs and differentiate ``weight * mean over rows of ||x - x_hat||^2``."""
    n, d = x.shape
    block = _panel(d, 256)
    panels = blocks_of(d, block)
    gradient, squares, slopes = torch.empty_like(x), x.new_empty((panels, n)), x.new_empty((panels, len(codes)))
    loops.reconstruct[(n, panels)](
        x, pairs.offsets, pairs.latents, codes, W_dec, offset, 2 * weight / n, gradient, slopes, squares, n, len(codes),
        d, BLOCK_C=8, BLOCK_D=block,
    )  # fmt: skip
    return Fit(squares.sum(dtype=torch.float64), gradient, slopes.sum(0), gradient.sum(0))


def _by_latent(latents: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """Return the order that sorts pairs by latent, rows ascending within one, and where each latent's begin.

    A latent of `n_latents` is none.
    """
    narrow = latents.to(torch.int16 if n_latents < 2**15 else torch.int32)  # narrow keys sort faster
    keys, order = narrow.sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(n_latents + 1, dtype=keys.dtype, device=keys.device))
    return order, starts


def gradients(
    x: Tensor,
    offset: Tensor,
    weights: dict[str, Tensor],
    terms: Terms[Tensor],
    *,
    stretch: Tensor | None = None,
    revived: Revived | None = None,
    name: str = "",
) -> Gradients[Tensor]:
    """See `saekit.kernels.step_interface.StepKernels.gradients`."""
    n, d = x.shape
    pairs, codes, sections = terms.pairs, terms.codes, terms.sections
    W_enc, W_dec = weights["W_enc"], weights["W_dec"]
    n_latents, device = len(W_enc), x.device
    order, starts = _by_latent(pairs.latents.where(terms.wanted, n_latents), n_latents)
    counts = starts.diff()
    row = torch.arange(len(pairs.offsets) - 1, device=device)
    rows = torch.repeat_interleave(row, pairs.offsets.diff(), output_size=len(codes))
    shift = None
    if sections and len(pairs.offsets) - 1 == n:
        shift = torch.zeros(n_latents, dtype=torch.int64, device=device)
        for edge in sections:
            shift[edge:] += n
    slot = None
    more: tuple[Tensor, ...] = (x, x, x)
    if revived is not None:
        slot = torch.full((n_latents,), -1, dtype=torch.int64, device=device)
        slot[revived[0]] = torch.arange(len(revived[0]), device=device)
        more = revived[1:]
    # Latents with many pairs are cut into segments; every latent has at least one.
    ends = ((counts + (SEGMENT - 1)) // SEGMENT).clamp(min=1).cumsum(0)
    n_segments = n_latents + len(codes) // SEGMENT
    segment_latent = torch.searchsorted(ends, torch.arange(n_segments, device=device), right=True)
    segment_first = torch.cat([ends.new_zeros(1), ends[:-1]])
    block = _panel(d, 256)
    panels = blocks_of(d, block)
    of_dec, of_enc, of_bias = torch.empty_like(W_dec), torch.empty_like(W_enc), x.new_empty(n_latents)
    along, squares = x.new_empty((2, panels, n_latents)).unbind()
    places = 2 * (len(codes) // SEGMENT) + 2
    parts = *x.new_empty((2, places, d)).unbind(), x.new_empty(places)
    written = (
        offset, W_dec, starts if slot is None else slot, *more, x if stretch is None else stretch.float(),
        of_dec, of_enc, of_bias, along, squares,
    )  # fmt: skip
    kinds = {"SEGMENT": SEGMENT, "HAS_MORE": slot is not None, "HAS_STRETCH": stretch is not None, "BLOCK_D": block}
    loops.gradient_of_segments[(n_segments, panels)](
        segment_latent, segment_first, starts, order, rows, codes, terms.slopes, terms.gradient, x,
        starts if shift is None else shift, *parts, *written, n, n_latents, d, HAS_SHIFT=shift is not None, BLOCK_C=8,
        **kinds,
    )  # fmt: skip
    if len(codes) > SEGMENT:
        loops.gradient_of_parts[(n_latents, panels)](starts, *parts, *written, n_latents, d, **kinds)
    of_offset = -(of_bias @ W_enc)
    return Gradients(of_enc, of_dec, of_bias, along.sum(0), squares.sum(0), of_offset, counts)


def filled(g: Gradients[Tensor]) -> Gradients[Tensor]:
    """See `saekit.kernels.step_interface.StepKernels.filled`."""
    return g


def descend(
    weights: dict[str, Tensor],
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    g: Gradients[Tensor],
    others: dict[str, Tensor],
    adam: Adam,
) -> Scalar:
    """See `saekit.kernels.step_interface.StepKernels.descend`."""
    others = {"b_enc": g.of_bias} | others
    total = g.squares.sum(dtype=torch.float64)
    if adam.unit:  # what projection removes from the gradient of a row of length 1 is the square of `along`
        total = total - g.along.double().square().sum()
    for gradient in others.values():
        total = total + gradient.double().square().sum()
    norm = total.clamp(min=0).sqrt()
    factor = torch.ones_like(norm) if adam.clip is None else (adam.clip / (norm + 1e-6)).clamp(max=1.0)
    factor = factor.where(norm.isfinite(), torch.nan).float()  # as in plain torch: nothing survives
    n_latents, d = weights["W_enc"].shape
    size = max(16, _power_of_two(d))
    matrices = [group[name] for group in (weights, first, second) for name in ("W_enc", "W_dec")]
    loops.update_latents[(n_latents,)](
        g.of_dec, g.of_enc, g.along, *matrices, factor, *adam.factors("W_enc"), d, UNIT=adam.unit, SIZE=size,
        num_warps=4 if size <= 2048 else 8,
    )  # fmt: skip
    for name, gradient in others.items():
        vectors = (group[name] for group in (weights, first, second))
        length = len(gradient)
        loops.adam_vector[(blocks_of(length, 256),)](
            gradient.float().contiguous(), *vectors, factor, length, *adam.factors(name), BLOCK=256
        )
    return norm
