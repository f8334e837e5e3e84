"""Training as it was when these studies were made, so that their commands make the same SAEs.

Since then initial encoder rows are shorter, and the default learning rate goes with the batch
(`saekit.training.defaults.default_lr`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from saekit.training.config import Selecting, encoder_fixed


def earlier(config: Any, rows: float, batch_rows: int) -> Any:
    """Return a configuration with the defaults that a run on so many rows had then."""
    if not isinstance(config, Selecting):
        return config
    steps = max(int(rows) // batch_rows, 1)
    batch = min(1, batch_rows / 512) ** (0.5 * min(1, steps / 1000))
    lr = min(8e-3 * (1024 / config.n_latents) ** 0.5, 16e-3) * batch * min(1, 1000 / steps) ** 0.25
    length = None if encoder_fixed(config) else 1.0
    return replace(config, lr=config.lr or lr, encoder_length=length)
