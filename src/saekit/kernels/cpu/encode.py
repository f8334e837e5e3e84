"""Encoders for a CPU: candidates from a product in few bits, proven bounds, fp32 for what is left.

A block of rows at a time is multiplied with all latents in few bits (`rounded`, `low_bit_matmul`). How far such a
product may be off is known, so most latents are ruled out by it (`selection_numba`), and only what is left is
multiplied again in fp32. The codes are those of the fp32 product, whatever the format of the copies.

Where the processor multiplies neither whole numbers nor bf16 (NEON), torch multiplies in fp32 instead: some latents at
a time, so that it is in a cache when it is narrowed to bf16 and the largest of every lane are taken from it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import reference
from . import low_bit_matmul, rounding_numba, selection_numba, threads
from .buffers import buffer
from .low_bit_matmul import LANE, PANEL, WholeRows
from .rounded import CACHED, RoundedLatents, RoundedRows, round_alike, round_fastest, row_reach, with_bias
from .rounding_numba import LARGEST
from .selection_numba import Chosen, Latents, Lists, Product, Rows

BLOCK_BYTES = {"packed": 32 * 2**20, "bf16": 32 * 2**20, "fp32": 64 * 2**20}
"""Size of the buffer for one block of the product, for our own product and for torch's: it should stay in the last
cache; but torch puts all latents into an order of its own for every block, and in ours rows of a block share what is
read from memory (`SHARED`). Unit: bytes."""

SHARED = 1 / 4
"""Codes per latent of a block from which on its candidates are multiplied latent by latent: whole numbers leave several
times as many candidates, so that rows share them. (The product in bf16 leaves hardly more than codes.)"""

FP32_ROWS = 512
"""Maximum rows of a block in fp32: with fewer, torch's product spends more of its time on reading latents."""

FEWEST_FP32_ROWS = 256
"""Minimum rows of a block in fp32, where every thread has so many: each block reads all latents."""

FP32_LATENTS = 2048
"""Latents that a block in fp32 is multiplied with at a time, a multiple of `PANEL`: 4 MiB of products, which stay in a
cache."""

THRESHOLD_KEPT = 1 / 256
"""Fraction of the latents that is taken to be above its threshold when a format is chosen."""

DENSE = 1 / 16
"""Fraction of the latents that may fire in a row of `threshold_encode`: beyond it a dense product is cheaper than
rescoring, and the plain kernel takes the row."""


# ---------------------------------------------------------------- the product, a block of rows at a time


@dataclass(frozen=True, eq=False)
class _Block:
    """A product of some rows and all latents."""

    start: int
    stop: int
    bits: np.ndarray
    """bf16 as int16, ``[at least rows, at least n_latents]``."""
    maxima: np.ndarray
    """Room for the keys of a row's lanes; of lanes of `LANE` latents, those of the first `settled` are there."""
    settled: int

    def product(self, n_latents: int, lane: int) -> Product:
        """Return what the selection takes, for the first `n_latents` and lanes of so many latents."""
        settled = self.settled if lane == LANE else 0
        known = min(n_latents, settled) // PANEL * (PANEL // lane)
        return Product(self.bits, self.maxima, lane, known)


