"""The digest of an SAE: one name for the same function, in results, in provenance and in its file."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .model import SAE


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def compute_digest(sae: SAE) -> str:
    """Return ``"sha256:<hex>"`` over the rule, the scaling and every tensor used at inference.

    One line of JSON comes first (rule, scaling, dtype and shape of each tensor; keys sorted, no spaces), then the bytes
    of the tensors in order of their names. Scores and provenance do not count: they say something about the function
    and do not change it. `saekit.sae.model.SAE.digest` computes it once per value.
    """
    tensors = sorted(sae.tensors().items())
    facts = {
        "rule": {"name": sae.rule.name, **sae.rule.settings()},
        "scaling": sae.scaling.settings(),
        "tensors": {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode())
    for _, tensor in tensors:
        digest.update(bytes_of(tensor))
    return f"sha256:{digest.hexdigest()}"
