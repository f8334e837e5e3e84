"""What chance gives: dictionaries without anything in common, of the shape of those compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..matching.shared import SharedRule, have_signs
from ..measure.intervals import measured_mean, wilson_interval
from ..measure.redundancy import random_max_cosine
from ..measure.results import Measured
from ..sae.model import SAE
from .pairs import MatchedPair, MatchProgress, match_rows
from .result import Null

Both = tuple[Tensor, Tensor]
"""A matrix of either SAE."""

PERMUTATIONS = 20
"""Permutations of the coordinates that `equal` is averaged over, up to `MATCHED_OFTEN` pairs of latents."""

MATCHED_OFTEN = 2048**2
"""Pairs of latents above which fewer permutations do: each one then counts more latents."""


def nulls_of(a: SAE, b: SAE, rule: SharedRule, seed: int, tick: MatchProgress) -> dict[str, Null]:
    """Return what chance gives, for dictionaries of the shape of two SAEs.

    ``random``: random directions; ``permuted``: the second SAE with its coordinates permuted, where `equal` is the mean
    over several permutations.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(rows: Tensor) -> Tensor:
        return torch.randn(rows.shape, generator=generator).to(rows.device)

    either = have_signs(a, b)
    wanted = [_orders(b, generator)]
    decoders, encoders = (random(a.W_dec), random(b.W_dec)), (random(a.W_enc), random(b.W_enc))
    unrelated = _null("directions drawn at random, decoder and encoder apart", decoders, encoders, rule, tick, either)
    n = max(1, min(PERMUTATIONS, PERMUTATIONS * MATCHED_OFTEN // (a.n_latents * b.n_latents)))
    wanted += [_orders(b, generator) for _ in range(n - 1)]
    permuted = [
        _null(
            "the first pair, coordinates of the second permuted alike in decoder and encoder",
            (a.W_dec, b.W_dec[:, dec.to(b.device)]),
            (a.W_enc, b.W_enc[:, enc.to(b.device)]),
            rule,
            tick,
            either,
        )
        for dec, enc in wanted
    ]
    return {
        "random": _with_formulas(unrelated, decoders, either),
        "permuted": replace(permuted[0], equal=_mean_equal([each.equal for each in permuted], b.n_latents)),
    }


def _orders(sae: SAE, generator: torch.Generator) -> Both:
    """Return a permutation of the coordinates of the decoder and one of the encoder, the same where that can be."""
    dec, enc = (torch.randperm(width, generator=generator) for width in (sae.d_out, sae.d_in))
    return dec, dec if sae.d_in == sae.d_out else enc


def _mean_equal(each: list[Measured], n_latents: int) -> Measured:
    """Return the mean over permutations with its interval, and between which values single ones lie."""
    if len(each) == 1:
        return each[0]
    values = [one.value for one in each]
    mean = measured_mean(values, each[0].unit, least=0.0, most=1.0)
    if min(values) == max(values):  # 0 in all, say: what the latents leave open remains
        mean = wilson_interval(round(sum(values) * n_latents), len(each) * n_latents)
    reason = f"mean of {len(each)} permutations, which lie from {min(values):.3g} to {max(values):.3g}"
    return replace(mean, reason=reason)


def _null(made: str, decoders: Both, encoders: Both, rule: SharedRule, tick: MatchProgress, either: bool) -> Null:
    sides = [match_rows(*each, tick, either_sign=either) for each in (decoders, encoders)]
    pair = MatchedPair(0, 1, *sides)
    fractions = pair.fractions(rule)
    decoder = pair.decoder.side()
    return Null(made, fractions["shared"], fractions["equal"], decoder.mean_cosine, decoder.max_cosine)


def _with_formulas(null: Null, decoders: Both, either: bool) -> Null:
    """Return the null of random directions, with what is expected of them."""
    (n, d), m = decoders[0].shape, len(decoders[1])
    # Two random matchings give one latent the same partner with probability 1 / larger width, and half as often the
    # same way round. A direction and its negative are like two directions.
    signs = 2 if either else 1
    equal = _with_formula(null.equal, 1 / max(n, m) / signs)
    largest = (random_max_cosine(signs * m + 1, d) + random_max_cosine(signs * n + 1, d)) / 2
    return Null(null.made, null.shared, equal, null.mean_cosine, _with_formula(null.max_cosine, largest))


def chance_of(nulls: dict[str, Null]) -> dict[str, Any]:
    """Return the fields of a comparison that say what chance gives; all None without nulls."""
    if not nulls:
        return dict.fromkeys(("shared_null", "equal_null", "mean_cosine_null", "max_cosine_null"))
    random = nulls["random"]
    return {
        "shared_null": random.shared,
        "equal_null": _equal_null(nulls),
        "mean_cosine_null": random.mean_cosine,
        "max_cosine_null": random.max_cosine,
    }


def _equal_null(nulls: dict[str, Null]) -> Measured:
    """Permuted coordinates keep how much each encoder resembles its decoder."""
    permuted, unrelated = nulls["permuted"].equal, nulls["random"].equal
    reason = (
        f"{permuted.reason}; coordinates permuted, so that encoders resemble decoders as they do. "
        f"Dictionaries without any resemblance: {unrelated.value:.3g} ({unrelated.reason})"
    )
    return Measured(permuted.value, permuted.low, permuted.high, permuted.unit, reason)


def _with_formula(measured: Measured, expected: float) -> Measured:
    reason = f"{measured.reason}; expected by formula: {expected:.6g}"
    return Measured(measured.value, measured.low, measured.high, measured.unit, reason)
