"""An SAE as plain values and numpy arrays, for the state of an estimator: what pickle, joblib and skops store."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from ..sae.digest import bytes_of
from ..sae.model import SAE
from ..sae.rules import RULES
from ..sae.scaling import Scaling

_MARK = "saekit_sae"
_SCORES = "scores."


def state_of(sae: SAE) -> dict[str, Any]:
    """Return an SAE as plain values and numpy arrays."""
    tensors = {**sae.tensors(), **{f"{_SCORES}{name}": score for name, score in sae.scores.items()}}
    facts = {
        "rule": {"name": sae.rule.name, **sae.rule.settings()},
        "scaling": sae.scaling.settings(),
        "provenance": sae.provenance,
        "dtypes": {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()},
        "shapes": {name: list(t.shape) for name, t in tensors.items()},
    }
    # numpy has no bfloat16, bytes have every type
    arrays = {name: np.frombuffer(bytes(bytes_of(t)), np.uint8) for name, t in tensors.items()}
    return {_MARK: 1, "facts": json.dumps(facts), "tensors": arrays}


def is_state(value: object) -> bool:
    """Return whether a value is what `state_of` returned."""
    return isinstance(value, dict) and _MARK in value


def sae_of(state: dict[str, Any]) -> SAE:
    """Rebuild the SAE from its stored state."""
    facts = json.loads(state["facts"])
    tensors = {
        name: torch.from_numpy(np.array(array))
        .view(getattr(torch, facts["dtypes"][name]))
        .reshape(facts["shapes"][name])
        for name, array in state["tensors"].items()
    }

    def part(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    settings = facts["rule"]
    return SAE(
        **{name: t for name, t in tensors.items() if "." not in name},
        rule=RULES[settings.pop("name")](**settings, **part("rule.")),
        scaling=Scaling(**facts["scaling"], **part("scaling.")),
        provenance=facts["provenance"],
        scores=part(_SCORES),
    )