def _by_blocks(
    work: Callable[[_Block], None], rows: RoundedRows, latents: RoundedLatents, lanes: int, block_rows: int | None
) -> None:
    """Call `work` on blocks of the product, each block on one thread from product to codes.

    Threads that share a product have to wait for each other, and torch's threads keep their core busy for milliseconds
    after it, in case there is more. `lanes`: keys of a row that there has to be room for.
    """
    n, n_latents = len(rows.facts.norm), len(latents.facts.norm)
    edges = _edges(n, n_latents, block_rows, latents.format)
    n_threads = min(threads.thread_count(), len(edges) - 1)
    room, width, settled = max(stop - start for start, stop in itertools.pairwise(edges)), n_latents, 0
    if latents.format != "bf16":  # whole tiles; 32 more, so that rows start in different sets of the caches
        room, width = room + -room % low_bit_matmul.ROWS, PANEL * -(-n_latents // PANEL) + 32
        settled = n_latents // PANEL * PANEL
    products = buffer("product", (n_threads, room, width), torch.bfloat16)
    maxima = buffer("maxima", (n_threads, room, lanes), torch.int16).numpy()
    seat, ticket = itertools.count(), itertools.count()  # taking the next number is atomic

    def blocks() -> None:
        own = next(seat)
        P, best = products[own], maxima[own]
        bits = P.view(torch.int16).numpy()
        with torch.no_grad():  # gradients are switched off per thread
            while (index := next(ticket)) < len(edges) - 1:
                start, stop = edges[index : index + 2]
                block = _Block(start, stop, bits, best, settled)
                if latents.is_packed:
                    _multiply(rows, latents, block)
                elif latents.bias is not None:
                    _multiply_in_fp32(rows.copy[start:stop], latents.copy, latents.bias, block)
                else:
                    torch.mm(rows.copy[start:stop], latents.copy.T, out=P[: stop - start])
                work(block)

    if n_threads == 1 or latents.is_packed or torch.get_num_threads() == 1:
        threads.run_everywhere(blocks, n_threads)
        return
    pool = threads.pool_of(n_threads)  # not this thread too: torch's product would use more threads on it
    for done in [pool.submit(blocks) for _ in range(n_threads)]:
        done.result()


def _multiply(rows: RoundedRows, latents: RoundedLatents, block: _Block) -> None:
    """Write our own product of some rows and all latents, and lane maxima."""
    n, start = block.stop - block.start, block.start
    if rows.whole is not None and latents.whole is not None:
        x = WholeRows(rows.whole.words[start:], rows.whole.scale[start:])
        low_bit_matmul.multiply8(n, x, latents.whole, block.bits, block.maxima)
    else:
        low_bit_matmul.multiply(n, rows.words[start:], latents.panels, block.bits, block.maxima)


def _multiply_in_fp32(x: Tensor, W: Tensor, bias: np.ndarray, block: _Block) -> None:
    """Write torch's product of some rows and all latents, narrowed, and lane maxima."""
    memory = buffer("fp32 product", (len(x) * min(FP32_LATENTS, len(W)),))
    for first in range(0, len(W), FP32_LATENTS):
        some = W[first : first + FP32_LATENTS]
        product = torch.mm(x, some.T, out=memory[: len(x) * len(some)].view(len(x), len(some)))
        of_some = bias[first : first + len(some)]
        rounding_numba.narrow_product(product.numpy(), of_some, first, block.bits, block.maxima)


def _edges(n: int, n_latents: int, block_rows: int | None, form: str) -> list[int]:
    """Rows at which blocks begin, and `n`: a product stays in the last cache, and threads end at about the same time.

    Small blocks cost more, since each reads all latents; so they are large first, and the last ones smaller. 16 rows
    at least even where the product does not stay in a cache, 64 where it does, and `FEWEST_FP32_ROWS` in fp32.
    """
    n_threads = threads.thread_count()
    most = max(1, min(block_rows or n, max(16, BLOCK_BYTES[form] // (2 * n_latents))))
    if form == "fp32":
        most = min(most, FP32_ROWS)
    if form == "packed":
        most = min(most, max(64, -(-n // (4 * n_threads))))
    least = max(64, min(FEWEST_FP32_ROWS if form == "fp32" else 64, -(-n // n_threads)))
    edges = [0]
    while (left := n - edges[-1]) > 0:
        size = min(most, max(least, -(-left // (2 * n_threads)))) if n_threads > 1 else most
        if block_rows is None:
            size += -size % low_bit_matmul.ROWS
        edges.append(edges[-1] + min(size, left))
    return edges


def lane_size(n_latents: int, k: int) -> int:
    """Return the latents of a lane, of whose maxima the k-th locates the k largest: few lanes should hold two of them.

    Eight lanes for each of the k, then: two are in the same lane for about one in sixteen.
    """
    size = LANE
    while size > 1 and n_latents < size * max(8 * k, 256):
        size //= 2
    return size


def _lanes(n_latents: int, lane: int) -> int:
    """Room that the lanes of so many latents take, whole vectors."""
    return -(-n_latents // PANEL) * (PANEL // lane) + 32


# ---------------------------------------------------------------- the k largest


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, block_rows: int | None = None, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """`saekit.kernels.reference.topk_encode` by a product in few bits and fp32 rescoring (see the module).

    Parameters
    ----------
    x, W_enc, b_enc, k, block_rows
        As there; float32 on the CPU. `block_rows` also bounds the rows of one product.
    exact
        True: the codes of the fp32 product. False: latents are chosen by the bf16 product alone (about 1% of the
        choices differ); their values are fp32 all the same.

    Returns
    -------
    values, indices : Tensor ``[n, k]``
        As there; of equal values the latent with the smaller index comes first.
    """
    x, W_enc, b_enc = (t.detach().contiguous() for t in (x, W_enc, b_enc))
    W = round_fastest(W_enc, "W", x)
    [found] = encode_prefixes(x, W_enc, b_enc, W, [(len(W_enc), k)], block_rows=block_rows, exact=exact)
    return found


def encode_prefixes(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    W: RoundedLatents,
    prefixes: Sequence[tuple[int, int]],
    *,
    block_rows: int | None = None,
    exact: bool = True,
    in_order: bool = True,
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each ``(size, k)``, the k largest of the first `size` latents, all from one product.

    See `topk_encode` for the other arguments; `W` is a copy of `W_enc`, and with `in_order` the largest come first.
    """
    n, d = x.shape
    found = [(torch.empty((n, k)), torch.empty((n, k), dtype=torch.int64)) for _, k in prefixes]
    if not n:
        return found
    if not float(W.facts.norm.max()) <= LARGEST or not float(bias.abs().max()) <= LARGEST:  # also when one is NaN
        return [reference.topk_encode(x, W_enc[:m], bias[:m], k, block_rows=block_rows) for m, k in prefixes]
    rows, W = round_alike(x, W_enc, W, sum(k for _, k in prefixes), exact)
    of_rows = Rows(x.numpy(), row_reach(rows.facts, d), rows.facts.norm)
    everything = _latents(W_enc, bias, W, with_bias(W, bias))
    outs = [Chosen(values.numpy(), indices.numpy()) for values, indices in found]
    jobs = [(_prefix(everything, m), k, lane_size(m, k), out) for (m, k), out in zip(prefixes, outs)]
    # The larger ones first: each may write lanes of latents from its last panel on, or all if its lanes differ.
    jobs.sort(key=lambda job: -len(job[0].bias))

    def work(block: _Block) -> None:
        part = slice(block.start, block.stop)
        of_block = Rows(*(of_row[part] for of_row in of_rows))
        for latents, k, lane, out in jobs:
            product, into = block.product(len(latents.bias), lane), Chosen(out.values[part], out.latents[part])
            lists = _lists(len(of_block.x), len(latents.bias), d, k, W.whole is not None)
            selection_numba.choose(len(of_block.x), product, of_block, latents, k, exact, in_order, lists, into)

    _by_blocks(work, rows, W, max(_lanes(len(latents.bias), lane) for latents, _, lane, _ in jobs), block_rows)
    again = torch.from_numpy(np.flatnonzero(~(rows.facts.norm <= LARGEST)))
    if len(again):
        for (m, k), (values, indices) in zip(prefixes, found):
            values[again], indices[again] = reference.topk_encode(x[again], W_enc[:m], bias[:m], k)
    return found


def _lists(n_rows: int, n_latents: int, d: int, k: int, whole: bool) -> Lists:
    """Return lists of candidates: for all of some rows where they share enough that come from memory, or for one."""
    shared = whole and n_rows * k >= SHARED * n_latents and 4 * n_latents * d > CACHED
    together = n_rows if shared else 1
    room = 8 * k + 256  # more than that are close to each other: then one by one, in a list that is kept in order

    def memory(name: str, *shape: int) -> np.ndarray:
        return buffer(f"candidates: {name}", shape, torch.int32).numpy()

    return Lists(
        memory("latents", together, room + 16),
        buffer("candidates: scores", (together, room + 16)).numpy(),
        memory("firsts", together),
        memory("lasts", together),
        np.empty(together, np.int16),
        memory("ends", n_latents),
        memory("present", n_latents + 1),
        memory("rows", together * room),
        memory("places", together * room),
    )


def _latents(W_enc: Tensor, bias: Tensor, W: RoundedLatents, bias_reach: np.ndarray) -> Latents:
    norm, residual = W.facts.norm, W.facts.residual
    largest = np.array([norm.max(), residual.max(), bias_reach.max()])
    return Latents(W_enc.numpy(), bias.numpy(), norm, residual, bias_reach, largest)


def _prefix(latents: Latents, size: int) -> Latents:
    """Return the first `size` latents."""
    W, bias, norm, residual, bias_reach, _ = (part[:size] for part in latents)
    return Latents(W, bias, norm, residual, bias_reach, np.array([norm.max(), residual.max(), bias_reach.max()]))


# ---------------------------------------------------------------- all above a threshold


@dataclass(frozen=True, eq=False)
class Above:
    """All pre-activations above a level, as compressed sparse rows; rows that were left out are empty."""

    offsets: np.ndarray
    latents: np.ndarray
    values: np.ndarray
    left_out: np.ndarray
    """Rows that were left out."""


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None, *, block_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`saekit.kernels.reference.threshold_encode` by a product in few bits and fp32 rescoring (see the module).

    Rows in which more than a sixteenth of the latents may fire are left to the plain kernel (see `DENSE`).
    """
    x, W_enc, bias = (t.detach().contiguous() for t in (x, W_enc, b_enc))
    n_latents = len(W_enc)
    level = torch.zeros(n_latents) if threshold is None else threshold.detach().clamp(min=0).contiguous()
    room = max(int(n_latents * DENSE), min(n_latents, 64))  # of few latents, all may fire
    found = encode_above(x, W_enc, bias, round_fastest(W_enc, "W", x), level, room=room, block_rows=block_rows)
    if found is None:
        return reference.threshold_encode(x, W_enc, bias, threshold, block_rows=block_rows)
    offsets, indices, values = (torch.from_numpy(part) for part in (found.offsets, found.latents, found.values))
    if not len(found.left_out):
        return offsets, indices, values
    # Splice rows from the plain kernel between the others.
    at = torch.from_numpy(found.left_out)
    plain = reference.threshold_encode(x[at], W_enc, bias, threshold, block_rows=block_rows)
    counts = offsets.diff()
    counts[at] = plain[0].diff()
    whole = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    from_plain = torch.zeros(len(x), dtype=torch.bool)
    from_plain[at] = True
    from_plain = torch.repeat_interleave(from_plain, counts)
    all_indices, all_values = torch.empty(int(whole[-1]), dtype=torch.int64), torch.empty(int(whole[-1]))
    for mine, other, into in ((indices, plain[1], all_indices), (values, plain[2], all_values)):
        into[from_plain] = other
        into[~from_plain] = mine
    return whole, all_indices, all_values


def encode_above(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    W: RoundedLatents,
    level: Tensor,
    *,
    room: int,
    block_rows: int | None = None,
    all_or_none: bool = False,
) -> Above | None:
    """Return all pre-activations above a level ``[n_latents]`` of any sign.

    Rows are left out when they are not finite or have more than `room` such latents, whatever the format of the
    product. None when the weights are not finite, or (with `all_or_none`) when a row would be left out.
    """
    n, d = x.shape
    sizes = W.facts.norm.max(), float(bias.abs().max()), float(level.abs().max())
    if not n or not all(size <= LARGEST for size in sizes):  # also when one of them is NaN
        return None
    rows, W = round_alike(x, W_enc, W, len(W_enc) * THRESHOLD_KEPT)
    plain = ~(rows.facts.norm <= LARGEST)
    of_rows = Rows(x.numpy(), row_reach(rows.facts, d), rows.facts.norm)
    # The product is compared with 0, so the level is a part of the bias.
    bias_reach = with_bias(W, bias - level, bias.abs() + level.abs())
    latents = _latents(W_enc, bias, W, bias_reach)
    lane = lane_size(len(W_enc), 1)
    counts = np.zeros(n, np.int64)
    stopped = threading.Event()
    parts: dict[int, Chosen] = {}

    def work(block: _Block) -> None:
        if stopped.is_set():
            return
        part = slice(block.start, block.stop)
        of_block, own = Rows(*(of_row[part] for of_row in of_rows)), counts[part]
        shape = len(own), room
        found = Chosen(buffer("values above", shape).numpy(), buffer("indices above", shape, torch.int64).numpy())
        product = block.product(len(W_enc), lane)
        selection_numba.choose_above(len(own), product, of_block, latents, level.numpy(), found, own)
        own[plain[part]] = -1
        if all_or_none and bool((own < 0).any()):
            stopped.set()
            return
        offsets = _offsets(own)
        parts[block.start] = Chosen(np.empty(offsets[-1], np.float32), np.empty(offsets[-1], np.int64))
        selection_numba.pack_rows(found, offsets, parts[block.start])

    _by_blocks(work, rows, W, _lanes(len(W_enc), lane), block_rows)
    if stopped.is_set():
        return None
    values, found_latents = (np.concatenate([parts[start][which] for start in sorted(parts)]) for which in (0, 1))
    return Above(_offsets(counts), found_latents, values, np.flatnonzero(counts < 0))


def _offsets(counts: np.ndarray) -> np.ndarray:
    """Where each row begins, and the end; -1 counts as none."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(np.maximum(counts, 0), out=offsets[1:])
    return offsets
