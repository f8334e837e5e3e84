"""Blocks of the product of two sets of directions: the largest cosines per row and column, never all of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, ShapeError
from ..kernels import backend
from .assignment import is_compiled

BLOCK_ROWS = 1024
BLOCK_COLUMNS = 8192
TILE_ROWS = 512
COARSE_PAIRS = 2**24
"""From this many pairs on the first product is made in bf16, where the processor has instructions for it."""
PAIRS = 8192
"""Pairs whose cosines are computed exactly at a time."""

_SMALLEST = 1e-300  # shorter rows count as zero: one over their norm is not a number
Tick = Callable[[int], None]
"""Called with the number of rows of a product that were finished."""


@dataclass(frozen=True)
class Directions:
    """Rows of a matrix as unit vectors; a zero row stays zero, so that its cosine with everything is 0."""

    x: Tensor
    """``[n, d]`` as given."""
    inverse: Tensor
    """``float64 [n]``: one over the norm, 0 for zero rows."""
    unit: Tensor
    """``float32 [n, d]``."""
    either_sign: bool = False
    """Whether a direction and its negative are the same: cosines are then absolute, here and with other directions."""

    @classmethod
    def of(cls, x: Tensor, name: str, *, either_sign: bool = False) -> Directions:
        """Return the unit vectors of the rows of `x`.

        Raises
        ------
        ShapeError
            Not a matrix, or an empty one.
        DataError
            NaN or infinity.
        """
        if x.ndim != 2 or not x.numel():
            raise ShapeError(
                f"match: `{name}` must be a matrix [n_latents, d] that is not empty; got {tuple(x.shape)}. "
                "Pass W_dec or W_enc of an SAE."
            )
        x = x.detach()
        inverse = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        unit = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        for start in range(0, len(x), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            # In float64 the squares of the smallest and largest float32 numbers are finite and not zero.
            norm = torch.linalg.vector_norm(x[part], dim=1, dtype=torch.float64)
            if not bool(torch.isfinite(norm).all()):
                raise DataError(f"match: `{name}` must be finite; it holds NaN or infinity. Its training went wrong.")
            inverse[part] = torch.where(norm > _SMALLEST, 1 / norm, 0.0)
            unit[part] = x[part] * inverse[part, None]
        return cls(x, inverse, unit, either_sign)

    def __len__(self) -> int:
        return len(self.x)

    def block(self, which: slice | Tensor, exact: bool) -> Tensor:
        """Return some unit vectors, in float32 or, `exact`, in float64."""
        return self.x[which].double() * self.inverse[which, None] if exact else self.unit[which]


def cosines(a: Directions, i: Tensor, b: Directions, j: Tensor) -> Tensor:
    """Cosines of pairs of rows in float64, ``[pairs]``, with their signs in any case."""
    out = torch.empty(len(i), dtype=torch.float64)
    if _is_plain(a) and _is_plain(b):
        from .top_cosines_numba import pair_cosines

        arrays = (a.x, a.inverse, i, b.x, b.inverse, j, out)
        _threads(pair_cosines, len(i), *(array.numpy() for array in arrays))
        return out
    i, j = i.to(a.x.device), j.to(a.x.device)
    for start in range(0, len(i), PAIRS):
        p, q = i[start : start + PAIRS], j[start : start + PAIRS]
        dot = torch.linalg.vecdot(a.x[p].double() * a.inverse[p, None], b.x[q].double() * b.inverse[q, None])
        out[start : start + PAIRS] = dot.cpu()
    return out


def reach(d: int, largest_price: float, exact: bool) -> float:
    """Largest difference between ``cosine - price`` as `best` computes it and its true value.

    A sum of d products of unit vectors is off by at most d rounding errors in any order of summation; the entries,
    the price and the difference are rounded once each.
    """
    unit = 2.0**-53 if exact else 2.0**-24
    if not exact and torch.get_float32_matmul_precision() != "highest":
        unit = 2.0**-24 + 2.0**-7 / d  # factors may be rounded to 8 bits: 2 * 2^-8 of the product of the norms
    return (1.01 * d + 8) * unit + 4 * unit * (1 + largest_price)


def best(
    a: Directions,
    rows: Tensor | None,
    b: Directions,
    prices: Tensor,
    k: int,
    *,
    exact: bool = False,
    tick: Tick | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the `k` largest ``cosine - price`` per row, ``[rows, k]`` descending, and their columns."""
    k = min(k, len(b))
    n = len(a) if rows is None else len(rows)
    if _is_plain(a) and _is_plain(b) and not exact:
        return _best_compiled(a, rows, b.unit, prices, k, 0, tick)[:2]
    values, columns = [], []
    prices = prices.to(a.x.device)
    for start in range(0, n, BLOCK_ROWS):
        left = a.block(slice(start, start + BLOCK_ROWS) if rows is None else rows[start : start + BLOCK_ROWS], exact)
        value, column = left.new_empty(len(left), 0), torch.empty(len(left), 0, dtype=torch.long, device=left.device)
        for first in range(0, len(b), BLOCK_COLUMNS):
            tile = _product(a, left, b.block(slice(first, first + BLOCK_COLUMNS), exact))
            tile -= prices[first : first + BLOCK_COLUMNS].to(tile.dtype)
            value, column = _merge(value, column, tile, first, k)
        values.append(value)
        columns.append(column)
        if tick is not None:
            tick(len(left))
    return torch.cat(values), torch.cat(columns)


