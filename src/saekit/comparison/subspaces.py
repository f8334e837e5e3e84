"""How alike the subspaces are that latents of different seeds span."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ..errors import ShapeError
from ..measure.intervals import LEVEL, jackknife_error, student
from ..measure.results import Measured
from ..sae.model import SAE
from .intervals import over_saes
from .orphans_result import Span

NULL_DRAWS = 200
"""Random subspaces behind the null of an overlap."""


def span_of(rows: Tensor, rank: int) -> Tensor:
    """Return an orthonormal basis ``[rank, d]`` of the directions in which unit rows ``[n, d]`` are longest.

    Raises
    ------
    ShapeError
        Fewer rows than dimensions asked for.
    """
    if len(rows) < rank:
        raise ShapeError(f"span_of: {rank} dimensions need at least as many rows; got {len(rows)}. Lower the rank.")
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True).clamp_min(1e-30)
    return torch.linalg.svd(unit, full_matrices=False).Vh[:rank]


def overlap(a: Tensor, b: Tensor) -> float:
    """Return the mean squared cosine of the angles between two orthonormal bases."""
    return float((a @ b.T).square().sum()) / min(len(a), len(b))


def spans(
    saes: Sequence[SAE], shared: Sequence[np.ndarray], ranks: Sequence[int] | None, components: Tensor, seed: int
) -> list[Span]:
    """Compare the subspaces of orphans, and those of shared latents, between SAEs.

    Parameters
    ----------
    saes
        SAEs of one width.
    shared
        Per SAE ``bool [n_latents]``; the others are orphans.
    ranks
        Dimensions of the subspaces, below that width; None for an eighth, a quarter and a half of it. Ranks for which
        an SAE has too few latents of either kind are left out.
    components
        Principal components of the rows ``[d, d]``.
    seed
        Random seed of the null.
    """
    d = saes[0].d_out
    wanted = sorted(set(ranks or [max(1, d // 8), max(1, d // 4), max(1, d // 2)]))
    rows = [sae.W_dec.float().cpu() for sae in saes]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rank in wanted:
        if any(min(int(kind.sum()), int((~kind).sum())) < rank for kind in shared):
            continue
        orphans, others = (
            [span_of(W[torch.from_numpy(kind == is_shared)], rank) for W, kind in zip(rows, shared, strict=True)]
            for is_shared in (False, True)
        )
        null = _null(rank, d, generator)
        principal = components[:rank].double()
        explained = over_saes([overlap(base, principal) for base in orphans], "fraction")
        found.append(Span(rank, _over_pairs(orphans), _over_pairs(others), null, explained))
    return found


def _null(rank: int, d: int, generator: torch.Generator) -> Measured:
    draws = []
    for _ in range(NULL_DRAWS):
        one, other = (
            torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64)).Q.T for _ in range(2)
        )
        draws.append(overlap(one, other))
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Measured(rank / d, low, high, "fraction", f"expected: rank / d; 95 % of {NULL_DRAWS} random pairs")


def _over_pairs(bases: Sequence[Tensor]) -> Measured:
    """Mean overlap over pairs of SAEs, with a jackknife that leaves out one SAE at a time."""
    m = len(bases)
    overlaps = {pair: overlap(bases[pair[0]], bases[pair[1]]) for pair in combinations(range(m), 2)}
    value = float(np.mean(list(overlaps.values())))
    if m < 3:
        return Measured(value, None, None, "fraction", "no interval: one pair of SAEs")
    left_out = [float(np.mean([each for pair, each in overlaps.items() if out not in pair])) for out in range(m)]
    half = student(m - 1) * jackknife_error(left_out)
    reason = f"interval from a jackknife over {m} SAEs"
    return Measured(value, max(value - half, 0.0), min(value + half, 1.0), "fraction", reason)
