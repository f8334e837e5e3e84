"""Defaults of a run: what a configuration and the settings leave open, from the width, the rows and the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import Config, Matryoshka, Selecting, has_signs

BATCH_ROWS = (256, 4096)
"""Smallest and largest default batch. Unit: rows."""
WANTED_STEPS = 1000
"""Steps that the default batch aims at, and from which the default learning rate falls."""
LR, LR_LATENTS, LR_K, LARGEST_LR, LARGEST_LR_K, LARGEST_LR_D = 8e-3, 1024, 16, 17e-3, 0.25, 64
"""Default learning rate at a number of latents and latents per row, in runs of up to `WANTED_STEPS` steps; the largest,
up to `LR_K`, the power of ``k / LR_K`` that it goes with beyond, and the width of the rows up to which it holds."""
SMALL_ROWS = 256
"""Rows per step below which the default learning rate of the architectures that select goes with the root of them."""
LARGEST_K = 32
"""Latents per row beyond which the default learning rate goes with them no further."""
WARMUP_STEPS, WARMUP_FRACTION, SELECTING_WARMUP_FRACTION = 1000, 0.05, 0.1
"""Default warm-up: Adam's second moments look back about 1,000 steps; short runs cannot spend that many. Where the
largest pre-activations are kept fewer latents die of a slower start, and the rate can be higher."""
DEAD_AFTER_ROWS, DEAD_AFTER_FRACTION, DEAD_AFTER_BATCHES = 10_000_000, 0.02, 8
"""Default window of rows for dead latents: at most so many (2406.04093: tokens), as a fraction of the rows of the run,
and at least so many batches."""
ROWS_PER_LATENT = 100
"""Rows per latent below which the defaults leave many dead, at half and a quarter of the learning rate as well."""
THRESHOLD_STEPS = 1000
"""Step from which a threshold over a batch is averaged, and steps that the average looks back (the BatchTopK code: an
average with 0.999 from step 1,000); less in short runs."""


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration's open values, filled in for one run; see `resolve`."""

    total_steps: int
    batch_rows: int
    lr: float
    warmup_steps: int
    decay_steps: int
    dead_after_rows: int
    k_aux: int
    threshold_start: int
    threshold_decay: float
    precision: str


def default_batch_rows(rows: int) -> int:
    """Return the rows per step of a run on so many rows: the power of two that gives about 1,000 steps, 256 to 4,096.

    Batch size matters through the number of steps: at equal rows more steps end lower, each at its best learning rate,
    down to a few hundred rows per step (``benchmarks/rates.py``, 300,000 rows).

    >>> [default_batch_rows(rows) for rows in (20_000, 400_000, 1_000_000, 100_000_000)]
    [256, 512, 1024, 4096]
    """
    smallest, largest = BATCH_ROWS
    return min(max(2 ** round(math.log2(max(rows, 1) / WANTED_STEPS)), smallest), largest)


@dataclass(frozen=True)
class LearningRate:
    """How the default learning rate of an architecture differs from the others'; see `default_lr`."""

    scale: float
    """Factor of the rate."""
    rows: int
    """Rows per step at which `LR` holds."""
    limit: float = 1.0
    """How far the rate rises with more rows per step than that."""
    few: float = 0.0
    """Power of ``k / 16`` that the rate goes with, with fewer latents per row than 16."""
    many: float = 0.0
    """And with more."""
    falls: float | None = None
    """Power of ``1024 / n_latents`` with which the largest rate falls with more latents, where it falls with the root
    of the width of the rows; it falls with neither if none."""


LEARNING_RATES = {
    "topk": LearningRate(1.2, 550, limit=2.0, few=0.125, many=0.15, falls=0.75),
    "hierarchical-topk": LearningRate(1.2, 550, limit=2.0, few=0.125, many=0.15, falls=0.75),
    "abstopk": LearningRate(0.7, 550, limit=0.6, few=0.25, many=0.25),
    "batchtopk": LearningRate(1.0, 550, limit=2**0.5, few=-0.25, many=0.25, falls=0.0),
    "matryoshka": LearningRate(1.2, 700, few=-0.5, many=0.25, falls=0.0),
    "jumprelu": LearningRate(1.0, 1024, many=-0.4),
    "relu": LearningRate(1.6, 512),
    "gated": LearningRate(1.2, 512),
    "p-anneal": LearningRate(1.2, 512),
}
"""Architecture -> its learning rate. With more, latents die: of AbsTopK, of BatchTopK and JumpReLU, whose latents
compete over a batch, and of Matryoshka, whose latents are in several sizes; but SAEs of few latents per row that
compete so train some latents too rarely, and with less these die. Found by ``benchmarks/rates.py``."""