@dataclass(frozen=True)
class Candidates:
    """The largest cosines of every row and column of a product."""

    columns: Tensor
    """``int64 [n, k]``: columns of the largest of each row."""
    rows: Tensor
    """``int64 [m, k_columns]``: rows of the largest of each column."""
    bound: Tensor
    """``float64 [n]``: no other cosine of the row is larger."""


def best_both_ways(
    a: Directions, b: Directions, k: int, k_columns: int, *, tick: Tick | None = None
) -> Candidates:  # fmt: skip
    """Return the `k` largest cosines per row and the `k_columns` largest per column; nearly so where made in bf16."""
    k, k_columns = min(k, len(b)), min(k_columns, len(a))
    error, relative = reach(a.x.shape[1], 0.0, exact=False), 0.0
    if _is_plain(a) and _is_plain(b):
        left, right = a.unit, b.unit
        if len(a) * len(b) >= COARSE_PAIRS and _multiplies_bf16():
            (left, lost_a), (right, lost_b) = _rounded(a), _rounded(b)
            # Cauchy-Schwarz on what rounding the factors loses; the product itself is rounded to 8 bits once more.
            error, relative = error + lost_a + lost_b + lost_a * lost_b, 2.0**-8
        zero = torch.zeros(len(b))
        values, columns, rows = _best_compiled(replace(a, unit=left), None, right, zero, k, k_columns, tick)
    else:
        values, columns, rows = _best_both_ways(a, b, k, k_columns, tick)
    least = values[:, -1].double().cpu()
    bound = torch.full_like(least, -torch.inf) if k == len(b) else least + relative * least.abs() + error
    return Candidates(columns.cpu(), rows.cpu(), bound)


