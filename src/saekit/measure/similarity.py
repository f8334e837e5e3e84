"""How alike two representations of the same rows are, whatever their widths: RSA and linear CKA.

Both compare tables of similarities between rows, so both need a sample of rows that fits a square table, and both get
their intervals from a jackknife over groups of documents (a bootstrap would compare rows with copies of themselves).

References
----------
Kriegeskorte, Mur & Bandettini (2008), *Representational similarity analysis*; Kornblith et al. (2019), 1905.00414
(linear CKA); Song et al. (2012), equation 5, and Nguyen, Raghu & Kornblith (2020), 2010.15327 (its debiased form).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from ..errors import ShapeError
from ..sae.codes import Codes
from .accumulators import double
from .intervals import Estimate, Sample

JACKKNIFE_GROUPS = 20
"""Parts of the rows that are left out in turn."""


def row_correlations(x: Tensor) -> np.ndarray:
    """Pearson correlation of every row with every other, ``float64 [n, n]``; 0 with a row that is constant."""
    rows = double(x).cpu().numpy()
    rows = rows - rows.mean(1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    # A constant row has only rounding left after its mean is taken away.
    constant = norms <= 1e-12 * np.maximum(np.abs(double(x).cpu().numpy()).max(1, keepdims=True), 1e-300)
    rows = np.where(constant, 0.0, rows / np.where(constant, 1.0, norms))
    return np.clip(rows @ rows.T, -1.0, 1.0)


def products(x: Tensor | Codes) -> np.ndarray:
    """Inner product of every row with every other, ``float64 [n, n]``; sparse codes are not made dense."""
    if isinstance(x, Codes):
        sparse = x.to_scipy().astype(np.float64)
        return (sparse @ sparse.T).toarray()
    rows = double(x).cpu().numpy()
    return rows @ rows.T


def pair_ranks(table: np.ndarray) -> np.ndarray:
    """Mid-ranks of the entries above the diagonal, in their positions: ``float64 [n, n]``, symmetric."""
    from scipy.stats import rankdata

    above = np.triu_indices(len(table), 1)
    ranks = np.zeros_like(table)
    # What differs by rounding alone is a tie.
    ranks[above] = rankdata(np.round(table[above], 12))
    return ranks + ranks.T


def pair_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of the entries off the diagonals of two symmetric tables; NaN where one side is constant."""
    pairs = len(a) * (len(a) - 1)
    if not pairs:
        return math.nan
    mean_a, mean_b = a.sum() / pairs, b.sum() / pairs
    # The diagonals are 0, so sums over whole tables are sums over pairs.
    products, squares_a, squares_b = (
        float((one * other).sum()) - pairs * mean_one * mean_other
        for one, other, mean_one, mean_other in (
            (a, b, mean_a, mean_b), (a, a, mean_a, mean_a), (b, b, mean_b, mean_b),
        )
    )  # fmt: skip
    spread = squares_a * squares_b
    return products / math.sqrt(spread) if min(squares_a, squares_b) > 1e-9 * pairs else math.nan


def debiased_cka(K: np.ndarray, L: np.ndarray) -> float:
    """Linear CKA from tables of inner products: near 0 for unrelated rows of any width, 1 for equal ones.

    The plain formula is too large when rows are not many more than dimensions; here each HSIC is its unbiased
    estimate. NaN where one side does not vary or there are fewer than 4 rows.
    """
    if len(K) < 4:
        return math.nan
    own = _hsic(K, K), _hsic(L, L)
    return _hsic(K, L) / math.sqrt(own[0] * own[1]) if min(own) > 0 else math.nan


def _hsic(K: np.ndarray, L: np.ndarray) -> float:
    """Unbiased HSIC, up to the factor ``1 / (n (n - 3))``."""
    n = len(K)
    sums_k, sums_l = K.sum(1) - K.diagonal(), L.sum(1) - L.diagonal()
    together = float((K * L).sum() - K.diagonal() @ L.diagonal())
    return together + float(sums_k.sum() * sums_l.sum()) / ((n - 1) * (n - 2)) - 2 / (n - 2) * float(sums_k @ sums_l)


def rsa(x: Tensor, y: Tensor, group: np.ndarray | None = None) -> Estimate:
    """Representational similarity: Spearman correlation of the two tables ``1 - Pearson(row i, row j)``.

    Parameters
    ----------
    x, y
        ``[n, d]`` and ``[n, e]``: the same n rows in two representations.
    group
        ``[n]`` group of documents of each row for the interval; None for no interval.

    Raises
    ------
    ShapeError
        Different numbers of rows.
    """
    _check_rows(len(x), len(y))
    # The ranks among all pairs serve the jackknife too: to rank anew what is left hardly differs and costs 20 sorts.
    a, b = pair_ranks(row_correlations(x)), pair_ranks(row_correlations(y))
    return jackknife(lambda at: pair_correlation(a[np.ix_(at, at)], b[np.ix_(at, at)]), len(a), group)


def linear_cka(x: Tensor | Codes, y: Tensor | Codes, group: np.ndarray | None = None) -> Estimate:
    """Debiased linear CKA of the same n rows in two representations; codes stay sparse.

    Parameters and errors as for `rsa`.
    """
    _check_rows(len(x), len(y))
    a, b = products(x), products(y)
    return jackknife(lambda at: debiased_cka(a[np.ix_(at, at)], b[np.ix_(at, at)]), len(a), group)


def jackknife(value_of: Callable[[np.ndarray], float], n_rows: int, group: np.ndarray | None) -> Estimate:
    """Return a value on all rows, with the interval of a jackknife that leaves out groups of documents.

    Parameters
    ----------
    value_of
        From the indices of the rows to use, ``int64 [m]``, to the value.
    n_rows
        Number of rows.
    group
        ``[n_rows]`` group of each row; groups are put into 20 parts of about equal numbers of groups.
    """
    everything = np.arange(n_rows)
    value = value_of(everything)
    if math.isnan(value):
        return Estimate(value, reason="undefined: one side does not vary")
    groups = np.zeros(0) if group is None else np.unique(group)
    if group is None or len(groups) < JACKKNIFE_GROUPS:
        reason = f"no interval: it needs rows of at least {JACKKNIFE_GROUPS} documents"
        return Estimate(value, reason=reason if group is not None else "no interval asked for")
    part = np.searchsorted(groups, group) % JACKKNIFE_GROUPS
    left_out = np.array([value_of(everything[part != each]) for each in range(JACKKNIFE_GROUPS)])
    if np.isnan(left_out).any():
        return Estimate(value, reason="no interval: undefined without some documents")
    reason = f"interval from a jackknife over {JACKKNIFE_GROUPS} parts of the documents"
    return Estimate(value, left_out, Sample.over(np.bincount(part)), reason)


def _check_rows(n: int, m: int) -> None:
    if n != m:
        raise ShapeError(f"two representations must be of the same rows; they have {n} and {m} rows.")
