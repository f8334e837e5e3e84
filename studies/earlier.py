"""Training as it was when the studies of transfer and seeds were made, so that they make the same SAEs.

Since then initial encoder rows are shorter, the default learning rate goes with the batch and with k, and it rises and
falls for about twice as long (`saekit.training.defaults`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from saekit.training.config import Selecting, encoder_fixed


def earlier(config: Any, rows: float, batch_rows: int) -> Any:
    """Return a configuration with the defaults that a run on so many rows had then."""
    config = replace(config, decay_fraction=0.2)
    if not isinstance(config, Selecting):
        return config
    steps = max(int(rows) // batch_rows, 1)
    batch = min(1, batch_rows / 512) ** (0.5 * min(1, steps / 1000))
    lr = min(8e-3 * (1024 / config.n_latents) ** 0.5, 16e-3) * batch * min(1, 1000 / steps) ** 0.25
    length = None if encoder_fixed(config) else 1.0
    warmup = min(1000, round(0.05 * steps)) if config.warmup_steps is None else config.warmup_steps
    return replace(config, lr=config.lr or lr, encoder_length=length, warmup_steps=warmup)
