"""What it costs to ablate latents: orphans, shared ones, and as many of each at equal frequencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..measure.reconstruction import Measurement
from ..measure.results import Measured
from ..sae.model import SAE
from .intervals import over_saes
from .orphan_properties import Kinds
from .orphans_result import Ablated

GROUPS = ("all orphans", "all shared", "orphans, matched", "shared, matched")
"""Latents that are ablated, one group at a time."""

UNITS = {"fvu": "fraction", "ce": "nats per token"}
_METRICS = {"fvu": "fvu", "ce": "ce_sae"}


@dataclass(frozen=True)
class AblationCosts:
    """Rises of FVU and of cross-entropy."""

    groups: list[Ablated]
    """One per group of latents."""
    differences: dict[str, Measured]
    """``fvu`` and ``ce``: rise without matched orphans minus that without as many shared latents."""
    language_model: dict[str, Any] | None
    """Model and texts of the cross-entropies."""


def ablated(sae: SAE, latents: Tensor | np.ndarray) -> SAE:
    """Return the SAE with some latents that compete as before but write nothing."""
    W = sae.W_dec.clone()
    W[torch.as_tensor(latents, device=W.device)] = 0
    return sae.replace(W_dec=W)


def variants(saes: Sequence[SAE], kinds: Kinds) -> list[SAE]:
    """Return what must be measured: each SAE whole, then without each of `GROUPS`."""
    found = []
    for at in kinds.matched:
        found += [saes[at], *(ablated(saes[at], group) for group in _groups(kinds, at))]
    return found


def ablation_costs(measured: Measurement, kinds: Kinds) -> AblationCosts:
    """Return what ablating each group costs, from the measurement of `variants`."""
    shape = (len(kinds.matched), 1 + len(GROUPS))
    rises: dict[str, np.ndarray] = {}
    for name, metric in _METRICS.items():
        if metric in measured.estimates[0]:
            value = np.array([each[metric].value for each in measured.estimates]).reshape(shape)
            rises[name] = value[:, 1:] - value[:, :1]
    counts = np.array([[len(group) for group in _groups(kinds, at)] for at in kinds.matched], dtype=float)

    def rise(name: str, group: int) -> Measured:
        return over_saes(rises[name][:, group], UNITS[name])

    groups = [
        Ablated(group, float(counts[:, at].mean()), rise("fvu", at), rise("ce", at) if "ce" in rises else None)
        for at, group in enumerate(GROUPS)
    ]
    differences = {name: over_saes(value[:, 2] - value[:, 3], UNITS[name]) for name, value in rises.items()}
    return AblationCosts(groups, differences, measured.language_model)


def _groups(kinds: Kinds, at: int) -> list[np.ndarray]:
    """Return the latents of one SAE in each of `GROUPS`."""
    shared = kinds.shared[at]
    return [np.flatnonzero(~shared), np.flatnonzero(shared), *kinds.matched[at]]