def default_lr(config: Config, d_in: int, total_steps: int, batch_rows: int) -> float:
    """Return the default learning rate: falls with the width, with small batches, and with steps beyond a thousand.

    ``min(17e-3 * c * g**min(1, total_steps / 500), 8e-3 * scale * s * w * f**min(1, total_steps / 1000))``
    ``* min(1, 1000 / total_steps)**(1/4)``

    ``w = sqrt(1024 / n_latents)``, ``f = min(limit, sqrt(batch_rows / rows))``, and with `k` or the L0 that is aimed
    at ``s = (min(k, 32) / 16)**power`` and ``c = max(1, min(k, 32) / 16)**(1/4)``; `scale`, `rows`, `limit` and the
    power are those of the architecture, in `LEARNING_RATES`. Where the `k` largest pre-activations are kept, latents
    die of the noise of small batches, the more the fewer rows of a step are their own: there ``f = min(limit,
    batch_rows / rows)``, below 256 rows ``sqrt(256 * batch_rows) / rows``; and, but for Matryoshka, ``w = (1024 /
    n_latents)**(3/4)`` of more than 1,024 latents. ``g = 1``, but for those with the highest rates: of TopK and
    HierarchicalTopK ``min(1, 64 / d_in)**(1/2) * min(1, 1024 / n_latents)**(3/4)``, of BatchTopK and Matryoshka the
    first factor. Rows have coordinates of about 1, and Adam changes every coordinate of an encoder row by about the
    rate: a pre-activation changes in proportion to ``d_in``, while pre-activations go with ``sqrt(d_in)``. Runs shorter
    than a thousand steps take more, and end lower by it.

    What limits a rate is dead latents, and how soon they are revived (`dead_after_rows`). The rule was found by sweeps
    over three models and a known dictionary, k of 4 to 32, 128 to 4,096 latents, batches of 128 to 4,096 and up to
    7,400 steps, ``benchmarks/rates.py``; what it misses stands in its table in ``benchmarks/README.md``. Beyond these
    it is an extrapolation: compare with half of it.

    >>> from saekit import BatchTopK, JumpReLU, Matryoshka, TopK
    >>> [round(default_lr(TopK(n, k=16), 64, steps, 550), 5) for n, steps in ((1024, 500), (4096, 500), (1024, 16_000))]
    [0.0096, 0.00339, 0.0048]
    >>> [round(default_lr(TopK(1024, k=16), 64, 1000, batch), 5) for batch in (256, 512, 1024, 4096)]
    [0.00447, 0.00894, 0.017, 0.017]
    >>> configs = BatchTopK(1024, k=16), JumpReLU(1024, target_l0=16)
    >>> [round(default_lr(config, 64, 1000, 1024), 5) for config in configs]
    [0.01131, 0.008]
    >>> [round(default_lr(Matryoshka(1024, k=k), 64, 1000, 1024), 5) for k in (16, 8, 4)]
    [0.0096, 0.01358, 0.017]
    """
    rule = LEARNING_RATES["abstopk" if has_signs(config) else config.arch]
    width = (LR_LATENTS / config.n_latents) ** 0.5
    if isinstance(config, Selecting):
        width = width if isinstance(config, Matryoshka) else min(width, width**1.5)
        factor = min(rule.limit, max(batch_rows, (SMALL_ROWS * batch_rows) ** 0.5) / rule.rows)
    else:
        factor = min(rule.limit, (batch_rows / rule.rows) ** 0.5)
    k = getattr(config, "k", None) or getattr(config, "target_l0", None) or LR_K
    sparsity = (min(k, LARGEST_K) / LR_K) ** (rule.few if k < LR_K else rule.many)
    most = LR * rule.scale * sparsity * width * factor ** min(1, total_steps / WANTED_STEPS)
    largest = LARGEST_LR * max(1.0, min(k, LARGEST_K) / LR_K) ** LARGEST_LR_K
    if rule.falls is not None:
        falls = min(1.0, LARGEST_LR_D / d_in) ** 0.5 * min(1.0, LR_LATENTS / config.n_latents) ** rule.falls
        largest *= falls ** min(1, 2 * total_steps / WANTED_STEPS)
    return min(most, largest) * min(1, WANTED_STEPS / total_steps) ** 0.25


def resolve(config: Config, d_in: int, total_steps: int, batch_rows: int, precision: str = "fp32") -> ResolvedConfig:
    """Return a configuration with what depends on the run filled in; a value that it gives stays.

    =============== ============================================================================================
    lr              `default_lr`
    warmup_steps    min(1000, 5% of the steps; 10% where the largest pre-activations are kept)
    dead_after_rows min(10,000,000, 2% of the rows of the run), at least 8 batches
    k_aux           d_in / 2, rounded, at least 1, at most `n_latents`
    threshold       averaged from step min(1000, half of the steps) with a memory of min(1000, 5% of the steps) steps
                    (a decay of 0.999 in runs of 20,000 steps and more)
    =============== ============================================================================================
    """
    slow = SELECTING_WARMUP_FRACTION if isinstance(config, Selecting) else WARMUP_FRACTION
    warmup = min(WARMUP_STEPS, round(slow * total_steps))
    window = max(round(DEAD_AFTER_FRACTION * total_steps * batch_rows), DEAD_AFTER_BATCHES * batch_rows)
    memory = min(float(THRESHOLD_STEPS), max(1.0, 0.05 * total_steps))
    # About half of the width, as in 2406.04093.
    k_aux = getattr(config, "k_aux", None) or max(1, round(d_in / 2))
    return ResolvedConfig(
        total_steps=total_steps,
        batch_rows=batch_rows,
        lr=config.lr or default_lr(config, d_in, total_steps, batch_rows),
        warmup_steps=warmup if config.warmup_steps is None else config.warmup_steps,
        decay_steps=round(config.decay_fraction * total_steps),
        dead_after_rows=config.dead_after_rows or min(DEAD_AFTER_ROWS, window),
        k_aux=min(k_aux, config.n_latents),
        threshold_start=min(THRESHOLD_STEPS, total_steps // 2),
        threshold_decay=1 - 1 / memory,
        precision=precision,
    )