def _best_both_ways(
    a: Directions, b: Directions, k: int, k_columns: int, tick: Tick | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    values, columns = [], []
    top_value = a.unit.new_empty(len(b), 0)
    top_row = torch.empty(len(b), 0, dtype=torch.long, device=top_value.device)
    for start in range(0, len(a), BLOCK_ROWS):
        left = a.unit[start : start + BLOCK_ROWS]
        value, column = left.new_empty(len(left), 0), torch.empty(len(left), 0, dtype=torch.long, device=left.device)
        tops = []
        for first in range(0, len(b), BLOCK_COLUMNS):
            tile = _product(a, left, b.unit[first : first + BLOCK_COLUMNS])
            value, column = _merge(value, column, tile, first, k)
            part = slice(first, first + BLOCK_COLUMNS)
            tops.append(_merge(top_value[part], top_row[part], tile.T, start, k_columns))
        top_value, top_row = torch.cat([top[0] for top in tops]), torch.cat([top[1] for top in tops])
        values.append(value)
        columns.append(column)
        if tick is not None:
            tick(len(left))
    return torch.cat(values), torch.cat(columns), top_row


def extremes(a: Directions, b: Directions, *, tick: Tick | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Largest and smallest cosine of each row of `a` with any of `b`, then of each row of `b` with any of `a`."""
    top_a, low_a = (torch.full((len(a),), end, device=a.x.device) for end in (-2.0, 2.0))
    top_b, low_b = (torch.full((len(b),), end, device=a.x.device) for end in (-2.0, 2.0))
    for start in range(0, len(a), BLOCK_ROWS):
        down = slice(start, start + BLOCK_ROWS)
        for first in range(0, len(b), BLOCK_COLUMNS):
            across = slice(first, first + BLOCK_COLUMNS)
            tile = a.unit[down] @ b.unit[across].T
            top_a[down] = torch.maximum(top_a[down], tile.amax(1))
            low_a[down] = torch.minimum(low_a[down], tile.amin(1))
            top_b[across] = torch.maximum(top_b[across], tile.amax(0))
            low_b[across] = torch.minimum(low_b[across], tile.amin(0))
        if tick is not None:
            tick(len(top_a[down]))
    return tuple(end.clamp(-1.0, 1.0).double().cpu() for end in (top_a, low_a, top_b, low_b))  # type: ignore[return-value]


def scattered(
    a: Directions, rows: Tensor, u: Tensor, b: Directions, prices: Tensor, k: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Up to `k` random columns per row with ``cosine - price > u``: pairs (place in `rows`, column).

    Among many equal columns the largest are the same for every row; random ones are not, and a few per row suffice.
    """
    generator = torch.Generator(a.x.device).manual_seed(seed)
    k = min(k, len(b))
    places, columns = [], []
    for start in range(0, len(rows), BLOCK_ROWS):
        left = a.unit[rows[start : start + BLOCK_ROWS]]
        limit = u[start : start + BLOCK_ROWS, None].to(left.device, torch.float32)
        key, column = left.new_empty(len(left), 0), torch.empty(len(left), 0, dtype=torch.long, device=left.device)
        for first in range(0, len(b), BLOCK_COLUMNS):
            tile = _product(a, left, b.unit[first : first + BLOCK_COLUMNS])
            tile -= prices[first : first + BLOCK_COLUMNS].to(tile)
            order = torch.rand(tile.shape, generator=generator, device=tile.device)
            key, column = _merge(key, column, torch.where(tile > limit, order, -1.0), first, k)
        place, at = (key >= 0).nonzero(as_tuple=True)
        places.append(place + start)
        columns.append(column[place, at])
    return torch.cat(places), torch.cat(columns)


def _product(a: Directions, left: Tensor, right: Tensor) -> Tensor:
    """Return the cosines of some rows of `a` with others."""
    tile = left @ right.T
    return tile.abs_() if a.either_sign else tile


def _merge(value: Tensor, column: Tensor, tile: Tensor, first: int, k: int) -> tuple[Tensor, Tensor]:
    """Return the `k` largest per row of those known and a new tile of columns from `first` on."""
    new_value, new_column = tile.topk(min(k, tile.shape[1]), dim=1)
    if value.shape[1]:
        new_value = torch.cat([value, new_value], dim=1)
        new_column = torch.cat([column, new_column + first], dim=1)
        new_value, at = new_value.topk(min(k, new_value.shape[1]), dim=1)
        return new_value, new_column.gather(1, at)
    return new_value, new_column + first


# ---------------------------------------------------------------------------------------------------------- compiled


def _is_plain(rows: Directions) -> bool:
    """Whether the compiled loops take these rows."""
    x = rows.x
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() and is_compiled()


def _multiplies_bf16() -> bool:
    """Whether products in bf16 are fast here."""
    return backend.mode() != "plain" and backend.bf16_unavailable() is None


def _rounded(rows: Directions) -> tuple[Tensor, float]:
    """Return the unit vectors in bf16, and the largest length that rounding took from one."""
    half = rows.unit.bfloat16()
    blocks = range(0, len(rows), BLOCK_ROWS)
    lost = [(rows.unit[at : at + BLOCK_ROWS] - half[at : at + BLOCK_ROWS].float()).norm(dim=1).amax() for at in blocks]
    return half, 1.001 * float(torch.stack(lost).max())


def _best_compiled(
    left_rows: Directions, rows: Tensor | None, b: Tensor, prices: Tensor, k: int, k_columns: int, tick: Tick | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`best` and `best_both_ways`: heaps per row and column that each tile of the product goes through."""
    from .top_cosines_numba import keep_by_column, keep_by_row

    a = left_rows.unit
    n, m = len(a) if rows is None else len(rows), len(b)
    value, item = np.full((n, k), -np.inf, dtype=np.float32), np.zeros((n, k), dtype=np.int64)
    top_value, top_item = np.full((m, k_columns), -np.inf, np.float32), np.zeros((m, k_columns), dtype=np.int64)
    limits = np.full(m, -np.inf, dtype=np.float32)
    price = prices.float().numpy()
    size = min(n, TILE_ROWS) * min(m, BLOCK_COLUMNS)
    product = torch.empty(size, dtype=a.dtype)
    widened = product if a.dtype == torch.float32 else torch.empty(size)
    for start in range(0, n, TILE_ROWS):
        part = slice(start, start + TILE_ROWS)
        left = a[part] if rows is None else a[rows[part]]
        for first in range(0, m, BLOCK_COLUMNS):
            across = slice(first, first + BLOCK_COLUMNS)
            right = b[across]
            shape = len(left), len(right)
            tile = torch.mm(left, right.T, out=product[: len(left) * len(right)].view(shape))
            if left_rows.either_sign:
                tile.abs_()
            if widened is not product:
                tile = widened[: len(left) * len(right)].view(shape).copy_(tile)
            cosines = tile.numpy()
            _threads(keep_by_row, len(left), cosines, price[across], first, value[part], item[part])
            if k_columns:
                _threads(
                    keep_by_column, len(right), cosines, start, limits[across], top_value[across], top_item[across]
                )
        if tick is not None:
            tick(len(left))
    values, order = torch.from_numpy(value).sort(dim=1, descending=True)
    return values, torch.from_numpy(item).gather(1, order), torch.from_numpy(top_item)


def _threads(loop: Callable[..., None], n: int, *arguments: Any) -> None:
    """``loop(start, stop, *arguments)`` over ranges of ``0 .. n``, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), -(-n // 64))
    if threads <= 1:
        loop(0, n, *arguments)
        return
    ends = [round(n * part / threads) for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(loop, ends[part], ends[part + 1], *arguments) for part in range(threads)]:
            done.result()
