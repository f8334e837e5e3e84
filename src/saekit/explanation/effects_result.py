"""The effect of latents: numbers, their controls, and what may be said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..measure.numbers import percent
from ..measure.results import Measured, Result

ABOVE = 95.0
"""Percentile among controls from which an effect is told from random."""

LEAST_COMPARED = 3
"""Fewer latents than this, and gradients are not compared with ablation."""

NOTHING = Measured(math.nan, unit="nats", reason="not tested")


@dataclass(frozen=True)
class Dose:
    """What adding a latent does where it does not fire."""

    dose: float
    """Multiple of the latent's 99th percentile."""
    strength: float
    """The code added."""
    change: float
    """Mean ratio of the norms, what is added to hidden state."""
    kl: Measured
    """KL divergence from the untouched model, nats per token."""
    kl_percentile: float
    """Percentage of random directions, at the same norm, that move the model less."""
    rise: Measured
    """Rise of ``log sum_T p``, in nats, T being the latent's followers."""
    rise_null_95: float
    """95th percentile of the rise under random directions."""
    rise_percentile: float
    """Percentage of random directions that raise T less."""


@dataclass(frozen=True)
class Effect:
    """What one latent does."""

    latent: int
    """Number of the latent."""
    density: float
    """Fraction of tokens at which it fires."""
    p99: float = 0.0
    """99th percentile of its nonzero codes: the unit of doses."""
    followers: list[str] = field(default_factory=list)
    """Tokens T that follow it in the labelling half more than elsewhere, most surprising first."""
    n_contexts: int = 0
    """Held-out contexts in which it was ablated."""
    n_tokens: int = 0
    """Tokens there at which it fires."""
    kl: Measured = NOTHING
    """Ablation: KL divergence from the untouched model where it fires, nats per token."""
    kl_elsewhere: float | None = None
    """The same at later tokens of these contexts where it does not fire; ``kl / kl_elsewhere`` is its specificity."""
    kl_null: dict[str, list[float]] = field(default_factory=dict)
    """`kl` of the controls: ``latents`` and ``directions``."""
    kl_percentile: dict[str, float] = field(default_factory=dict)
    """Percentage of the controls of each kind that move the model less."""
    drop: Measured = NOTHING
    """Ablation: fall of ``log sum_T p`` where it fires, in nats; above 0 when the latent promotes what follows it."""
    drop_null: dict[str, list[float]] = field(default_factory=dict)
    """`drop` of the controls."""
    drop_percentile: dict[str, float] = field(default_factory=dict)
    """Percentage of the controls of each kind under which T falls less."""
    doses: list[Dose] = field(default_factory=list)
    """Adding it, dose by dose."""
    verdict: str = "not tested"
    """``acts``: ablating it moves the model further than 95% of the controls of both kinds; ``cannot be told from
    random``; ``not tested``."""
    loss: Measured = NOTHING
    """Ablation: rise of the cross-entropy over all predicted tokens of these contexts, nats per token."""
    loss_expected: float | None = None
    """What gradients expect of it, to first order: ``-sum z dCE/dz`` per predicted token, as `attribution` has it."""
    promotes: bool = False
    """Whether ablating it lowers what follows it: an interval above 0, which takes 40 documents where it fires, and
    above 95% of the controls of both kinds."""
    reason: str | None = None
    """Why it was not tested."""

    @classmethod
    def untested(cls, latent: int, density: float, reason: str) -> Effect:
        """Return the entry of a latent that could not be tested."""
        return cls(latent, density, reason=reason)


def verdict_of(kl_percentile: Mapping[str, float]) -> str:
    """Return ``acts`` where an effect is above 95% of the controls of every kind, else that it cannot be told.

    ``not tested`` without controls of any kind.
    """
    if not kl_percentile:
        return "not tested"
    return "acts" if min(kl_percentile.values()) >= ABOVE else "cannot be told from random"


def is_promoting(drop: Measured, percentile: Mapping[str, float]) -> bool:
    """Return whether ablation lowers what follows: an interval above 0, and above 95% of the controls of every kind."""
    return bool(percentile) and min(percentile.values()) >= ABOVE and drop.low is not None and drop.low > 0


@dataclass(frozen=True, repr=False)
class Effects(Result):
    """What latents do to a language model, compared with controls of the same size."""

    KIND: ClassVar[str] = "effects"
    SCHEMA: ClassVar[int] = 2
    PARTS: ClassVar[tuple[str, ...]] = ("effects",)

    sae: dict[str, Any]
    """Latents, width, rule, digest, provenance."""
    model: dict[str, Any]
    """Name, digest and number type of the model."""
    hook: str
    """Where the SAE was attached."""
    data: dict[str, Any]
    """Name, digest and tokens of the texts."""
    effects: list[Effect]
    """One entry per latent."""

    def table(self) -> list[list[str]]:
        """Return a row per latent."""
        lines = [["latent", "density", "kl", "latents %", "directions %", "drop", "verdict", "followed by"]]
        for each in self.effects:
            known = each.kl_percentile
            above = [f"{known[kind]:.0f}" if kind in known else "–" for kind in ("latents", "directions")]
            numbers = [str(each.kl), *above, str(each.drop)] if each.reason is None else ["–"] * 4
            followers = " ".join(each.followers[:3])
            lines.append([str(each.latent), percent(each.density), *numbers, each.verdict, followers])
        return lines

    def agreement(self) -> tuple[float, float]:
        """Return how far gradients tell what ablation does to the cross-entropy, over the latents that were tested.

        Returns
        -------
        tuple of float
            Fraction of the latents with the same sign, and the rank correlation; NaN below three latents.
        """
        pairs = [(each.loss_expected, each.loss.value) for each in self.effects if each.loss_expected is not None]
        if len(pairs) < LEAST_COMPARED:
            return math.nan, math.nan
        from scipy.stats import spearmanr

        expected, found = np.array(pairs).T
        rank = spearmanr(expected, found).statistic if np.ptp(expected) and np.ptp(found) else math.nan
        return float((np.sign(expected) == np.sign(found)).mean()), float(rank)

    def _agreement(self) -> list[str]:
        sign, rank = self.agreement()
        if math.isnan(rank):
            return []
        n = sum(each.loss_expected is not None for each in self.effects)
        return [
            f"What gradients expect of ablation has the sign of the change in cross-entropy for {sign:.0%} of {n} "
            f"latents; rank correlation {rank:.2f}."
        ]

    def caption(self) -> str:
        """Return how many latents can be told from random, and how many would by chance."""
        tested = [each for each in self.effects if each.reason is None]
        acting = sum(each.verdict == "acts" for each in tested)
        lines = []
        if tested:
            lines.append(
                f"{acting} of {len(tested)} latents move the model further where they fire than 95% of the controls at "
                f"the same norm; at most {0.05 * len(tested):.2g} would by chance."
            )
        lines += self._agreement()
        lines += [f"Latent {each.latent} was not tested: {each.reason}." for each in self.effects if each.reason]
        return "\n".join(lines)
