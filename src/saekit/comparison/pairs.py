"""Pairs of SAEs: their decoders and their encoders matched, and what they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ..matching.matching import Matching, match_latents
from ..matching.shared import SharedRule, agree, have_signs
from ..matching.top_cosines import Directions, extremes
from ..measure.intervals import wilson_interval
from ..measure.results import Measured
from ..sae.model import SAE
from ..settings import Progress
from .intervals import over_latents, standard_error
from .result import OnRows, Pair, Side

Named = Sequence[tuple[str, SAE]]
"""SAEs with their names."""


@dataclass(frozen=True)
class MatchedRows:
    """A matching of rows, and the largest cosines without any matching."""

    matching: Matching
    largest: Measured
    """Mean over both directions of the mean largest cosine."""
    largest_absolute: Measured
    """The same of absolute cosines."""

    def side(self) -> Side:
        """Return what the result says about it."""
        matching = self.matching
        paired = matching.cosine[matching.partner >= 0]
        return Side(
            partner=matching.partner.tolist(),
            cosine=[None if math.isnan(value) else round(value, 6) for value in matching.cosine.tolist()],
            mean_cosine=over_latents(matching.mean_cosine, standard_error(paired)),
            max_cosine=self.largest,
            max_absolute_cosine=self.largest_absolute,
            certificate=matching.certificate,
        )


@dataclass(frozen=True)
class MatchedPair:
    """Two of the SAEs, with decoders and encoders matched independently."""

    first: int
    """Index of one SAE."""
    second: int
    """Index of the other."""
    decoder: MatchedRows
    encoder: MatchedRows

    def shared(self, rule: SharedRule) -> Tensor:
        """Return which latents of the first SAE the second has, ``bool [n]``."""
        return rule.shared(self.decoder.matching, self.encoder.matching)

    def fractions(self, rule: SharedRule) -> dict[str, Measured]:
        """Return ``shared``, ``aligned`` and ``equal``, as fractions of the latents of the narrower SAE."""
        decoder, encoder = self.decoder.matching, self.encoder.matching
        n = min(len(decoder.partner), decoder.n_b)
        counts = {
            "shared": rule.shared(decoder, encoder),
            "aligned": rule.aligned(decoder, encoder),
            "equal": agree(decoder, encoder),
        }
        return {name: wilson_interval(int(which.sum()), n) for name, which in counts.items()}

    def result(
        self, named: Named, rule: SharedRule, on_rows: OnRows | None, function: dict[str, Measured] | None
    ) -> Pair:
        """Return what the result says about the pair."""
        (first, one), (second, other) = named[self.first], named[self.second]
        return Pair(
            first=first,
            second=second,
            same_seed=began_alike(one, other),
            **self.fractions(rule),
            decoder=self.decoder.side(),
            encoder=self.encoder.side(),
            on_rows=on_rows,
            function=function or {},
        )


class MatchProgress:
    """Tells how many of the matchings are done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self) -> None:
        """Count one more."""
        self.done += 1
        if self.progress is not None:
            self.progress("match", self.done, self.total)


def match_all(named: Named, tick: MatchProgress) -> list[MatchedPair]:
    """Match every pair of SAEs: (0, 1), (0, 2), …, (1, 2), …"""
    return [
        MatchedPair(
            i,
            j,
            *(
                match_rows(a, b, tick, either_sign=have_signs(named[i][1], named[j][1]))
                for a, b in ((named[i][1].W_dec, named[j][1].W_dec), (named[i][1].W_enc, named[j][1].W_enc))
            ),
        )
        for i, j in combinations(range(len(named)), 2)
    ]


def match_rows(a: Tensor, b: Tensor, tick: MatchProgress, *, either_sign: bool = False) -> MatchedRows:
    """Match two matrices of directions; `either_sign`: a direction and its negative are the same."""
    b = b.to(a.device)
    matching = match_latents(a, b, either_sign=either_sign)
    with torch.no_grad():
        top_a, low_a, top_b, low_b = extremes(Directions.of(a, "a"), Directions.of(b, "b"))
    tick()
    absolute = _mean_of_both(torch.maximum(top_a, -low_a), torch.maximum(top_b, -low_b), least=0.0)
    return MatchedRows(matching, absolute if either_sign else _mean_of_both(top_a, top_b), absolute)


def _mean_of_both(a: Tensor, b: Tensor, least: float = -1.0) -> Measured:
    """Return the mean over the latents of both SAEs."""
    error = math.hypot(standard_error(a), standard_error(b)) / 2
    return over_latents(float((a.mean() + b.mean()) / 2), error, least=least)


def began_alike(a: SAE, b: SAE) -> bool:
    """Return whether two SAEs began from the same random weights: what they share then says nothing."""
    seed = a.provenance.get("seed")
    return seed is not None and seed == b.provenance.get("seed") and a.W_enc.shape == b.W_enc.shape


def found_in(named: Named, matched: Sequence[MatchedPair], rule: SharedRule) -> list[np.ndarray]:
    """Return per SAE which other SAEs have each of its latents, ``bool [n_latents, m]``."""
    has = [np.zeros((sae.n_latents, len(named)), dtype=bool) for _, sae in named]
    for pair in matched:
        shared = pair.shared(rule)
        has[pair.first][shared.numpy(), pair.second] = True
        has[pair.second][pair.decoder.matching.partner[shared].numpy(), pair.first] = True
    return has
