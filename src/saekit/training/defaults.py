"""Defaults of a run: what a configuration and the settings leave open, from the width, the rows and the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import Config

BATCH_ROWS = (256, 4096)
"""Smallest and largest default batch. Unit: rows."""
WANTED_STEPS = 1000
"""Steps that the default batch aims at, and from which the default learning rate falls."""
LR, LR_LATENTS, LARGEST_LR = 8e-3, 1024, 16e-3
"""Default learning rate at a number of latents, in runs of up to `WANTED_STEPS` steps; and the largest."""
LR_BATCH_ROWS = 512
"""Rows per step below which the default learning rate falls, with the square root of them. Unit: rows."""
WARMUP_STEPS, WARMUP_FRACTION = 1000, 0.05
"""Default warm-up: Adam's second moments look back about 1,000 steps; short runs cannot spend that many."""
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

    Batch size matters through the number of steps: at equal rows more steps end lower (400,000 rows: FVU .070, .072
    and .084 with batches of 512, 1,024 and 4,096, each at its best learning rate).

    >>> [default_batch_rows(rows) for rows in (20_000, 400_000, 1_000_000, 100_000_000)]
    [256, 512, 1024, 4096]
    """
    smallest, largest = BATCH_ROWS
    return min(max(2 ** round(math.log2(max(rows, 1) / WANTED_STEPS)), smallest), largest)


def default_lr(n_latents: int, total_steps: int, batch_rows: int) -> float:
    """Return the default learning rate: falls with the width, with small batches, and with steps beyond a thousand.

    ``8e-3 * sqrt(1024 / n_latents * min(1, batch_rows / 512)**min(1, total_steps / 1000)) * min(1, 1000 /
    total_steps)**(1/4)``

    The first root is at most 2. Found by a sweep of TopK SAEs (k = 16; rows of stories260K after block 3, d = 64): FVU
    of held-out rows / percent of latents that are silent on 100,000 rows, at half of it, at it, at twice of it. What
    limits the rate is dead latents, and how soon they are revived: with a window of 20% of the rows instead of 2% a
    run of 2,048 latents loses 15% of them at this rate.

    ========= ===== ========= ======== =========== =========== ===========
    n_latents batch rows      steps    half        default     twice
    ========= ===== ========= ======== =========== =========== ===========
    512       1,024 400,000   390      .086 / 0    .082 / 0    .085 / 2
    768       1,024 600,000   585      .073 / 0    .071 / 0    .074 / 6.5
    1,024     1,024 400,000   390      .073 / 0    .068 / 0    .071 / 9
    1,024     512   1,400,000 2,734    .060 / 0    .058 / .3   .063 / 12
    1,024 (*) 512   240,000   468      .189 / 0    .183 / .1   .206 / 16
    ========= ===== ========= ======== =========== =========== ===========

    Smaller batches lose latents at this rate in runs of 800 steps and more; what they lose grows with the noise of a
    step and the number of steps. Two seeds, 200,000 rows (first line) and 300,000, with and without their factor:

    ========= ========= ======== ============= =============
    n_latents batch     steps    with          without
    ========= ========= ======== ============= =============
    1,024     256       781      .073 / .1     .074 / 4
    1,024     256       1,171    .068 / 0      .069 / 4.5
    1,024     128       2,343    .067 / 0      .070 / 12
    2,048     256       1,171    .060 / .5     .061 / 10
    ========= ========= ======== ============= =============

    (*) The built-in language model, d = 192, each row twice. Every other architecture, other k and the built-in model:
    ``benchmarks/rates.py``, with its table in ``benchmarks/README.md``; there too FVU is lowest at the default, of the
    rates that leave less than 2% dead (with k = d/2 more die, with k = d many: half of it there). Wider than 2,048
    latents, or longer than 3,000 steps, it is an extrapolation: compare with half of it.

    >>> [round(default_lr(n, steps, 512), 5) for n, steps in ((1024, 500), (4096, 500), (1024, 16_000))]
    [0.008, 0.004, 0.004]
    >>> [round(default_lr(1024, 1000, batch), 5) for batch in (128, 256, 4096)]
    [0.004, 0.00566, 0.008]
    """
    steps = min(1, WANTED_STEPS / total_steps) ** 0.25
    batch = min(1, batch_rows / LR_BATCH_ROWS) ** (0.5 * min(1, total_steps / WANTED_STEPS))
    return min(LR * (LR_LATENTS / n_latents) ** 0.5, LARGEST_LR) * batch * steps


def resolve(config: Config, d_in: int, total_steps: int, batch_rows: int, precision: str = "fp32") -> ResolvedConfig:
    """Return a configuration with what depends on the run filled in; a value that it gives stays.

    =============== ============================================================================================
    lr              `default_lr`
    warmup_steps    min(1000, 5% of the steps)
    dead_after_rows min(10,000,000, 2% of the rows of the run), at least 8 batches
    k_aux           d_in / 2, rounded, at least 1, at most `n_latents`
    threshold       averaged from step min(1000, half of the steps) with a memory of min(1000, 5% of the steps) steps
                    (a decay of 0.999 in runs of 20,000 steps and more)
    =============== ============================================================================================
    """
    warmup = min(WARMUP_STEPS, round(WARMUP_FRACTION * total_steps))
    window = max(round(DEAD_AFTER_FRACTION * total_steps * batch_rows), DEAD_AFTER_BATCHES * batch_rows)
    memory = min(float(THRESHOLD_STEPS), max(1.0, 0.05 * total_steps))
    # About half of the width, as in 2406.04093.
    k_aux = getattr(config, "k_aux", None) or max(1, round(d_in / 2))
    return ResolvedConfig(
        total_steps=total_steps,
        batch_rows=batch_rows,
        lr=config.lr or default_lr(config.n_latents, total_steps, batch_rows),
        warmup_steps=warmup if config.warmup_steps is None else config.warmup_steps,
        decay_steps=round(config.decay_fraction * total_steps),
        dead_after_rows=config.dead_after_rows or min(DEAD_AFTER_ROWS, window),
        k_aux=min(k_aux, config.n_latents),
        threshold_start=min(THRESHOLD_STEPS, total_steps // 2),
        threshold_decay=1 - 1 / memory,
        precision=precision,
    )
