"""Latents that mean nothing: random directions, a frozen decoder, and an SAE of a model with random weights."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ..randomness import hashed_key, random_order
from ..sae.model import SAE
from ..sae.rules import ReLURule
from ..training.config import TopK
from ..training.loop import train
from ..training.settings import TrainSettings
from .directions import covariance_directions

MADE = {
    "shuffled": "the codes of each latent, moved along the tokens by a random step",
    "random": "random directions with the covariance of the rows, with thresholds at which they fire as often",
    "frozen": "a TopK SAE with a frozen random decoder, trained here on the same rows",
    "randomized": "a TopK SAE, trained here on the rows of a model of the same architecture with Gaussian weights",
}
"""How each control is made."""

MOST_LATENTS = 1024
"""Maximum number of latents of a control that is made here."""

MOST_ROWS = 2**17
"""Maximum number of rows that a control is made from."""

BATCH_ROWS = 1024
"""Rows of a training step: many steps, for there are few rows."""


def random_directions(sae: SAE, rows: Tensor, density: np.ndarray, seed: int) -> SAE:
    """Return an SAE of random directions, each firing as often on `rows` as a latent of `sae` does.

    Directions come from the covariance of the rows: isotropic ones, which the rows hardly vary along, would be too easy
    to beat.
    """
    alive = np.flatnonzero(density > 0)
    n = min(MOST_LATENTS, max(len(alive), 1))
    wanted = np.sort(density[alive])[np.linspace(0, max(len(alive) - 1, 0), n).astype(int)] if len(alive) else [0.01]
    x = rows.float().cpu()[:8192]
    W = covariance_directions(x, n, hashed_key("random directions", seed, n_bytes=7)).float()
    mean = x.mean(0)
    threshold = torch.empty(n)
    for start in range(0, n, 256):
        pre = ((x - mean) @ W[start : start + 256].T).sort(dim=0, descending=True).values
        at = (torch.as_tensor(wanted[start : start + 256]) * len(x)).long().clamp(1, len(x) - 1)
        threshold[start : start + 256] = pre.gather(0, at[None])[0]
    return SAE(W, -threshold, W.clone(), torch.zeros(x.shape[1]), ReLURule(), b_pre=mean).to(sae.device)


def trained(rows: Tensor, n_latents: int, k: int, control: str | None, seed: int) -> SAE:
    """Return a TopK SAE trained on rows in one pass, or until 100 steps."""
    n = min(n_latents, MOST_LATENTS)
    batch = min(BATCH_ROWS, len(rows))
    config = TopK(n_latents=n, k=max(1, min(k, n)), control=control)
    settings = TrainSettings(batch_rows=batch)
    tokens = max(len(rows) // batch, 100) * batch
    return train(config, rows.float(), seeds=[seed], tokens=tokens, settings=settings, progress=_nothing)[0]


def _nothing(stage: str, done: int, total: int | None = None, note: str = "") -> None:
    """Report no progress: the stage that a control is made in does."""


def sampled_rows(batches: Iterable[tuple[Tensor, np.ndarray]], n_tokens: int, seed: int) -> Tensor:
    """Return the rows of a pass over the texts, at most `MOST_ROWS`, of random tokens."""
    kept = np.zeros(n_tokens, bool)
    kept[random_order(n_tokens, "rows", seed)[:MOST_ROWS]] = True
    return torch.cat([rows[torch.from_numpy(kept[place])].float().cpu() for rows, place in batches])
