"""What scores of tokens would be by chance: latents that fire as often, at random."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .token_statistics import TOKEN_BITS, TokenScores, _shapes, summed

CHANCE_FIRES = 2**12
"""Maximum number of firings of the chance samples: with more, the fractions of the tokens hardly vary."""

CHANCE_EVENNESS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Effective firings per firing that chance is drawn for: 1 with equal activations, 1/2 with exponential ones."""


# ----------------------------------------------------------------------------------------------------------- controls


@dataclass(frozen=True, eq=False)
class AgainstChance:
    """A score compared with chance for latents that fire as often; ``float64 [n_latents]`` each, NaN where dead."""

    chance: Tensor
    """Mean of the score under chance."""
    z: Tensor
    """``(score - chance) / deviation of chance``, signed so that more than 0 is more coherent."""
    percentile: Tensor
    """Fraction of the chance samples that are less coherent (ties count half), in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Chance:
    """Purity, entropy and lift of latents whose firings fall on tokens as often as these come.

    Tokens are drawn from the unigram distribution, with activations from a gamma distribution of a given unevenness,
    for powers of two of firings and a few degrees of evenness. That is what putting a latent's activations on random
    rows gives, without a second pass; `shifted` does it literally.
    """

    drawn: np.ndarray
    """``[sizes, evenness, draws, 3]``: firings ``2**size``, `CHANCE_EVENNESS`; sorted along the draws, so quantiles."""

    @classmethod
    def of(cls, scores: TokenScores, *, draws: int = 64, seed: int = 0) -> Chance:
        """Chance for the tokens that `scores` saw: scores of the same rows can share it.

        Raises
        ------
        ConfigError
            `draws` is below 2.
        DataError
            No row was added.
        """
        if draws < 2:
            raise ConfigError(f"against_chance: `draws` must be at least 2; got {draws}.")
        unigram = scores.token_counts / scores.checked_rows()
        return cls(_all_drawn(unigram.tobytes(), draws, seed))

    def quantiles(self, fires: np.ndarray, evenness: np.ndarray) -> np.ndarray:
        """Quantiles for latents with these firings and effective firings per firing, ``[n_latents, draws, 3]``."""
        less, part = _between(np.arange(len(self.drawn)), np.log2(fires.clip(1, CHANCE_FIRES)))
        uneven, along = _between(np.array(CHANCE_EVENNESS), evenness)
        more, even = less + 1, uneven + 1
        corners = (
            (less, uneven, (1 - part) * (1 - along)), (less, even, (1 - part) * along),
            (more, uneven, part * (1 - along)), (more, even, part * along),
        )  # fmt: skip
        return np.sum([weight[:, None, None] * self.drawn[n, degree] for n, degree, weight in corners], axis=0)


def against_chance(
    scores: TokenScores, chance: Chance | None = None, *, draws: int = 64, seed: int = 0
) -> dict[str, AgainstChance]:
    """Compare purity, entropy and lift with density-matched chance.

    Parameters
    ----------
    scores
        What the latents did.
    chance
        What chance gives on these rows; drawn anew by default.
    draws, seed
        As for `Chance.of`.

    Returns
    -------
    dict of str to AgainstChance
        By ``"purity"``, ``"entropy"``, ``"lift"``.

    Raises
    ------
    ConfigError
        `draws` is below 2.
    DataError
        No row was added.
    """
    chance = Chance.of(scores, draws=draws, seed=seed) if chance is None else chance
    stats = scores.compute()
    tables = chance.quantiles(stats.fires.numpy(), (stats.effective_fires / stats.fires.clamp_min(1)).numpy())
    found = {}
    for column, (name, sign) in enumerate((("purity", 1), ("entropy", -1), ("lift", 1))):
        table, value = tables[:, :, column], getattr(stats, name).numpy()
        mean, deviation = table.mean(1), table.std(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = sign * (value - mean) / deviation
        z = np.where(deviation > 1e-12, z, np.where(np.abs(value - mean) < 1e-12, 0.0, z))
        near = np.abs(table - value[:, None]) <= 1e-12
        beaten = (sign * (value[:, None] - table) > 0) & ~near
        percentile = (beaten.sum(1) + near.sum(1) / 2) / table.shape[1]
        dead = np.isnan(value)
        found[name] = AgainstChance(
            *(torch.from_numpy(np.where(dead, math.nan, each)) for each in (mean, z, percentile))
        )
    return found


def _between(grid: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the index below each value in a grid, never the last, and the fraction of the way to the next."""
    at = np.clip(np.searchsorted(grid, values, side="right") - 1, 0, len(grid) - 2)
    return at, np.clip((values - grid[at]) / (grid[at + 1] - grid[at]), 0.0, 1.0)


@functools.lru_cache(maxsize=4)
def _all_drawn(unigram: bytes, draws: int, seed: int) -> np.ndarray:
    """Return what every size and evenness gives: SAEs and sizes that are measured on the same rows share it."""
    generator = np.random.Generator(np.random.PCG64(seed))
    sizes = range(int(math.log2(CHANCE_FIRES)) + 1)
    p = np.frombuffer(unigram)
    found = np.sort([[_drawn(p, 2**n, even, draws, generator) for even in CHANCE_EVENNESS] for n in sizes], axis=2)
    found.setflags(write=False)
    return found


def _drawn(unigram: np.ndarray, size: int, even: float, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Purity, entropy and lift of `draws` samples of `size` tokens with gamma activations, ``[draws, 3]``."""
    ends = unigram.cumsum()
    token = np.searchsorted(ends, generator.random(draws * size) * ends[-1], side="right").clip(max=len(unigram) - 1)
    # E[a]^2 / E[a^2] of a gamma distribution is shape / (shape + 1). Very uneven draws must not be exactly 0.
    shape = even / (1 - even) if even < 1 else math.inf
    a = np.ones(draws * size) if even == 1 else np.maximum(generator.standard_gamma(shape, draws * size), 1e-12)
    sample = np.repeat(np.arange(draws), size)
    keys, sums = summed((sample << TOKEN_BITS) | token, a[:, None])
    draw, token = keys >> TOKEN_BITS, keys & (2**TOKEN_BITS - 1)
    total = np.bincount(sample, a, draws)
    effective = total**2 / np.bincount(sample, a * a, draws)
    distinct = np.bincount(draw, minlength=draws)
    purity, entropy, lift = _shapes(draw, sums[:, 0] / total[draw], unigram[token], distinct, effective, draws)
    return np.stack([purity, np.minimum(entropy, math.log(max(1, int(np.count_nonzero(unigram))))), lift], 1)
