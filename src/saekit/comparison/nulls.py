"""What chance gives: dictionaries without anything in common, of the shape of those compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..matching.shared import SharedRule
from ..measure.redundancy import random_max_cosine
from ..measure.results import Measured
from ..sae.model import SAE
from .pairs import MatchedPair, MatchProgress, match_rows
from .result import Null

Both = tuple[Tensor, Tensor]
"""A matrix of either SAE."""


def nulls_of(a: SAE, b: SAE, rule: SharedRule, seed: int, tick: MatchProgress) -> dict[str, Null]:
    """Return what chance gives, for dictionaries of the shape of two SAEs.

    ``random``: random directions; ``permuted``: the second SAE with its coordinates permuted.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(rows: Tensor) -> Tensor:
        return torch.randn(rows.shape, generator=generator).to(rows.device)

    dec, enc = (torch.randperm(width, generator=generator) for width in (b.d_out, b.d_in))
    enc = dec if b.d_in == b.d_out else enc
    mixed = b.W_dec[:, dec.to(b.device)], b.W_enc[:, enc.to(b.device)]
    decoders, encoders = (random(a.W_dec), random(b.W_dec)), (random(a.W_enc), random(b.W_enc))
    return {
        "random": _with_formulas(
            _null("directions drawn at random, decoder and encoder apart", decoders, encoders, rule, tick), decoders
        ),
        "permuted": _null(
            "the first pair, coordinates of the second permuted alike in decoder and encoder",
            (a.W_dec, mixed[0]),
            (a.W_enc, mixed[1]),
            rule,
            tick,
        ),
    }


def _null(made: str, decoders: Both, encoders: Both, rule: SharedRule, tick: MatchProgress) -> Null:
    pair = MatchedPair(0, 1, match_rows(*decoders, tick), match_rows(*encoders, tick))
    fractions = pair.fractions(rule)
    decoder = pair.decoder.side()
    return Null(made, fractions["shared"], fractions["equal"], decoder.mean_cosine, decoder.max_cosine)


def _with_formulas(null: Null, decoders: Both) -> Null:
    """Return the null of random directions, with what is expected of them."""
    (n, d), m = decoders[0].shape, len(decoders[1])
    # Two random matchings give one latent the same partner with probability 1 / larger width.
    equal = _with_formula(null.equal, 1 / max(n, m))
    largest = (random_max_cosine(m + 1, d) + random_max_cosine(n + 1, d)) / 2
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
