"""Exact maximum-weight matching of two sets of directions on cosine, with a proof, never holding all cosines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ShapeError
from ..progress import shows_progress
from ..settings import Progress
from .assignment import COARSEST, FINEST, Graph, Solution, row_prices, solve
from .top_cosines import Directions, best, best_both_ways, cosines, reach, scattered

CANDIDATES = 48
"""Largest cosines per row that the first graph is made of."""
COLUMN_CANDIDATES = 32
"""The same per column."""
MORE = 24
"""Largest ``cosine - price`` per row that is looked at again."""
MARGIN = 0.02
"""Pairs this close to their prices become edges as well: prices move a little when others are added."""
LOOSE_SHARE = 128
"""One column in this many may fall in price without casting doubt on every row; its pairs are looked at apart."""
TOLERANCE = FINEST


@dataclass(frozen=True)
class Certificate:
    """Proof of how good a matching is.

    For any prices with ``u[i] + v[j] >= cosine[i, j]`` on all pairs (and ``v >= 0`` where columns outnumber rows) the
    sum of the prices is an upper bound of every matching.
    """

    objective: float
    """Sum of the cosines of the pairs, in float64."""
    dual: float
    """Sum of the prices: no matching reaches more."""
    gap: float
    """``dual - objective``, at least 0 but for rounding."""


@dataclass(frozen=True, eq=False)
class Matching:
    """One-to-one pairs between the rows of `a` and `b`; every row of the smaller has a partner."""

    partner: Tensor
    """``int64 [n_a]``: row of `b`, -1 for none."""
    cosine: Tensor
    """``float64 [n_a]``: cosine of the pair, NaN for none; absolute where a direction and its negative are the same."""
    opposite: Tensor
    """``bool [n_a]``: whether the partner points the other way, where that is the same."""
    n_b: int
    """Rows of `b`."""
    certificate: Certificate
    """How far from the best possible it can be."""
    price_a: Tensor
    """``float64 [n_a]``: ``price_a[i] + price_b[j] >= cosine[i, j]`` for all pairs."""
    price_b: Tensor
    """``float64 [n_b]``."""
    rounds: int
    """How often the graph of candidates was solved."""
    edges: int
    """Pairs in the last graph."""

    @property
    def mean_cosine(self) -> float:
        """Mean over the pairs."""
        return self.certificate.objective / min(len(self.partner), self.n_b)

    def inverse(self) -> Matching:
        """Return the same pairs seen from `b`."""
        paired = self.partner >= 0
        partner = torch.full((self.n_b,), -1)
        cosine = torch.full((self.n_b,), torch.nan, dtype=torch.float64)
        partner[self.partner[paired]] = paired.nonzero().squeeze(1)
        cosine[self.partner[paired]] = self.cosine[paired]
        opposite = torch.zeros(self.n_b, dtype=torch.bool)
        opposite[self.partner[paired]] = self.opposite[paired]
        return Matching(
            partner, cosine, opposite, len(self.partner), self.certificate, self.price_b, self.price_a, self.rounds,
            self.edges,
        )  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"Matching({len(self.partner):,} × {self.n_b:,}, mean cosine {self.mean_cosine:.4f}, "
            f"gap {self.certificate.gap:.1e} of {self.certificate.objective:,.6g})"
        )


@shows_progress
def match_latents(a: Tensor, b: Tensor, *, either_sign: bool = False, progress: Progress | None = None) -> Matching:
    """Pair the rows of two matrices one to one so that the sum of their cosines is largest, and prove it.

    Neither matrix of all cosines is ever held: a graph of candidates (the largest cosines per row and column) is
    solved, its dual prices are checked against all pairs in blocks, violated pairs become edges, and so on until no
    pair is left that could improve the sum. Pairs within rounding of their price are settled in float64.

    Parameters
    ----------
    a, b
        ``[n_a, d]`` and ``[n_b, d]``: decoder or encoder rows; they need not have unit length. A zero row has cosine
        0 with everything. The products run where `a` is.
    either_sign
        Whether a direction and its negative are the same, as for latents whose codes have signs: then the sum of
        absolute cosines is largest.
    progress
        Called as ``progress("match", done, total)`` with the rows of products computed; the total is not known
        [shown on stderr; ``False``: none].

    Returns
    -------
    Matching
        Every row of the smaller matrix is matched, whatever the cosine. ``certificate.gap`` is at most 2^-32 per
        latent.

    Raises
    ------
    ShapeError
        Not two matrices of one width.
    DataError
        NaN or infinity.

    Examples
    --------
    >>> matching = match_latents(torch.eye(3), torch.eye(3)[[2, 0, 1]])
    >>> matching.partner.tolist(), matching.certificate.objective
    ([1, 2, 0], 3.0)
    """
    left = Directions.of(a, "a", either_sign=either_sign)
    right = Directions.of(b.to(a.device), "b", either_sign=either_sign)
    if left.x.shape[1] != right.x.shape[1]:
        raise ShapeError(
            f"match: `a` and `b` must have one width; they have {left.x.shape[1]} and {right.x.shape[1]}. "
            "Compare SAEs of the same hook."
        )
    with torch.no_grad():
        if len(left) > len(right):
            return _Search(right, left, progress).run().inverse()
        return _Search(left, right, progress).run()


class _Search:
    """The state of one search: the graph, its solution, and what is known about the pairs that are not edges.

    For every row i a `bound` and a set of prices `seen` when it was found: each pair outside the graph has
    ``cosine[i, j] - seen[j] <= bound[i]``.
    """

    def __init__(self, a: Directions, b: Directions, progress: Progress | None) -> None:
        self.a, self.b = a, b
        self.n, self.m = len(a), len(b)
        self.progress, self.done = progress, 0
        self.rounds = 0
        found = best_both_ways(a, b, CANDIDATES, COLUMN_CANDIDATES, tick=self._tick)
        own = np.arange(self.n)
        keys = [
            (own[:, None] * self.m + found.columns.numpy()).ravel(),
            (found.rows.numpy() * self.m + np.arange(self.m)[:, None]).ravel(),
            own * self.m + own,  # so that there is a matching of all rows
        ]
        self.graph = self._with(Graph(self.n, self.m, np.empty(0, np.int64), np.empty(0)), np.concatenate(keys))
        self.seen = [np.zeros(self.m)]
        self.version = np.zeros(self.n, dtype=np.int64)
        self.bound = found.bound.numpy()

    def _tick(self, rows: int) -> None:
        self.done += rows
        if self.progress is not None:
            self.progress("match", self.done, None)

    def run(self) -> Matching:
        solution = self._solve(None, COARSEST)
        while True:
            u, v = solution.u, solution.v
            edges = len(self.graph.keys)
            slack, doubtful, pairs = self._doubts(u, v)
            keys = [pairs, *self._look_again(doubtful, u, v)]
            slack[doubtful] = 0.0
            self.graph = self._with(self.graph, np.concatenate(keys))
            raised = row_prices(self.graph, v)
            certain = np.maximum(raised, self.bound + slack)
            worst = float((certain - u).max())
            if worst <= TOLERANCE or len(self.graph.keys) == edges:
                return self._result(solution, np.maximum(u, certain))
            solution = self._solve(solution, min(max(worst, FINEST), COARSEST))

    def _solve(self, start: Solution | None, coarsest: float) -> Solution:
        self.rounds += 1
        solution = solve(self.graph, start, coarsest)
        if self.n == self.m:  # only differences of prices matter then: keep them small, for small rounding errors
            middle = float(np.median(solution.v))
            solution = Solution(solution.mate, solution.weight, solution.u + middle, solution.v - middle)
        return solution

    def _with(self, graph: Graph, keys: np.ndarray) -> Graph:
        """Return the graph with these pairs, weighted by their exact cosines."""
        keys = graph.new(_distinct(keys))
        i, j = (torch.from_numpy(part) for part in (keys // self.m, keys % self.m))
        weights = cosines(self.a, i, self.b, j)
        return graph.add(keys, (weights.abs() if self.a.either_sign else weights).numpy())

    def _doubts(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what prices have lost since each row was looked at, the rows in doubt, and pairs to add."""
        slack = np.zeros(self.n)
        is_doubtful = np.zeros(self.n, dtype=bool)
        pairs = []
        for version in np.unique(self.version):
            rows = np.flatnonzero(self.version == version)
            loss = self.seen[version] - v
            loose = self.m // LOOSE_SHARE
            usual = float(np.partition(loss, self.m - 1 - loose)[self.m - 1 - loose])
            certain_anyway = self.bound[rows] + loss.max() <= u[rows] + TOLERANCE
            certain = self.bound[rows] + usual <= u[rows] + TOLERANCE
            slack[rows] = np.where(certain_anyway, loss.max(), usual)
            is_doubtful[rows] = ~certain
            apart = rows[certain & ~certain_anyway]
            found, too_many = self._apart(apart, np.flatnonzero(loss > usual), u, v)
            pairs.append(found)
            is_doubtful[too_many] = True
        return slack, np.flatnonzero(is_doubtful), np.concatenate(pairs)

    def _apart(
        self, rows: np.ndarray, columns: np.ndarray, u: np.ndarray, v: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of a block that may exceed their prices, as keys; and rows that have too many of them."""
        if not len(rows) or not len(columns):
            return np.empty(0, np.int64), rows[:0]
        device = self.a.x.device
        right = self.b.unit[torch.from_numpy(columns).to(device)]
        price = torch.from_numpy(v[columns]).to(device, torch.float32)
        error = reach(self.a.x.shape[1], float(np.abs(v).max()), exact=False)
        keys, crowded = [], []
        for start in range(0, len(rows), 1024):
            block = rows[start : start + 1024]
            limit = torch.from_numpy(u[block] - error).to(device, torch.float32)
            tile = self.a.unit[torch.from_numpy(block).to(device)] @ right.T
            above = (tile.abs_() if self.a.either_sign else tile) - price > limit[:, None]
            many = above.sum(1) > MORE
            above[many] = False
            crowded.append(block[many.cpu().numpy()])
            i, j = (part.cpu().numpy() for part in above.nonzero(as_tuple=True))
            keys.append(block[i] * self.m + columns[j])
        return np.concatenate(keys), np.concatenate(crowded)

    def _look_again(self, rows: np.ndarray, u: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
        """Return new candidates of some rows at the present prices, as keys; their bounds are renewed."""
        if not len(rows):
            return []
        self.seen.append(v)
        self.version[rows] = len(self.seen) - 1
        keys = self._best(rows, u, v, exact=False)
        error = reach(self.a.x.shape[1], float(np.abs(v).max()), exact=False)
        above = self.bound[rows] - u[rows]
        crowded = rows[above > 2 * error]  # every candidate exceeds its price, and there may be more
        unclear = rows[(above > 0) & (above <= 2 * error)]
        if len(unclear):
            keys += self._best(unclear, u, v, exact=True)
            crowded = np.concatenate([crowded, unclear[self.bound[unclear] > u[unclear] + TOLERANCE]])
        if len(crowded):
            place, column = scattered(
                self.a, self._on_device(crowded), torch.from_numpy(u[crowded]), self.b, torch.from_numpy(v), MORE,
                seed=self.rounds,
            )  # fmt: skip
            keys.append(crowded[place.cpu().numpy()] * self.m + column.cpu().numpy())
        return keys

    def _best(self, rows: np.ndarray, u: np.ndarray, v: np.ndarray, *, exact: bool) -> list[np.ndarray]:
        values, columns = best(
            self.a, self._on_device(rows), self.b, torch.from_numpy(v), MORE, exact=exact, tick=self._tick
        )
        error = reach(self.a.x.shape[1], float(np.abs(v).max()), exact=exact)
        known = values.double().cpu().numpy()
        bound = known[:, -1] + error if self.m > MORE else np.full(len(rows), -np.inf)
        found = known > u[rows, None] - MARGIN
        # Candidates that are left out of the graph are bounded by the margin.
        self.bound[rows] = np.where(found.all(1), bound, np.maximum(bound, u[rows] - MARGIN + error))
        i, _ = found.nonzero()
        return [rows[i] * self.m + columns.cpu().numpy()[found]]

    def _on_device(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self.a.x.device)

    def _result(self, solution: Solution, u: np.ndarray) -> Matching:
        objective, dual = float(solution.weight.sum()), float(u.sum() + solution.v.sum())
        partner = torch.from_numpy(solution.mate.copy())
        opposite = torch.zeros(self.n, dtype=torch.bool)
        if self.a.either_sign:
            opposite = cosines(self.a, torch.arange(self.n), self.b, partner) < 0
        return Matching(
            partner=partner,
            cosine=torch.from_numpy(solution.weight.copy()),
            opposite=opposite,
            n_b=self.m,
            certificate=Certificate(objective, dual, dual - objective),
            price_a=torch.from_numpy(u),
            price_b=torch.from_numpy(solution.v),
            rounds=self.rounds,
            edges=len(self.graph.keys),
        )


def _distinct(keys: np.ndarray) -> np.ndarray:
    """Return the distinct keys in ascending order; a sort is several times faster than `np.unique` here."""
    keys = np.sort(keys)
    return keys[np.flatnonzero(np.diff(keys, prepend=-1))]
